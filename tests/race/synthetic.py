"""Journals of races that were never run: every event as a real race writes it, from made-up curves. For
tests and for looking.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from downslope.race.budget import Length, ladder
from downslope.race.decide import decide
from downslope.race.record import Job, Record

RULES = {"sgd": 0.1, "momentum": 0.01, "nesterov": 0.01, "adagrad": 0.01, "rmsprop": 1e-3, "adam": 1e-3}
RULES |= {"adamw": 1e-3, "lion": 1e-4}
STEPS = 340
Event = dict[str, Any]
Truth = Callable[[Job], Event]


def plan(
    rates: int = 5, seeds: int = 5, rules: Iterable[str] = tuple(RULES), names: int = 1, **more: Any
) -> Event:
    """The `race` event: `rates` learning rates for each rule, each trial under `names` names, AdamW as the
    baseline.
    """
    entries = [
        (rule, RULES[rule] * 10 ** ((k - rates // 2) / 2), "grid") for k in range(rates) for rule in rules
    ]
    trials = [
        _trial(number, rule, lr, origin, names)
        for number, (rule, lr, origin) in enumerate([*entries, ("adamw", 1e-3, "baseline")])
    ]
    rungs = ladder(len(entries), Fraction(1, 4), 3, 3)
    return {
        "kind": "race",
        "task": "digits-cnn",
        "task_name": "digits-cnn",
        "metric": "accuracy",
        "higher_is_better": True,
        "target": 0.97,
        "sizes": {"train": 1077, "valid": 360, "test": 360},
        "seed": 0,
        "seeds": seeds,
        "budget": "20x",
        "versions": {"downslope": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "finalists": 3,
        "baseline": len(entries),
        "rungs": [
            {"rung": k, "fraction": str(rung.fraction), "runners": rung.runners}
            for k, rung in enumerate(rungs)
        ],
        "trials": trials,
        **more,
    }


def _trial(number: int, rule: str, lr: float, origin: str, names: int) -> Event:
    name = f"{rule} {lr:.2g}" if origin == "grid" else "AdamW, default"
    recipe = f'steps = {STEPS}\nbatch_size = 64\n\n[[chain]]\npart = "{rule}"\nlr = {lr!r}\n'
    return {
        "trial": number,
        "names": [name, *(f"{name} again {k}" for k in range(1, names))],
        "rule": rule,
        "lr": lr,
        "family": rule,
        "origin": origin,
        "steps": STEPS,
        "warmup": 17 if origin == "grid" else 0,
        "cooldown": 68 if origin == "grid" else 0,
        "end": 0.0,
        "trunk": {"schedule": "constant", "peak": lr, "warmup": 17 if origin == "grid" else 0},
        "recipe": recipe,
        "hash": f"{number:064x}",
    }


def truth(seed: int, race: Event) -> Truth:
    """What each job would come to: a fixed function of seed and job, with divergence at high rates and a
    coarse accuracy.
    """

    def verdict(job: Job) -> Event:
        trial = race["trials"][job.trial]
        dice = random.Random(f"{seed} {job}")
        off = math.log10(trial["lr"] / RULES[trial["rule"]])
        length = 1.0 if job.rung is None else float(Fraction(race["rungs"][job.rung]["fraction"]))
        if off > 0.9 and dice.random() < 0.7:
            return {"outcome": "diverged", "loss": math.nan, "metric": 0.1}
        error = (0.01 + 0.03 * off * off + list(RULES).index(trial["rule"]) * 0.001) * (1.6 - 0.6 * length)
        metric = round((1 - min(0.9, error + dice.gauss(0, 0.004))) * 360) / 360
        return {"outcome": "ok", "loss": -math.log(max(metric - 0.005, 0.1)), "metric": min(metric, 1.0)}

    return verdict


def result(job: Job, race: Event, outcome: Event) -> list[Event]:
    """The events of one finished job: its segments, then its verdict."""
    trial = race["trials"][job.trial]
    final = job.rung is None
    ends = [Length(STEPS, 17, 68).rung(Fraction(rung["fraction"])) for rung in race["rungs"]]
    if job.rung is None:
        pieces = [("final", 0, STEPS)]
    else:
        start = ends[job.rung - 1][0] if job.rung else 0
        pieces = [("trunk", start, ends[job.rung][0]), ("branch", *ends[job.rung])]
    segments = [_segment(job, trial, outcome, *piece) for piece in pieces]
    seconds = segments[-1]["curve"]["seconds"][-1]
    tail = {"step": pieces[-1][2], "seconds": seconds, **outcome}
    if not final:
        return [*segments, {"kind": "judged", "trial": job.trial, "rung": job.rung, **tail}]
    assert job.repeat is not None
    test = {"test_loss": outcome["loss"] + 0.01, "test_metric": outcome["metric"] - 0.01}
    return [*segments, {"kind": "final", **job.data(), "seed": 1 + job.repeat, **tail, **test}]


def _segment(job: Job, trial: Event, outcome: Event, run: str, start: int, end: int) -> Event:
    steps = [*range(start, end, 2), end]
    sick = outcome["outcome"] == "diverged"
    loss = [2.3 * math.exp(-step / 60) + 0.05 + (math.inf if sick and step > 40 else 0.0) for step in steps]
    rates = [trial["lr"] * min(1.0, (step + 1) / 18) for step in steps]
    if run == "branch":
        rates = [trial["lr"] * (end - step) / (end - start) for step in steps]
    seconds = [step * 0.004 for step in steps]
    valid = {"step": end, "loss": outcome["loss"], "metric": outcome["metric"], "seconds": seconds[-1]}
    return {
        "kind": "segment",
        **job.data(),
        "run": run,
        "start": start,
        "end": end,
        "curve": {"step": steps, "loss": loss, "lr": rates, "seconds": seconds},
        "valid": valid,
        "checkpoint": f"{run}-{end:09d}",
        "sha": "0" * 64,
    }


def run(race: Event, verdict: Truth, order: random.Random | None = None, workers: int = 1) -> list[Event]:
    """The events of a whole race in which up to `workers` jobs are under way and finish in the order the
    dice say.
    """
    order = order or random.Random(0)
    events: list[Event] = [{"kind": "open", "pid": 1, "workers": workers, "resumed": False}, race]
    record = Record.of(events)
    said: set[object] = set()
    while True:
        decision = decide(record)
        for cut in decision.cuts:
            if cut.rung not in said:
                said.add(cut.rung)
                events.append({"kind": "cut", "rung": cut.rung, "order": [*cut.order], "kept": [*cut.kept]})
        if decision.finalists is not None and "finalists" not in said:
            said.add("finalists")
            events.append({"kind": "finalists", "trials": [*decision.finalists]})
        if decision.finished:
            return [*events, {"kind": "end", "standings": "0" * 64}]
        job = order.choice(decision.jobs[:workers])
        for event in result(job, race, verdict(job)):
            events.append(event)
            record.take(event)


def journal(seed: int = 0, **more: Any) -> list[Event]:
    """The events of one whole made-up race, with `seq`, `kind` and `time` as the journal reads them back."""
    race = plan(**more)
    events = run(race, truth(seed, race), random.Random(seed), workers=2)
    return [{"seq": number, "time": 0.1 * number, **event} for number, event in enumerate(events)]
