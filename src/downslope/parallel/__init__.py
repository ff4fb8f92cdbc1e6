"""Several processes that train one model: starting and joining them, wrapping the model, agreeing."""

from downslope.parallel.child import die_with_parent
from downslope.parallel.group import joined, leave, place, verdict
from downslope.parallel.launch import supervise
from downslope.parallel.objective import Objective, sharded
from downslope.parallel.ranks import ALONE, Lost, Ranks, lost
from downslope.parallel.watchdog import PATIENCE, alive, watched

__all__ = [
    "ALONE",
    "PATIENCE",
    "Lost",
    "Objective",
    "Ranks",
    "alive",
    "die_with_parent",
    "joined",
    "leave",
    "lost",
    "place",
    "sharded",
    "supervise",
    "verdict",
    "watched",
]
