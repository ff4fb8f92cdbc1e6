"""Standings: who won, by how much and how surely. A pure function of the journal, without a clock in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downslope.errors import BadInput
from downslope.race.decide import Decision, decide
from downslope.race.record import Job, Record, Trial, Verdict
from downslope.race.statistics import Difference, paired

if TYPE_CHECKING:
    from downslope.recipe import Recipe

LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """One name in the standings. Numbers are means over the seeds for finalists, else those of the last
    rung it ran.

    `stage`: "final", or the part of a full training at which it was judged last: "full", "1/2", …
    `difference` is the mean paired difference of the metric to the winner, negative where it is worse;
    `low` and `high` bound it at 95 % for all finalists at once, None where that is not known. `tied`: not
    told apart from the winner; outside the finals, equal to another row. Test numbers are reported, nothing
    was chosen by them.
    """

    rank: int
    name: str
    trial: int
    rule: str
    lr: float
    origin: str
    stage: str
    tied: bool
    status: str = "ok"
    reason: str | None = None
    metric: float | None = None
    loss: float | None = None
    metrics: tuple[float | None, ...] = ()
    test_metric: float | None = None
    test_loss: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Standings:
    """The outcome of a race: `rows`, best first, and the recipe of the `winner`. Prints as a table.

    The winner is the finalist, AdamW at its default among them, with the best mean metric over fresh seeds.
    """

    task: str
    metric: str
    higher_is_better: bool
    target: float | None
    budget: str
    seeds: int
    rows: tuple[Row, ...]
    winner_name: str
    winner_hash: str
    winner_text: str

    @property
    def winner(self) -> Recipe:
        """The winning recipe."""
        from downslope.recipe import Recipe

        return Recipe.parse(self.winner_text, name=self.winner_name)

    def data(self) -> dict[str, Any]:
        """The standings as plain JSON data."""
        return {
            "schema": 1,
            "task": self.task,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "target": self.target,
            "budget": self.budget,
            "seeds": self.seeds,
            "level": LEVEL,
            "winner": {
                "name": self.winner_name,
                "trial": self.rows[0].trial,
                "hash": self.winner_hash,
                "recipe": self.winner_text,
            },
            "rows": [{**asdict(row), "metrics": list(row.metrics)} for row in self.rows],
        }

    def json(self) -> bytes:
        """The bytes of standings.json: the same for the same race, however it was run."""
        return (json.dumps(self.data(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @staticmethod
    def load(folder: str | Path) -> Standings:
        """The standings of a finished race. Errors: BadInput where there are none."""
        path = Path(folder) / "standings.json"
        try:
            data = json.loads(path.read_bytes())
            if data["schema"] != 1:
                raise BadInput(
                    f"{path} has schema {data['schema']}; this version of downslope reads schema 1."
                )
            rows = tuple(Row(**{**row, "metrics": tuple(row["metrics"])}) for row in data["rows"])
            names = ("task", "metric", "higher_is_better", "target", "budget", "seeds")
            winner = data["winner"]
            return Standings(
                **{name: data[name] for name in names},
                rows=rows,
                winner_name=winner["name"],
                winner_hash=winner["hash"],
                winner_text=winner["recipe"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(
                f"{path} holds no standings ({type(error).__name__}): is the race finished?"
            ) from None

    def __str__(self) -> str:
        """A table: finalists by their means over seeds, the others by the loss they were judged by."""
        gap = "difference to the winner"
        lines = [f"{'':>4} {'recipe':<28} {self.metric:>9} {gap:>28} {'loss':>8} {'test':>7}  reached"]
        for row in self.rows:
            rank = f"{row.rank}{'=' if row.tied else ''}"
            numbers = f"{_text(row.metric):>9} {_interval(row):>28} {_text(row.loss):>8}"
            reached = row.stage if row.status == "ok" else f"{row.stage}, {row.status}"
            lines.append(f"{rank:>4} {row.name:<28} {numbers} {_text(row.test_metric):>7}  {reached}")
        return "\n".join(lines)


def standings(record: Record) -> Standings:
    """The standings of a finished race. Errors: BadInput if it is not finished, or every finalist failed."""
    decision = decide(record) if record.plan else None
    if record.plan is None or decision is None or not decision.finished:
        raise BadInput("The race is not finished: the same command again goes on with it.")
    rows = _named(record, [*_finalists(record, decision), *_others(record, decision)])
    winner = record.trials[rows[0].trial]
    if rows[0].status != "ok":
        raise BadInput(f"No recipe could be trained to the end: {winner.names[0]}: {rows[0].reason}.")
    names = ("task", "metric", "higher_is_better", "target", "budget", "seeds")
    return Standings(
        **{name: record.plan[name] for name in names},
        rows=tuple(rows),
        winner_name=winner.names[0],
        winner_hash=winner.hash,
        winner_text=winner.recipe,
    )


@dataclass(frozen=True)
class _Repeats:
    """A finalist's verdicts, by repeat."""

    trial: int
    verdicts: tuple[Verdict, ...]

    @property
    def broken(self) -> Verdict | None:
        return next((verdict for verdict in self.verdicts if verdict.outcome != "ok"), None)

    def mean(self, name: str) -> float:
        return math.fsum(getattr(verdict, name) for verdict in self.verdicts) / len(self.verdicts)

    def key(self, higher: bool) -> tuple[int, float, float, int]:
        if self.broken:
            return (*self.broken.key(higher), self.trial)
        return (*Verdict("ok", self.mean("metric"), self.mean("loss")).key(higher), self.trial)


