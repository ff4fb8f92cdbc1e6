"""What is trained: a model, its data, a loss, a metric; built in, or the user's own `file.py:function`."""

from downslope.tasks.catalogue import reopen, task, tasks
from downslope.tasks.data import Batch, Data, size, take
from downslope.tasks.definition import Player, Task, accuracy, cross_entropy, squared_error
from downslope.tasks.entry import Entry
from downslope.tasks.guest import frames, guest, load, made_by

__all__ = [
    "Batch",
    "Data",
    "Entry",
    "Player",
    "Task",
    "accuracy",
    "cross_entropy",
    "frames",
    "guest",
    "load",
    "made_by",
    "reopen",
    "size",
    "squared_error",
    "take",
    "task",
    "tasks",
]
