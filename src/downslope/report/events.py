"""What the report reads from a journal: the events it knows, checked before anything is drawn.

A journal may come from anywhere: every field is checked here, once. Unknown kinds and fields are passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from downslope.errors import BadInput
from downslope.report.text import clip

LARGEST_JSON = 64 * 2**20  # bytes; standings of thousands of candidates are far smaller

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A measured value; null and NaN both say that there is none."""

Words = Annotated[str, AfterValidator(clip)]
"""A name or a sentence; a page has no room for more than the beginning of a long one."""


Count = Annotated[int, Field(ge=0, le=10**15)]
"""A number of steps, seeds or items, or the place of something in a list."""


def _share(value: object) -> object:
    """A part of the whole as text, "1/4", is exact; anything else is left for the check to refuse."""
    try:
        return float(Fraction(value)) if isinstance(value, str) and len(value) < 50 else value
    except (ValueError, ZeroDivisionError, OverflowError):
        return value


Share = Annotated[float, BeforeValidator(_share), Field(gt=0, le=1)]


class Record(BaseModel):
    """Something read from a run folder."""

    model_config = ConfigDict(extra="ignore", frozen=True)


R = TypeVar("R", bound=Record)


class Candidate(Record):
    """One distinct recipe of a race; `names` has several entries where two names had one recipe."""

    trial: Count
    names: tuple[Words, ...] = Field(min_length=1)
    rule: Words
    lr: float | None = None
    origin: str = "grid"
    steps: Count = Field(gt=0)
    recipe: str = ""


class Rung(Record):
    """A place where all runners are judged: at `fraction` of a full training."""

    rung: Count
    fraction: Share
    runners: Count = 0


class Sizes(Record):
    """How many items each part of the data has."""

    train: Count
    valid: Count
    test: Count | None = None


class Plan(Record):
    """The event `race`: everything that was decided before the start."""

    task: Words
    task_name: Words
    metric: Words
    higher_is_better: bool
    target: float | None = None
    sizes: Sizes | None = None
    seed: Count = 0
    seeds: Count = 1
    budget: Words = ""
    versions: dict[Words, Words] = Field(default_factory=dict)
    baseline: Count | None = None
    rungs: tuple[Rung, ...] = ()
    trials: tuple[Candidate, ...] = ()
    left_out: tuple[Words, ...] = ()


class Curve(Record):
    """Training loss as sampled inside one segment; all lists are equally long."""

    step: tuple[Number, ...] = ()
    loss: tuple[Number, ...] = ()
    seconds: tuple[Number, ...] = ()


class Measured(Record):
    """A validation: the mean over the whole part, after `step` applied updates."""

    step: Count
    loss: Number
    metric: Number
    seconds: Number = math.nan


class Segment(Record):
    """A durable piece of one trial's training."""

    trial: Count
    run: Literal["trunk", "branch", "final"]
    repeat: Count | None = None
    end: Count
    curve: Curve = Curve()
    valid: Measured | None = None


class Judged(Measured):
    """A trial's value at a rung, read off at the end of its cooldown branch."""

    trial: Count
    rung: Count
    outcome: Words = "ok"


class Cut(Record):
    """A rung is complete; `kept` go on."""

    rung: Count
    kept: tuple[Count, ...]


class Finalists(Record):
    """The trials that are repeated on fresh seeds."""

    trials: tuple[Count, ...]


class Final(Measured):
    """One full training of a finalist with a fresh seed."""

    trial: Count
    repeat: Count
    test_metric: Number = math.nan
    outcome: Words = "ok"


class Failed(Record):
    """The trial of a race, or a training (which has no number), is out."""

    trial: Count = 0
    reason: Words = ""


class End(Record):
    """The race is over; `standings` is the SHA-256 of standings.json."""

    standings: str = ""


class StandingsRow(Record):
    """One line of standings.json."""

    rank: Count
    name: Words
    trial: Count
    stage: str = ""
    status: Words = "ok"
    metric: float | None = None
    loss: float | None = None
    metrics: tuple[float | None, ...] = ()
    test_metric: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    tied: bool = False


class Winner(Record):
    """The best recipe."""

    name: Words
    trial: Count
    recipe: str


class Standings(Record):
    """standings.json: what the race decided. Its statistics are not made again here."""

    level: float = 0.95
    winner: Winner | None = None
    rows: tuple[StandingsRow, ...] = ()


RACE: dict[str, type[Record]] = {
    "race": Plan,
    "segment": Segment,
    "judged": Judged,
    "cut": Cut,
    "finalists": Finalists,
    "final": Final,
    "failed": Failed,
    "end": End,
}


class Parent(Record):
    """The run and the step that a branch goes on from."""

    folder: Words
    step: Count


class Start(Record):
    """A training began."""

    task: Words = ""
    recipe: Words = ""  # its hash
    seed: Count = 0
    steps: Count = 0
    metric: Words = "metric"
    higher_is_better: bool = True
    parent: Parent | None = None
    precision: Words = ""
    compile: bool = False


class Move(Record):
    """One player's update in a step of several: its loss, and the learning rate it used."""

    loss: Number
    lr: float | None = None


class Step(Move):
    """The training loss of one applied update, the learning rate it used, and how many of the data's batches
    it took; of several players, the sum.
    """

    step: Count
    seconds: Number = math.nan
    batches: Count = 1
    players: dict[Words, Move] = Field(default_factory=dict)  # those that were updated

    def of(self, player: str) -> Step:
        """The step as this player made it."""
        move = self.players[player]
        return Step(step=self.step, seconds=self.seconds, loss=move.loss, lr=move.lr)


class Skip(Record):
    """An update that was not applied, because these gradients were not finite; under the loss `scale` of a
    scaler, which it then lowers, if that is given.
    """

    step: Count
    names: tuple[Words, ...] = ()
    culprit: Words = ""
    scale: float | None = None


class Deed(Record):
    """What a strategy did after `step` updates, why, and numbers and names that belong to it."""

    step: Count
    by: Words
    did: Words
    why: Words = ""
    facts: dict[Words, Number | Words] = Field(default_factory=dict)


class Evaluation(Record):
    """Loss and metric over a whole part of the data."""

    loss: Number = math.nan
    metric: Number = math.nan


class TrainingEnd(Record):
    """A training is over."""

    step: Count
    valid: Evaluation | None = None
    test: Evaluation | None = None


TRAINING: dict[str, type[Record]] = {
    "start": Start,
    "step": Step,
    "valid": Measured,
    "skip": Skip,
    "strategy": Deed,
    "failed": Failed,
    "end": TrainingEnd,
}


def typed(events: Iterable[Mapping[str, Any]], kinds: Mapping[str, type[Record]], name: str) -> list[Record]:
    """The known events, checked; raises BadInput naming the first that is wrong."""
    checked: list[Record] = []
    for event in events:
        model = kinds.get(str(event.get("kind")))
        if model is None:
            continue
        try:
            checked.append(model.model_validate(dict(event)))
        except ValidationError as error:
            raise BadInput(
                f"{name}: event {event.get('seq')} ({event.get('kind')}): {_first(error)}."
            ) from None
    return checked


def parse_json(data: bytes, model: type[R], name: str) -> R:
    """A checked JSON file of a run folder; raises BadInput naming what is wrong with it."""
    try:
        return model.model_validate(json.loads(data))
    except ValidationError as error:
        raise BadInput(f"{name}: {_first(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name}: is not JSON: {error}.") from None


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where or 'the whole'}: {problem['msg'].lower()}"