def _finalists(record: Record, decision: Decision) -> list[Row]:
    assert record.plan is not None
    assert decision.finalists is not None
    higher, seeds = record.plan["higher_is_better"], record.plan["seeds"]
    field = [
        _Repeats(trial, tuple(record.verdicts[Job(None, repeat, trial)] for repeat in range(seeds)))
        for trial in decision.finalists
    ]
    field.sort(key=lambda one: one.key(higher))
    sound = [one for one in field if not one.broken]
    differences = {one.trial: _to_winner(one, sound[0], len(sound), higher) for one in sound}
    ties = sum(difference.tied for difference in differences.values())
    rows = []
    for place, one in enumerate(field):
        difference = differences.get(one.trial)
        tied = difference is not None and difference.tied and ties > 1
        rows.append(_final(record.trials[one.trial], one, 0 if tied else place, difference, tied))
    return rows


def _to_winner(one: _Repeats, winner: _Repeats, field: int, higher: bool) -> Difference:
    """Signed so that negative is worse; widened for all pairs, because the same data picked the winner."""
    sign = 1 if higher else -1
    ours, theirs = ([sign * verdict.metric for verdict in repeats.verdicts] for repeats in (one, winner))
    if one is winner:
        return Difference(0.0, 0.0, 0.0)
    return paired(ours, theirs, LEVEL, comparisons=field * (field - 1) // 2)


def _final(trial: Trial, one: _Repeats, rank: int, difference: Difference | None, tied: bool) -> Row:
    shared: dict[str, Any] = {"rank": rank, "stage": "final", "tied": tied, **_identity(trial)}
    metrics = tuple(_finite(verdict.metric) for verdict in one.verdicts)
    if broken := one.broken:
        count = sum(verdict.outcome != "ok" for verdict in one.verdicts)
        reason = f"{broken.reason} ({count} of {len(one.verdicts)} repeats)"
        return Row(**shared, status=broken.outcome, reason=reason, metrics=metrics)
    numbers: dict[str, Any] = {
        name: _finite(one.mean(name)) for name in ("metric", "loss", "test_metric", "test_loss")
    }
    gap: dict[str, Any] = asdict(difference) if difference else {"mean": None}
    return Row(**shared, **numbers, metrics=metrics, difference=gap.pop("mean"), **gap)


def _others(record: Record, decision: Decision) -> list[Row]:
    """Those that the search left behind: the further they came the better, then by the rung's order."""
    assert record.plan is not None
    assert decision.finalists is not None
    rows: list[Row] = []
    seen = set(decision.finalists)
    for cut in reversed(decision.cuts):
        left = [trial for trial in cut.order if trial not in seen]
        seen.update(left)
        verdicts = [record.verdicts[Job(cut.rung, None, trial)] for trial in left]
        keys = [verdict.judged(record.plan["higher_is_better"]) for verdict in verdicts]
        first = len(decision.finalists) + len(rows)
        for place, (trial, verdict, key) in enumerate(zip(left, verdicts, keys, strict=True)):
            tied = verdict.outcome == "ok" and keys.count(key) > 1
            rank = first + (keys.index(key) if tied else place)
            stage = "full" if cut.rung + 1 == len(record.rungs) else str(record.rungs[cut.rung].fraction)
            rows.append(_left_behind(record.trials[trial], verdict, stage, rank, tied))
    return rows


def _left_behind(trial: Trial, verdict: Verdict, stage: str, rank: int, tied: bool) -> Row:
    return Row(
        **{"rank": rank, "stage": stage, "tied": tied, **_identity(trial)},
        status=verdict.outcome,
        reason=verdict.reason,
        metric=_finite(verdict.metric),
        loss=_finite(verdict.loss),
    )


def _identity(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.names[0],
        "trial": trial.trial,
        "rule": trial.rule,
        "lr": trial.lr,
        "origin": trial.origin,
    }


def _named(record: Record, rows: Iterable[Row]) -> list[Row]:
    """One row for each name, the names of one recipe tied. Ranks count rows from 1."""
    expanded = [
        replace(row, name=name, tied=row.tied or len(record.trials[row.trial].names) > 1)
        for row in rows
        for name in record.trials[row.trial].names
    ]
    groups = [row.rank for row in expanded]
    return [replace(row, rank=1 + groups.index(row.rank)) for row in expanded]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.1e}"


def _interval(row: Row) -> str:
    if row.difference is None:
        return ""
    if row.low is None or row.high is None:
        return f"{row.difference:+.4f} [unknown]"
    return f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
