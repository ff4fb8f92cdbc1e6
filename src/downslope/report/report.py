"""From a run folder to its `report.html`: the journal is read, told as a page, drawn, and written whole."""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path

from downslope import journal
from downslope.errors import BadInput
from downslope.folder import read_file, write_file
from downslope.report.events import LARGEST_JSON, Plan, Standings, parse_json
from downslope.report.html import render
from downslope.report.log import Log, latest, read_log
from downslope.report.race import race_page
from downslope.report.text import redact
from downslope.report.training import training_page
from downslope.report.view import Page


def report(folder: str | os.PathLike[str]) -> Path:
    """Draw the race or the training in `folder`; gives the path of its page, `report.html`.

    Also while it runs, and after a crash. BadInput if the folder holds no journal of ours, if the journal or
    the standings are damaged, or if the page cannot be written.

    >>> report("no/such/folder")
    Traceback (most recent call last):
    downslope.errors.BadInput: no/such/folder holds no journal.jsonl: no race or training was run there.
    """
    folder = Path(folder)
    path = folder / "journal.jsonl"
    if not path.is_file():
        raise BadInput(f"{folder} holds no journal.jsonl: no race or training was run there.")
    page = folder / "report.html"
    write_file(page, render(_page(folder, path)).encode())
    return page


def _page(folder: Path, path: Path) -> Page:
    events = journal.read(path)
    if any(event.get("kind") == "start" for event in events):
        return training_page(events, folder)
    log = read_log(events, str(path))
    log.wall = latest(events)
    if log.sealed is not None:
        log.standings = _standings(folder / "standings.json", log)
    return race_page(log, redact(shlex.join(_command(log.plan))))


def _command(plan: Plan) -> list[str]:
    """What was typed, or means the same; the user's own recipes are files whose names nobody noted."""
    own = ["--recipe", "YOURS.toml"] if any(trial.origin == "given" for trial in plan.trials) else []
    seed = ["--seed", str(plan.seed)] if plan.seed else []
    return ["downslope", "race", plan.task, "--budget", plan.budget, "--seeds", str(plan.seeds), *seed, *own]


def _standings(path: Path, log: Log) -> Standings:
    """The standings, if they are those that the journal sealed."""
    data = read_file(path, LARGEST_JSON)
    if log.sealed and hashlib.sha256(data).hexdigest() != log.sealed:
        raise BadInput(
            f"{path} is not what the journal sealed: race again in this folder, and it is made anew."
        )
    standings = parse_json(data, Standings, str(path))
    strangers = {row.trial for row in standings.rows} - log.candidates.keys()
    if strangers:
        raise BadInput(f"{path}: has a row about trial {min(strangers)}, which is not in the plan.")
    return standings
