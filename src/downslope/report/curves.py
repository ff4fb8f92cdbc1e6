"""The curves of a race: which trainings are drawn, which strongly, and what may be shown of them."""

from __future__ import annotations

from collections.abc import Sequence

from downslope.report.events import Measured
from downslope.report.log import Log
from downslope.report.plot import Quantity, Series, Track, panels
from downslope.report.view import Curves, Legend, Metric

MOST_LINES = 240  # beyond, nobody could tell them apart, and the page would grow too large
SMOOTH = 0.05  # of a full training: one batch's loss says little


def curves(log: Log, series: Sequence[Series]) -> Curves | None:
    """The section with the curves, None where nothing was measured yet."""
    drawn = panels(series, quantities(log.metric))
    if not drawn:
        return None
    lead = (
        "Of every rule its best candidate is drawn strongly: a full training where it reached the final, "
        f"else as far as it went. Training loss is a running mean over {100 * SMOOTH:g} % of a training. "
        "In validation, lines are read on the way at full rate; dots are what a candidate was judged by, at "
        "the end of a cooldown."
    )
    legend = [Legend(rule, hue) for rule, hue in log.hues.items()]
    return Curves(lead, drawn, legend, "all other trainings")


def quantities(metric: Metric) -> list[Quantity]:
    """What may be shown; a metric that is the loss is not shown twice."""
    found = [Quantity("train", "Training loss"), Quantity("valid", "Validation loss")]
    if metric.name != "loss":
        title = f"Validation {metric.name}"
        found.append(Quantity("metric", metric.name.capitalize(), title, metric.percent, flip=metric.percent))
    return found


def trainings(log: Log) -> list[Series]:
    """Background lines first: strong lines are drawn over them. In a large race the worst stay out."""
    seen: set[str] = set()
    series: list[Series] = []
    for trial in log.order:
        strong = log.candidates[trial].rule not in seen
        seen.add(log.candidates[trial].rule)
        if strong or len(series) < MOST_LINES:
            series += _of_trial(log, trial, strong=strong)
    return sorted(series, key=lambda s: not s.faint)


def _of_trial(log: Log, trial: int, *, strong: bool) -> list[Series]:
    """The trial's trunk, its judgements, and its finals; a final, if there is one, is the strong line."""
    hue, name = log.hue(trial), log.name(trial)
    runs = [(run, repeat) for t, run, repeat in log.segments if t == trial]
    repeats = sorted(repeat for run, repeat in runs if run == "final" and repeat is not None)
    faint = not strong or bool(repeats)
    found = [
        Series(name, hue, _tracks(log, trial, "trunk"), faint),
        Series(f"{name}, judged", hue, _validation(log.judged.get(trial, [])), faint, dots=True),
    ]
    for repeat in repeats:
        tracks = _tracks(log, trial, "final", repeat)
        found.append(Series(f"{name}, final {repeat + 1}", hue, tracks, faint=not strong or repeat > 0))
    return [series for series in found if series.tracks]


def _tracks(log: Log, trial: int, run: str, repeat: int | None = None) -> dict[str, Track]:
    steps, seconds, losses = log.curve(trial, run, repeat)
    measured = [s.valid for s in log.segments.get((trial, run, repeat), []) if s.valid]
    measured += [final for final in log.finals.get(trial, []) if run == "final" and final.repeat == repeat]
    tracks = _validation(measured)
    if steps:
        span = SMOOTH * log.candidates[trial].steps
        tracks["train"] = Track(tuple(steps), tuple(seconds), tuple(losses)).smooth(span).thinned()
    return tracks


def _validation(measured: Sequence[Measured]) -> dict[str, Track]:
    """Validation loss and metric, by step."""
    ordered = sorted({float(m.step): m for m in measured}.items())
    if not ordered:
        return {}
    at = tuple(step for step, _ in ordered)
    clock = tuple(m.seconds for _, m in ordered)
    return {
        "valid": Track(at, clock, tuple(m.loss for _, m in ordered)).thinned(),
        "metric": Track(at, clock, tuple(m.metric for _, m in ordered)).thinned(),
    }
