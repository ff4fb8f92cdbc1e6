"""Several processes that train one model: starting and joining them, wrapping the model, agreeing."""

from downslope.parallel.child import die_with_parent
from downslope.parallel.group import VERDICT, joined, leave, place
from downslope.parallel.launch import supervise
from downslope.parallel.objective import Objective, sharded
from downslope.parallel.ranks import ALONE, Lost, Ranks, lost
from downslope.parallel.watchdog import Watchdog

__all__ = [
    "ALONE",
    "VERDICT",
    "Lost",
    "Objective",
    "Ranks",
    "Watchdog",
    "die_with_parent",
    "joined",
    "leave",
    "lost",
    "place",
    "sharded",
    "supervise",
]
