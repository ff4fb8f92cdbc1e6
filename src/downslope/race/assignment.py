"""What a worker is told to do for a job: a pure function of the record, so that a restart asks for the same.

A search job is two legs: the trunk, at constant rate, from where the last rung left it to this rung's stop;
then the branch, cooled down to the rung's end and judged. At the last rung trunk and branch together are
the full recipe with a `wsd` schedule. A repeat is one leg: the recipe as it is, with a fresh seed.
"""

from __future__ import annotations

from typing import Any

from downslope.race.record import Event, Job, Record, Trial
from downslope.schedule import Schedule

POINTS = 200
"""Points of a curve in a full training."""


def assignment(record: Record, job: Job) -> dict[str, Any]:
    """The message that asks for a job, going on from the newest checkpoint that the journal vouches for."""
    assert record.plan is not None
    trial = record.trials[job.trial]
    return {
        **job.data(),
        "recipe": trial.recipe,
        "seed": record.plan["seed"] + (0 if job.repeat is None else 1 + job.repeat),
        "legs": _legs(record, job, trial),
        "start": _start(record, job),
        "interval": record.plan["interval"],
        "every": max(1, trial.steps // POINTS),
        "folder": folder(job),
    }


def folder(job: Job) -> str:
    """The name of the folder that holds a job's checkpoints; all rungs of a trial share one.

    >>> folder(Job(0, None, 7)), folder(Job(None, 2, 7))
    ('trial-007', 'trial-007-repeat-2')
    """
    return f"trial-{job.trial:03d}" + ("" if job.repeat is None else f"-repeat-{job.repeat}")


def _legs(record: Record, job: Job, trial: Trial) -> list[dict[str, Any]]:
    if job.rung is None:
        return [{"run": "final", "end": trial.steps, "lr": None}]
    stop, end = trial.length.rung(record.rungs[job.rung].fraction)
    trunk = Schedule.from_data(trial.trunk)
    branch = trunk.cooldown(stop, end - stop, trial.end) if end > stop else trunk
    return [
        {"run": "trunk", "end": stop, "lr": trunk.data()},
        {"run": "branch", "end": end, "lr": branch.data()},
    ]


def _start(record: Record, job: Job) -> Event | None:
    """The newest checkpoint of the job: of its branch, else of the trunk, as the rung before may have left
    it.
    """
    if job.rung is None:
        found = record.newest.get((job.trial, job.repeat, "final"))
    else:
        found = record.newest.get((job.trial, None, "branch"))
        if found is None or found["rung"] != job.rung:
            found = record.newest.get((job.trial, None, "trunk"))
    if found is None:
        return None
    seconds = found["curve"]["seconds"]
    return {
        **{key: found[key] for key in ("run", "end", "checkpoint", "sha")},
        "seconds": seconds[-1] if seconds else 0.0,
    }
