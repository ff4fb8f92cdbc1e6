"""The page of one training, from its journal."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from downslope.errors import BadInput
from downslope.folder import read_file
from downslope.groups import named
from downslope.journal import Event
from downslope.report import events as ev
from downslope.report.curves import SMOOTH, quantities
from downslope.report.deeds import happened, moments, table
from downslope.report.plot import Moments, Quantity, Series, Track, panel, panels
from downslope.report.text import clip, duration, listing, number, plural, redact
from downslope.report.view import Curves, Fact, Legend, Metric, Page, Recipe, Schedule
from downslope.train.history import history

POINTS = 600  # a training has the page to itself
MOST_PLAYERS = 12  # beyond, their lines could not be told apart
LARGEST_RECIPE = 2**20  # bytes; the same limit as for reading a recipe


class Log:
    """A training's events by kind, without what a crash took back."""

    def __init__(self, events: Iterable[Event], name: str) -> None:
        """Raises BadInput where an event is wrong."""
        self.start = ev.Start()
        self.end: ev.TrainingEnd | None = None
        self.failed = ""
        steps: dict[int, ev.Step] = {}
        valid: dict[int, ev.Measured] = {}
        told: list[ev.Deed | ev.Skip] = []
        try:
            counting = history(events)
        except (KeyError, TypeError):
            raise BadInput(f"{name}: an event lacks what every event has.") from None
        for record in ev.typed(counting, ev.TRAINING, name):
            match record:
                case ev.Start():
                    self.start = record
                case ev.Step():
                    steps[record.step] = record
                case ev.Measured():
                    valid[record.step] = record
                case ev.Skip() | ev.Deed():
                    told.append(record)
                case ev.Failed():
                    self.failed = record.reason
                case ev.TrainingEnd():
                    self.end, self.failed = record, ""
        self.steps = [steps[step] for step in sorted(steps)]
        self.valid = [valid[step] for step in sorted(valid)]
        self.skips = [record for record in told if isinstance(record, ev.Skip)]
        self.deeds = happened(self.steps, told)
        self.players = list(dict.fromkeys(name for step in self.steps for name in step.players))
        percent = "accuracy" in self.start.metric.lower() and all(0 <= v.metric <= 1 for v in self.valid)
        self.metric = Metric(self.start.metric, self.start.higher_is_better, percent)

    @property
    def outcome(self) -> ev.Measured | ev.Evaluation | None:
        """What it ended with, which early stopping may have gone back for; until then the last look."""
        if self.end is not None and self.end.valid is not None:
            return self.end.valid
        return self.valid[-1] if self.valid else None

    @property
    def last_step(self) -> int:
        """The last applied update that the journal tells of."""
        return max([0, *(m.step for group in (self.steps, self.valid) for m in group)])

    @property
    def seconds(self) -> float | None:
        """Computing time so far."""
        known = [m.seconds for group in (self.steps, self.valid) for m in group if math.isfinite(m.seconds)]
        return max(known, default=None)


def training_page(events: Iterable[Event], folder: Path) -> Page:
    """Everything the page of one training says."""
    log = Log(events, str(folder / "journal.jsonl"))
    series, marks = _series(log), moments(log.deeds, log.steps)
    loss, valid, *others = quantities(log.metric)
    drawn = panels(series, [replace(loss, name=_LOSS[len(log.players) > 0]), valid, *others], marks)
    lines = [s for s in series if not s.faint and RATE.key not in s.tracks]
    return Page(
        kind="training",
        task=log.start.task or folder.name,
        headline=_headline(log, folder),
        names=[log.start.task or folder.name],
        metric=log.metric,
        facts=_facts(log),
        command=redact(shlex.join([*_COMMAND, "--seed", str(log.start.seed), log.start.task])),
        summary=_summary(log),
        highlights=_highlights(log),
        notes=_notes(log),
        series=series,
        curves=Curves(_lead(log), drawn, _legend(lines), "every batch", marks) if drawn else None,
        schedule=_schedule(log, series, marks),
        deeds=table(log.deeds, log.last_step),
        recipe=_recipe(log, folder / "recipe.toml"),
    )


