"""One schedule of every kind, to look at."""

from typing import Any

from downslope.errors import BadInput, nearest
from downslope.schedule.cycle import cyclic
from downslope.schedule.decay import constant, cosine, exponential, linear, step
from downslope.schedule.schedule import KINDS, Schedule

_STAIRS = step(1.0, every=25, factor=0.5)
_GIVEN: dict[str, dict[str, Any]] = {
    "step": {"every": 25},
    "multistep": {"at": (50, 75)},
    "exponential": {"every": 25},
    "inverse_time": {"every": 25},
    "inverse_sqrt": {"every": 25},
    "cosine_restarts": {"every": 20, "growth": 2},
    "cyclic": {"base": 0.1, "up": 20},
    "plateau": {},
    "constant": {},
    "branch": {"trunk": constant(1.0), "start": 60, "cooldown": 20},
    "sequence": {"parts": (constant(1.0), cosine(0.5, steps=40)), "at": (50,)},
    "sum": {"parts": (linear(0.5, steps=100), cyclic(0.5, base=0.0, up=10))},
    "product": {"parts": (linear(1.0, steps=100), _STAIRS)},
    "clamp": {"part": exponential(1.0, every=25), "low": 0.2, "high": 0.8},
}
_LEVEL = ("sequence", "sum", "product", "clamp", "branch")  # these have no peak of their own


def example(kind: str) -> Schedule:
    """A schedule of the kind over 100 steps with its highest level at 1; where it has defaults, these.

    >>> example("exponential")
    exponential(peak=1.0, every=25, factor=0.5, warmup=0)
    """
    if kind not in KINDS:
        raise BadInput(f"unknown schedule {kind!r}.{nearest(kind, KINDS)} Allowed: {', '.join(KINDS)}.")
    given = _GIVEN.get(kind, {"steps": 100})
    return KINDS[kind](**given) if kind in _LEVEL else KINDS[kind](1.0, **given)
