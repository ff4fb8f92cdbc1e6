"""Finds, runs and proves the optimisation strategy of a PyTorch model.

>>> import downslope as ds
>>> ds.chain(ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(3e-4, steps=10_000, warmup=500))).name
'clip_norm > adamw'
"""

from downslope.dropin import SGD, Adagrad, Adam, AdamW, Lion, Momentum, Nesterov, RMSprop
from downslope.errors import BadInput, DownslopeError, UserCodeError
from downslope.groups import groups
from downslope.optimizer import Optimizer
from downslope.race import Standings, race
from downslope.recipe import Recipe
from downslope.report import report
from downslope.rules import Chain, Part, Rule, Slot, Step, chain, link, links, rule, rules
from downslope.rules.catalogue import (
    adagrad,
    adam,
    adam_uncorrected,
    adamw,
    lion,
    momentum,
    nesterov,
    rmsprop,
    rmsprop_centered,
    sgd,
)
from downslope.rules.links import clip_norm, clip_value, decay, l1, l2
from downslope.schedule import Schedule, constant, cosine, exponential, linear, step, wsd
from downslope.tasks import Task, accuracy, cross_entropy, squared_error, task, tasks
from downslope.train import Diverged, Proof, Run, TrainState, losses, resume, train, verify_resume
from downslope.version import __version__

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BadInput",
    "Chain",
    "Diverged",
    "DownslopeError",
    "Lion",
    "Momentum",
    "Nesterov",
    "Optimizer",
    "Part",
    "Proof",
    "RMSprop",
    "Recipe",
    "Rule",
    "Run",
    "Schedule",
    "Slot",
    "Standings",
    "Step",
    "Task",
    "TrainState",
    "UserCodeError",
    "__version__",
    "accuracy",
    "adagrad",
    "adam",
    "adam_uncorrected",
    "adamw",
    "chain",
    "clip_norm",
    "clip_value",
    "constant",
    "cosine",
    "cross_entropy",
    "decay",
    "exponential",
    "groups",
    "l1",
    "l2",
    "linear",
    "link",
    "links",
    "lion",
    "losses",
    "momentum",
    "nesterov",
    "race",
    "report",
    "resume",
    "rmsprop",
    "rmsprop_centered",
    "rule",
    "rules",
    "sgd",
    "squared_error",
    "step",
    "task",
    "tasks",
    "train",
    "verify_resume",
    "wsd",
]
