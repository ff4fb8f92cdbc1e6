"""What a page says: plain data, made from journals by `race` and `training`, drawn by the templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from downslope.report.axis import Axis
from downslope.report.plot import Moments, Panel, Series
from downslope.report.text import number

USE = """\
import downslope as ds

recipe = ds.Recipe.load("{file}")
optimizer = recipe.build(model, steps={steps})  # your model, and for how many steps you train it

for x, y in batches:
    optimizer.zero_grad()
    loss_function(model(x), y).backward()
    optimizer.step()  # schedule, clipping and decay are inside
"""

USE_OF_SEVERAL = """\
import downslope as ds

recipe = ds.Recipe.load("{file}")
optimizers = {{  # of each player's part of your model, and for how many updates of its own you train it
{each}
}}

for batch in batches:
    for name, optimizer in optimizers.items():
        optimizer.zero_grad()  # of what the others' losses left, too
        losses[name](model, batch).backward()
        optimizer.step()
"""
ONE_OF_SEVERAL = (
    "    {name}: recipe.players.get({name}, recipe).build(model.get_submodule({name}), steps={steps}),"
)


@dataclass(frozen=True)
class Metric:
    """The task's metric, and how its values and differences are written."""

    name: str
    higher_is_better: bool
    percent: bool = False

    def write(self, value: float | None) -> str:
        """One value.

        >>> Metric("accuracy", True, percent=True).write(0.98333)
        '98.33 %'
        """
        if value is None or value != value:
            return "–"
        return f"{100 * value:.2f} %" if self.percent else number(value, 4)

    def write_difference(self, value: float, *, plus: bool = True) -> str:
        """A difference of two values: in points (of percent) for an accuracy.

        >>> Metric("accuracy", True, percent=True).write_difference(-0.0125)
        '−1.25'
        """
        text = f"{100 * abs(value):.2f}" if self.percent else number(abs(value), 3)
        if text.strip("0.") == "":
            return text  # no sign on what rounds to nothing
        return ("−" if value < 0 else "+" if plus else "") + text

    @property
    def unit(self) -> str:
        """What a difference is counted in, after its number."""
        return " points" if self.percent else ""

    def better(self, first: float, second: float) -> bool:
        """Whether the first value is the better one; a value that is no number never is."""
        return second != second or (first > second if self.higher_is_better else first < second)


@dataclass(frozen=True)
class Fact:
    """A name and a value in a list of facts."""

    name: str
    value: str


@dataclass(frozen=True)
class Row:
    """One line of the standings; differences are paired by seed, and negative is worse than the winner."""

    rank: str
    name: str
    hue: int
    mean: float | None
    test: float | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: str  # "winner" | "tied" | "behind"
    pairs: tuple[float, ...] = ()  # the difference on every seed


@dataclass(frozen=True)
class Trial:
    """One candidate in the picture of who went how far; places are fractions of a full training."""

    name: str
    hue: int
    steps: int
    end: float
    stops: tuple[float, ...]
    loss: float | None
    metric: float | None
    fate: str  # "winner" | "finalist" | "cut" | "failed" | "running"
    outcome: str


@dataclass(frozen=True)
class Gate:
    """A rung: where it lies, and who ran up to it; `minor` ones lose their label on a narrow screen."""

    place: float
    label: str
    runners: str
    minor: bool = False


@dataclass(frozen=True)
class Point:
    """A measured point of a facet, in fractions of the drawing, with the words that explain it."""

    x: float
    y: float
    tip: str
    best: bool = False


@dataclass(frozen=True)
class Facet:
    """One rule's judged metric against its learning rate."""

    rule: str
    hue: int
    best: str
    d: str
    points: list[Point]


@dataclass(frozen=True)
class Legend:
    """A box that switches all lines whose series has this key."""

    name: str
    hue: int


@dataclass(frozen=True)
class Standings:
    """The table of finalists and the axis of its whiskers."""

    lead: str
    rows: list[Row]
    axis: Axis


@dataclass(frozen=True)
class Curves:
    """The panels with switches; `faint` names what the background lines are, empty for none."""

    lead: str
    panels: list[Panel]
    legend: list[Legend]
    faint: str = ""
    marks: Sequence[Moments] = ()

    @property
    def quantities(self) -> list[tuple[str, str]]:
        """The choices of what to show: (key, name)."""
        return list({panel.quantity: panel.name for panel in self.panels}.items())


@dataclass(frozen=True)
class Rates:
    """The facets of learning rates, on shared axes."""

    lead: str
    x: Axis
    y: Axis
    facets: list[Facet]


@dataclass(frozen=True)
class Lanes:
    """Who went how far."""

    lead: str
    gates: list[Gate]
    trials: list[Trial]


@dataclass(frozen=True)
class Recipe:
    """A recipe's text and how to use it; where it has several players, the updates that each makes."""

    title: str
    file: str
    text: str
    steps: int
    players: Mapping[str, int] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The text, if a person could read it."""
        return self.text if len(self.text) <= 20_000 else f"# Too long for a page: read {self.file}."

    @property
    def python(self) -> str:
        """The lines that use it in a loop of one's own."""
        each = [
            ONE_OF_SEVERAL.format(name=json.dumps(name, ensure_ascii=False), steps=n)
            for name, n in self.players.items()
        ]
        if each:
            return USE_OF_SEVERAL.format(file=self.file, each="\n".join(each))
        return USE.format(file=self.file, steps=self.steps)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as it was used; a legend where there are several."""

    lead: str
    panels: list[Panel]
    legend: list[Legend] = field(default_factory=list)
    marks: Sequence[Moments] = ()


@dataclass(frozen=True)
class Deed:
    """A row of what happened: at which steps, how often, what, and why."""

    steps: str
    times: int
    what: str
    why: str


@dataclass(frozen=True)
class Deeds:
    """The table of what happened beside the updates."""

    lead: str
    rows: list[Deed]


@dataclass(frozen=True)
class Page:
    """All that the templates draw; parts that are None are left out."""

    kind: str  # "race" | "training"
    task: str
    headline: str
    names: list[str]  # what stands out in the sentences
    metric: Metric
    facts: list[Fact]
    command: str
    summary: list[str] = field(default_factory=list)
    highlights: list[Fact] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    standings: Standings | None = None
    curves: Curves | None = None
    schedule: Schedule | None = None
    deeds: Deeds | None = None
    rates: Rates | None = None
    lanes: Lanes | None = None
    recipe: Recipe | None = None
