"""The kinds that come back: cycles, restarts, and the one cycle of a whole run."""

from downslope.errors import BadInput, under
from downslope.schedule.curve import power, way
from downslope.schedule.duration import Duration
from downslope.schedule.schedule import Schedule, kind, make


def _cosine_restarts(i: int, peak: float, every: int, end: float, growth: int, shrink: float) -> float:
    period, restarts = every, 0
    if growth == 1:
        restarts, i = divmod(i, every)
    while i >= period:  # logarithmic in i, and exact, where a logarithm is not
        i, period, restarts = i - period, period * growth, restarts + 1
    height = power(shrink, restarts)
    return way(peak if height == 1 else end + (peak - end) * height, end, i, period, "cosine")


@kind(_cosine_restarts)
def cosine_restarts(
    peak: float,
    every: Duration,
    end: float = 0.0,
    growth: int = 1,
    shrink: float = 1.0,
    warmup: Duration = 0,
) -> Schedule:
    """Half a cosine from `peak` towards `end` over `every` updates, then again from the peak, for ever.

    Each period is `growth` times as long as the last, its height above `end` `shrink` times as great. It has
    no end: stop a run just before a restart, whose update is the first at the peak again. torch:
    CosineAnnealingWarmRestarts(T_0=every, T_mult=growth, eta_min=end). Source: SGDR, arXiv:1608.03983, eq. 5.
    For: snapshots, runs whose length is open. Not for: one model at the end of a known budget.

    >>> [round(cosine_restarts(1.0, every=2, growth=2, shrink=0.5)(i), 2) for i in range(7)]
    [1.0, 0.5, 0.5, 0.43, 0.25, 0.07, 0.25]
    """
    numbers = {"peak": peak, "every": every, "end": end, "growth": growth, "shrink": shrink}
    return make("cosine_restarts", **numbers, warmup=warmup)


def _cyclic(i: int, peak: float, base: float, up: int, down: int, form: str, factor: float) -> float:
    cycle, place = divmod(i, up + down)
    height = {"triangular": 1.0, "triangular2": power(0.5, cycle), "exp_range": power(factor, i)}[form]
    share = place / up if place <= up else (up + down - place) / down
    return peak if height * share == 1 else base + (peak - base) * height * share


@kind(_cyclic)
def cyclic(
    peak: float,
    base: float,
    up: Duration,
    down: Duration | None = None,
    form: str = "triangular",
    factor: float = 1.0,
) -> Schedule:
    """Straight up from `base` to `peak` and down again, for ever; `down` is `up` if not given.

    `form` says what the height above the base is multiplied by: triangular 1, triangular2 a half in each
    cycle, exp_range `factor` in each update. torch: CyclicLR(base_lr=base, max_lr=peak, step_size_up=up,
    step_size_down=down, mode=form, gamma=factor); its momentum is `peak=base_momentum, base=max_momentum`.
    Source: arXiv:1506.01186. For: finding a range of rates. Not for: the end of a run.

    >>> [cyclic(1.0, base=0.0, up=2, form="triangular2")(i) for i in range(8)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25]
    """
    made = make(
        "cyclic", peak=peak, base=base, up=up, down=up if down is None else down, form=form, factor=factor
    )
    if form != "exp_range" and dict(made.numbers)["factor"] != 1:
        with under("factor"):
            raise BadInput(
                f"cyclic: only the form 'exp_range' has a factor; {form!r} was given one of {factor:g}."
            )
    return made


def _one_cycle(i: int, peak: float, steps: int, base: float, end: float, rise: int, shape: str) -> float:
    return way(base, peak, i, rise, shape) if i < rise else way(peak, end, i - rise, steps - rise, shape)


@kind(_one_cycle)
def one_cycle(
    peak: float,
    steps: Duration,
    base: float | None = None,
    end: float | None = None,
    rise: Duration = "30 %",
    shape: str = "cosine",
) -> Schedule:
    """From `base` to `peak` over `rise` updates, then down to `end`: the rate of super-convergence.

    Not given, base is peak/25 and end base/10000. For momentum or beta1 turn it over: `one_cycle(0.85, steps,
    base=0.95, end=0.95)` is its mirror. `end` is met at `steps`, one past the last update; torch meets it at
    the last: OneCycleLR(max_lr=peak, total_steps=T, pct_start=p, anneal_strategy=shape) is steps=T-1,
    rise=p·T-1. Not for: runs that go on behind their end. Source: arXiv:1708.07120.

    >>> [round(one_cycle(1.0, steps=4, rise=2)(i), 3) for i in range(6)]
    [0.04, 0.52, 1.0, 0.5, 0.0, 0.0]
    """
    given = {"base": 0.0 if base is None else base, "end": 0.0 if end is None else end}
    made = make("one_cycle", peak=peak, steps=steps, **given, rise=rise, shape=shape)
    numbers = dict(made.numbers)
    if base is None:
        numbers["base"] = numbers["peak"] / 25
    if end is None:
        numbers["end"] = numbers["base"] / 1e4
    return make("one_cycle", **numbers)
