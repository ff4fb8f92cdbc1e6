"""The coordinator: asks the deciders what is next, hands it to workers, journals what comes back. It
decides nothing.

An event is acknowledged when its line is on disk. Whatever is killed, the journal says how far everybody
came, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from downslope.errors import BadInput, UserCodeError
from downslope.folder import RunFolder
from downslope.journal import Journal, read
from downslope.race.assignment import assignment, folder
from downslope.race.candidates import baseline
from downslope.race.decide import Decision, decide
from downslope.race.planning import Recipes, Request, agree, planned
from downslope.race.pool import Lost, Message, Pool
from downslope.race.progress import Progress, progress
from downslope.race.record import Event, Job, Record
from downslope.race.standings import Standings, standings
from downslope.tasks import Task
from downslope.tasks import task as find
from downslope.train.checkpoint import remove

ATTEMPTS = {"itself": 3, "another": 10, "silence": 1}
"""Workers that a job may lose without getting on before its trial has failed, by who ended the last: `kill
-9` comes from outside, and says little about the trial (but may mean that it eats all memory); a crash is
mostly its own."""

_REHEARSAL = Job(None, None, -1)


class Remote(Exception):  # noqa: N818  never raised: it carries a worker's traceback as the cause of an error
    """The traceback of what went wrong in a worker."""


def race(
    task: str | Task,
    budget: str = "20x",
    seeds: int = 5,
    out: str | os.PathLike[str] | None = None,
    workers: int = 2,
    *,
    seed: int = 0,
    recipes: Recipes | None = None,
    rules: Sequence[str] | None = None,
    stall: float = 600.0,
) -> Standings:
    """Find the best recipe for a task, and how surely it is the best.

    A grid of `rules` (default: eight) and your own `recipes`, by name, run on longer and longer rungs; the
    best of three rules, and AdamW at its default, are repeated on `seeds` fresh seeds. `budget` is of the
    search: "20x" full trainings, "5000 steps"; or "10m", of the whole race. `out` (default: runs/NAME)
    holds everything; the same call again goes on there, or reads the finished standings, which are the same
    for any number of `workers` and any kills (but for budgets in time). `stall`: seconds until a silent
    worker is given up. Raises BadInput; UserCodeError where the task's own code does.
    """
    for name, value, least in (("seeds", seeds, 1), ("workers", workers, 1), ("seed", seed, 0)):
        if type(value) is not int or not least <= value < 2**31:
            raise BadInput(f"{name} must be a whole number from {least}, got {value!r}.")
    found = find(task) if isinstance(task, str) else task
    if found.entry is None:
        raise BadInput(
            "A race runs in processes of its own, which cannot see a task that was made here: put the "
            "function that returns it into a file, and pass 'path/to/file.py:function'."
        )
    request = Request(found, budget, seeds, seed, recipes or {}, rules)
    asked = None if request.spend.unit == "s" else planned(request, None)
    place = Path(out) if out is not None else Path("runs", found.name)
    with RunFolder(place) as held, Journal.open(place / "journal.jsonl") as journal, progress() as show:
        hello = {"task": found.entry.data(), "trials": str((place / "trials").resolve())}
        with Pool(workers, hello, stall) as pool:
            course = Course(held, journal, pool, show)
            if course.record.plan is None:
                course.rehearse(baseline(found.recipe).recipe.text(), seed, timed=asked is None)
            course.begin(asked or planned(request, course.record.pace))
            return course.run()


class Course:
    """One race under way: its folder, journal and record, and the workers."""

    def __init__(self, held: RunFolder, journal: Journal, pool: Pool, show: Progress) -> None:
        self.held, self.journal, self.pool, self.show = held, journal, pool, show
        self.trials = held.path / "trials"
        events = read(journal.path)
        if events and events[0]["kind"] not in ("race", "pace"):
            raise BadInput(f"The folder {held.path} holds something else than a race: choose another folder.")
        self.record = Record.of(events)

    def say(self, kind: str, **fields: Any) -> None:
        """Journal an event; when this returns it has happened."""
        self.journal.append(kind, **fields)
        self.record.take({"kind": kind, **fields})
        self.show.take({"kind": kind, **fields}, self.record)

    def rehearse(self, recipe: str, seed: int, timed: bool) -> None:
        """Try the task in a worker before anything is planned: its errors are the user's to read, now."""
        if timed and self.record.pace is not None:
            return
        lost = 0
        while isinstance(answer := self._asked({"recipe": recipe, "seed": seed, "timed": timed}), Lost):
            lost += 1
            if lost >= ATTEMPTS[answer.by]:
                trace = Remote(answer.printed)
                raise UserCodeError(
                    f"A worker that only tried the task was lost: {answer.reason}."
                ) from trace
        if answer["kind"] == "failed":
            if not answer["trace"]:  # our own refusal, which says where it was asked for
                raise BadInput(answer["reason"])
            raise UserCodeError(answer["reason"]) from Remote(answer["trace"])
        if timed:
            self.say("pace", seconds_per_step=answer["pace"], workers=self.pool.size)

    def _asked(self, message: Message) -> Message | Lost:
        self.pool.begin(_REHEARSAL, message)
        while True:
            for _, answer in self.pool.messages(1.0):
                return answer

    def begin(self, asked: Mapping[str, Any]) -> None:
        """Plan the race, or see that the one that is here is the one that was asked for."""
        if self.record.plan is not None:
            agree(asked, self.record.plan)
        else:
            self.held.write("race.json", _json(asked))
            self.say("race", **asked)
        if not self.record.ended:
            self.say("open", pid=os.getpid(), workers=self.pool.size, resumed=bool(self.record.verdicts))

    def run(self) -> Standings:
        """Hand out jobs until the deciders know enough."""
        self._tidy(decide(self.record), deep=True)
        while not (decision := self._decided()).finished:
            for job in decision.jobs:
                if len(self.pool.busy) == self.pool.size:
                    break
                if job not in self.pool.busy:
                    self.pool.begin(job, assignment(self.record, job))
            for job, message in self.pool.messages(1.0):
                self._heard(job, message)
        return self._finish()

    def _decided(self) -> Decision:
        """What the deciders say; cuts are told to the readers of the journal once."""
        decision = decide(self.record)
        for cut in decision.cuts:
            if cut.rung not in self.record.announced:
                self.say("cut", rung=cut.rung, order=list(cut.order), kept=list(cut.kept))
        if decision.finalists is not None and "finalists" not in self.record.announced:
            self.say("finalists", trials=list(decision.finalists))
        return decision

    def _heard(self, job: Job, message: Message | Lost) -> None:
        if isinstance(message, Lost):
            attempt = self.record.deaths.get(job, 0) + 1
            reason = f"its worker was lost: {message.reason}"
            if attempt >= ATTEMPTS[message.by]:
                self.say("failed", **job.data(), reason=reason, trace=message.printed)
            else:
                self.say("lost", **job.data(), attempt=attempt, reason=reason)
            return
        kind = message.pop("kind")
        if kind == "refused":
            raise BadInput(message["reason"])
        run = (job.trial, job.repeat, message.get("run", "branch"))
        before = self.record.newest.get(run)
        self.say(kind, **{**job.data(), **message})
        if before is not None and self.record.newest.get(run) is not before:
            remove(self.trials / folder(job) / before["checkpoint"])
        if kind in ("judged", "final", "failed"):
            self._tidy(decide(self.record))

    def _tidy(self, decision: Decision, deep: bool = False) -> None:
        """Remove checkpoints of trials that are out; `deep`, while nobody works, also unacknowledged ones."""
        alive = {folder(job) for job in decision.jobs}
        alive |= {folder(Job(None, None, trial)) for trial in decision.runners}
        known = {(folder(Job.of(event)), event["checkpoint"]) for event in self.record.newest.values()}
        for trial in sorted(self.trials.iterdir()) if self.trials.is_dir() else ():
            if trial.name not in alive:
                shutil.rmtree(trial, ignore_errors=True)
            elif deep:
                for checkpoint in sorted(trial.iterdir()):
                    if (trial.name, checkpoint.name) not in known:
                        shutil.rmtree(checkpoint, ignore_errors=True)

    def _finish(self) -> Standings:
        table = standings(self.record)
        data = table.json()
        if not self.record.ended or not (self.held.path / "standings.json").exists():
            shutil.rmtree(self.trials, ignore_errors=True)
            self.held.write("winner.toml", table.winner_text.encode())
            self.held.write("times.json", _json(_times(read(self.journal.path))))
            self.held.write("standings.json", data)
        if not self.record.ended:
            self.say("end", standings=hashlib.sha256(data).hexdigest())
        return table


def _times(events: Sequence[Event]) -> dict[str, Any]:
    """What the clock said, kept out of the standings: seconds of the race, and of computing."""
    trials: dict[str, float] = {}
    for event in events:
        if event["kind"] in ("judged", "final"):
            name = str(event["trial"])
            trials[name] = trials.get(name, 0.0) + event["seconds"]
    return {
        "seconds": events[-1]["time"],
        "computing": sum(trials.values()),
        "sessions": [event["workers"] for event in events if event["kind"] == "open"],
        "trials": trials,
    }


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