_COMMAND = ("downslope", "train", "--recipe", "recipe.toml")
_WHOSE = ("Training", "Each player's")
_LOSS = ("Loss", "Players' losses")
RATE = Quantity("rate", "Learning rate", log=False)
BATCHES = Quantity("batches", "Batches per update", log=False)


def _lead(log: Log) -> str:
    many = len(log.players)
    lead = f"{_WHOSE[many > 0]} loss is a running mean over {100 * SMOOTH:g} % of the training; "
    lead += "every batch is behind it."
    if many > MOST_PLAYERS:
        lead += f" The first {MOST_PLAYERS} of {many} players are drawn."
    return lead


def _legend(series: Sequence[Series]) -> list[Legend]:
    return [Legend(s.name, s.hue) for s in series]


def _schedule(log: Log, series: Sequence[Series], marks: Sequence[Moments]) -> Schedule | None:
    rates = [s for s in series if RATE.key in s.tracks]
    growing = any(BATCHES.key in s.tracks for s in series)
    if not rates and not growing:
        return None
    whose = f" of {rates[0].name}" if log.players and len(rates) == 1 else ""
    drawn = [panel(series, RATE, "steps", False, marks)] if rates else []
    drawn += [panel(series, BATCHES, "steps", False, marks)] if growing else []
    legend = _legend(rates) if len(rates) > 1 else []
    also = ", and how many of the data's batches it took" if growing else ""
    return Schedule(f"The rate that every applied update{whose} used{also}.", drawn, legend, marks)


def _lines(log: Log) -> dict[str, list[ev.Step]]:
    """What was updated in which steps: the model, or the parts of several players."""
    if not log.players:
        return {"training": log.steps} if log.steps else {}
    drawn = log.players[:MOST_PLAYERS]
    return {name: [step.of(name) for step in log.steps if name in step.players] for name in drawn}


def _series(log: Log) -> list[Series]:
    """Each batch in the background; the running means, the validation and the learning rates over it."""
    span = SMOOTH * max(log.start.steps, log.last_step)
    lines = _lines(log)
    batches, means = [], []
    for hue, (name, steps) in enumerate(lines.items()):
        losses = _track(steps, [s.loss for s in steps])
        batches.append(Series(f"{name}, one batch", hue, {"train": losses.thinned(POINTS)}, faint=True))
        means.append(Series(name, hue, {"train": losses.smooth(span).thinned(POINTS)}))
    return [*batches, *means, *_validation(log, max(1, len(lines))), *_rates(lines), *_batches(log)]


def _validation(log: Log, hue: int) -> list[Series]:
    """Over the training's loss, if that is one: of several players it is the sum."""
    if not log.valid:
        return []
    loss = _track(log.valid, [v.loss for v in log.valid]).thinned(POINTS)
    metric = _track(log.valid, [v.metric for v in log.valid]).thinned(POINTS)
    return [Series("validation", hue, {"valid" if log.players else "train": loss, "metric": metric})]


def _rates(lines: Mapping[str, Sequence[ev.Step]]) -> list[Series]:
    """Rates that are one all along are one line, which would hide the others."""
    found: dict[Track, list[str]] = {}
    for name, steps in lines.items():
        if any(s.lr is not None for s in steps):
            rate = _track(steps, [math.nan if s.lr is None else s.lr for s in steps])
            found.setdefault(rate, []).append(name)
    hues = {name: hue for hue, name in enumerate(lines)}
    return [
        Series(listing(names), hues[names[0]], {RATE.key: rate.thinned(POINTS)})
        for rate, names in found.items()
    ]


def _batches(log: Log) -> list[Series]:
    """How many of the data's batches an update took, where that is not one throughout."""
    if all(step.batches == 1 for step in log.steps):
        return []
    taken = _track(log.steps, [float(step.batches) for step in log.steps])
    return [Series("batches per update", 0, {BATCHES.key: taken.thinned(POINTS)})]


