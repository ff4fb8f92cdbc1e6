"""What a race does next: pure functions of its record. No clock, no randomness, no order of arrival.

A cut is made only when its rung is complete, and takes the verdicts in virtual order (rung, then trial). So
any number of workers, any order in which they finish, and any restart lead to the same cuts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from downslope.race.record import Job, Record


@dataclass(frozen=True)
class Cut:
    """A complete rung: its trials, best first, and those that go on, in virtual order."""

    rung: int
    order: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """Cuts so far, who runs on the present rung, the finalists once known, and the jobs without a verdict."""

    cuts: tuple[Cut, ...]
    runners: tuple[int, ...]
    finalists: tuple[int, ...] | None
    jobs: tuple[Job, ...]

    @property
    def finished(self) -> bool:
        """Whether every job of the race has its verdict."""
        return self.finalists is not None and not self.jobs


def decide(record: Record) -> Decision:
    """The decisions that this record supports. The same verdicts in any order give an equal decision."""
    assert record.plan is not None, "a race is decided once it is planned"
    baseline: int = record.plan["baseline"]
    runners = tuple(range(record.rungs[0].runners))
    cuts: list[Cut] = []
    for rung in range(len(record.rungs)):
        jobs = tuple(Job(rung, None, trial) for trial in runners)
        if open_jobs := tuple(job for job in jobs if job not in record.verdicts):
            return Decision(tuple(cuts), runners, None, open_jobs)
        order = rank(record, rung, runners)
        kept = tuple(sorted(_distinct(record, _sound(record, rung, order), _places(record, rung))))
        cuts.append(Cut(rung, order, kept))
        runners = kept
        if not kept:
            break
    chosen = _distinct(record, _sound(record, cuts[-1].rung, cuts[-1].order), record.plan["finalists"])
    finalists = (*chosen, baseline) if baseline not in chosen else chosen
    finals = (Job(None, repeat, trial) for repeat in range(record.plan["seeds"]) for trial in finalists)
    return Decision(tuple(cuts), (), finalists, tuple(job for job in finals if job not in record.verdicts))


def rank(record: Record, rung: int, trials: Iterable[int]) -> tuple[int, ...]:
    """Trials that a rung has judged, best first; what cannot be parted goes by number."""
    assert record.plan is not None
    higher = record.plan["higher_is_better"]
    return tuple(
        sorted(trials, key=lambda trial: (*record.verdicts[Job(rung, None, trial)].judged(higher), trial))
    )


def _places(record: Record, rung: int) -> int:
    """How many trials go on from a rung; from the last one, all that are sound may become finalists."""
    return record.rungs[rung + 1].runners if rung + 1 < len(record.rungs) else record.rungs[rung].runners


def _sound(record: Record, rung: int, order: Iterable[int]) -> list[int]:
    return [trial for trial in order if record.verdicts[Job(rung, None, trial)].outcome == "ok"]


def _distinct(record: Record, order: list[int], places: int) -> tuple[int, ...]:
    """Who goes on: first the leaders of as many families as the finals hold, then whoever is best.

    Neighbouring rates of one rule train nearly alike: three of them in the finals would tell little of which
    rule to take, and would leave out the rule that was behind by chance. A recipe given by name is its own
    family: somebody asked for it.
    """
    assert record.plan is not None
    leaders: dict[str, int] = {}
    for trial in order:
        leaders.setdefault(record.trials[trial].family, trial)
    first = list(leaders.values())[: record.plan["finalists"]]
    return tuple((first + [trial for trial in order if trial not in first])[:places])
