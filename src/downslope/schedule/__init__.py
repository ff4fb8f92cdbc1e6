"""Schedules: what a number is worth at each applied update.

A schedule is plain data and a pure function of the step: it has no state to save, attaches to nothing, cannot
drift. Step 0 is the first update. All of them agree on this:

- With `warmup=w` the value at step i < w is `peak·(i + 1)/(w + 1)`: it rises in equal steps and is `peak` at
  step w. The first update is not wasted on a rate of 0, and `peak` is not spent twice.
- `steps` is the whole length, warmup included. `end` is reached at step `steps`, one past the last update, so
  that the last update is not wasted either (torch counts like this too, but for OneCycleLR). From there on
  the value stays `end`. Kinds without a length (stairs, cycles, restarts, the inverse ones) go on for ever.
- A duration is a whole number of applied updates, or text with a unit: "500 steps", "3 epochs",
  "64000 samples", "2e6 tokens", "10 %". A percentage is of the schedule's own `steps`; of the run for `steps`
  itself and where there is no `steps`.
- Values have no sign of their own, and `end` may lie above `peak`: a rising beta2 or weight decay wants it.
- A kind that reacts (plateau) is a pure function too: of the step, and of what was observed by then.
"""

from downslope.schedule.combination import branch, clamp, product, sequence, sum  # noqa: A004  as data has it
from downslope.schedule.cycle import cosine_restarts, cyclic, one_cycle
from downslope.schedule.decay import (
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    inverse_time,
    linear,
    multistep,
    polynomial,
    step,
    wsd,
)
from downslope.schedule.duration import FORMS, Duration, duration, in_steps
from downslope.schedule.example import example
from downslope.schedule.glossary import Term, term
from downslope.schedule.plateau import plateau
from downslope.schedule.schedule import KINDS, Bounds, Schedule, Seen

__all__ = [
    "FORMS",
    "KINDS",
    "Bounds",
    "Duration",
    "Schedule",
    "Seen",
    "Term",
    "branch",
    "clamp",
    "constant",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "duration",
    "example",
    "exponential",
    "in_steps",
    "inverse_sqrt",
    "inverse_time",
    "linear",
    "multistep",
    "one_cycle",
    "plateau",
    "polynomial",
    "product",
    "sequence",
    "step",
    "sum",
    "term",
    "wsd",
]