def _track(measured: Sequence[ev.Step] | Sequence[ev.Measured], values: Sequence[float]) -> Track:
    return Track(tuple(float(m.step) for m in measured), tuple(m.seconds for m in measured), tuple(values))


def _headline(log: Log, folder: Path) -> str:
    task = log.start.task or folder.name
    if log.end is None:
        return f"The training of {task} is at step {log.last_step}"
    if log.outcome is None:
        return f"{task} was trained for {plural(log.end.step, 'step')}"
    return f"{task} reached a validation {log.metric.name} of {log.metric.write(log.outcome.metric)}"


def _summary(log: Log) -> list[str]:
    if log.failed:
        return [f"It stopped: {redact(log.failed)}"]
    if log.end is None:
        return ["It is not finished; downslope resume goes on where it stopped."]
    best = log.valid[0] if log.valid else None
    for measured in log.valid:
        best = measured if best is None or log.metric.better(measured.metric, best.metric) else best
    text = f"Trained for {plural(log.end.step, 'applied step')}"
    text += f" in {duration(log.seconds)} of computing." if log.seconds is not None else "."
    if best is not None and log.outcome is not None and best.metric != log.outcome.metric:
        value = log.metric.write(best.metric)
        text += f" The best {log.metric.name} on the way was {value}, at step {best.step}."
    return [text]


def _highlights(log: Log) -> list[Fact]:
    facts = []
    if log.outcome is not None:
        facts.append(Fact(f"Validation {log.metric.name}", log.metric.write(log.outcome.metric)))
        facts.append(Fact("Validation loss", number(log.outcome.loss, 4)))
    test = log.end.test if log.end else None
    if test is not None:
        facts.append(Fact(f"Test {log.metric.name}", log.metric.write(test.metric)))
    facts.append(Fact("Applied steps", str(log.end.step if log.end else log.last_step)))
    facts.append(Fact("Computing time", duration(log.seconds)))
    return facts


def _facts(log: Log) -> list[Fact]:
    facts = [Fact("Task", log.start.task), Fact("Seed", str(log.start.seed))]
    if log.start.recipe:
        facts.append(Fact("Recipe", f"hash {log.start.recipe[:12]}"))
    if parent := log.start.parent:
        facts.append(Fact("Branch", f"of {redact(parent.folder)} from step {parent.step} on"))
    if log.start.precision or log.start.compile:
        words = [log.start.precision or "float32", *["compiled"] * log.start.compile]
        facts.append(Fact("Computed in", ", ".join(words)))
    if log.players:
        facts.append(Fact("Players", f"{clip(listing(log.players))}; a step is a round of them"))
    loss = "mean over the batch while training; mean over the whole part in validation"
    together = ", of the players' sum unless the task has a loss of its own" if log.players else ""
    facts.append(Fact("Loss", loss + together))
    return facts


def _notes(log: Log) -> list[str]:
    scaled = [skip for skip in log.skips if skip.scale is not None]
    skips = [skip for skip in log.skips if skip.scale is None]
    notes = []
    if skips:
        names = list(dict.fromkeys(name for skip in skips for name in skip.names))
        text = f"{_skipped(len(skips))}: a gradient was not finite"
        notes.append(text + (f" (in {named(names)})." if names else "."))
    if scaled:
        least = min(skip.scale or 1.0 for skip in scaled) / 2
        notes.append(f"{_skipped(len(scaled))} while the loss scale of fp16 fell, to {least:g} at last.")
    return notes


def _skipped(count: int) -> str:
    return f"{plural(count, 'update')} {'were' if count > 1 else 'was'} skipped"


def _recipe(log: Log, path: Path) -> Recipe | None:
    if not path.is_file():
        return None
    text = read_file(path, LARGEST_RECIPE).decode("utf-8", "replace")
    steps = log.start.steps or log.last_step
    players = {
        name: round(steps * sum(name in step.players for step in log.steps) / len(log.steps))
        for name in log.players[:MOST_PLAYERS]
    }
    return Recipe("The recipe", "recipe.toml", text, steps, players)
