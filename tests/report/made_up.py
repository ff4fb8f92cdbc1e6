"""Journals of races and trainings that never were: right in form, so that a page can be drawn from them."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from downslope.journal import Journal

RULES = {
    "sgd": 0.3,
    "momentum": 0.06,
    "nesterov": 0.06,
    "adagrad": 0.03,
    "rmsprop": 0.001,
    "adam": 0.002,
    "adamw": 0.003,
    "lion": 0.0004,
}
RUNGS = ((0, "1/4", 24), (1, "1/2", 8), (2, "1", 4))
STEPS = 400
SEEDS = 5


def recipe(rule: str, lr: float, extra: str = "") -> str:
    return (
        f'# {rule}, raced on digits-cnn\nsteps = 20\n\n[[chain]]\npart = "clip_norm"\n'
        f'max_norm = 1.0\n\n[[chain]]\npart = "{rule}"\nlr = {{ schedule = "cosine", peak = {lr:g}, '
        f'steps = "100 %", warmup = "5 %" }}\nweight_decay = 0.01\n{extra}[roles.norm]\nweight_decay = 0\n'
    )


class Race:
    """A made-up race. `text` stands in every place where a journal holds words of the user's."""

    def __init__(self, folder: Path, text: str = "", *, finished: bool = True, copies: int = 1) -> None:
        self.folder, self.text, self.random = folder, text, Random(3)
        folder.mkdir(parents=True, exist_ok=True)
        self.trials = [
            {
                "trial": 3 * i + j,
                "names": [f"{rule}-{lr:g}{text}"],
                "rule": rule + text,
                "lr": lr,
                "family": rule,
                "origin": "baseline" if rule == "adamw" and j == 0 else "grid",
                "steps": STEPS,
                "warmup": 20,
                "cooldown": 40,
                "recipe": recipe(rule, lr, f"# {text}\n" if text.isprintable() else ""),
                "hash": "0" * 64,
            }
            for i, (rule, best) in enumerate([*RULES.items()] * copies)
            for j, lr in enumerate((best / 5, best, best * 5))
        ]
        self.skill = {
            trial["trial"]: 0.97 - 0.02 * abs(i % 3 - 1) * (1 + i % 2) - 0.004 * abs(i // 3 - 6)
            for i, trial in enumerate(self.trials)
        }
        with Journal.open(folder / "journal.jsonl") as self.journal:
            self._write(finished)

    def _write(self, finished: bool) -> None:
        text = self.text
        self.journal.append(
            "race",
            sync=False,
            task="digits-cnn" + text,
            task_name="digits-cnn" + text,
            metric="accuracy" + text,
            higher_is_better=True,
            target=0.98,
            sizes={"train": 1077, "valid": 360, "test": 360},
            seed=0,
            seeds=SEEDS,
            budget="20x" + text,
            versions={"downslope": "0.1.0", "torch": "2.13.0", "python": "3.11.7" + text},
            finalists=3,
            baseline=18,
            rungs=[{"rung": r, "fraction": f, "runners": n} for r, f, n in RUNGS],
            trials=self.trials,
        )
        running = [t["trial"] for t in self.trials]
        before = 0
        for rung, fraction, _ in RUNGS:
            step = round(Fraction(fraction) * STEPS)
            for trial in running:
                self._trunk(trial, rung, before, step - 10)
                self._judged(trial, rung, step)
            before = step - 10
            running.sort(key=lambda t: -self.skill[t])
            kept = [8, 4, 3][rung]
            self.journal.append("cut", sync=False, rung=rung, order=running, kept=running[:kept])
            running = running[:kept]
            if not finished:
                return
        self.journal.append(
            "failed", sync=False, trial=2, rung=1, repeat=None, reason=f"sgd lost its way{text}"
        )
        self._finals([*running, 18])

    def _curve(self, trial: int, start: int, end: int, repeat: int | None = None) -> dict[str, list[float]]:
        steps = list(range(start, end, 4))
        speed = 1 + 5 * max(0.0, self.skill[trial] - 0.9)
        losses = [
            2.3 * math.exp(-0.012 * speed * s) + 0.02 + 0.01 * self.random.random() * (1 + 40 / (s + 5))
            for s in steps
        ]
        if trial == 2:
            losses = [2.3 * math.exp(0.4 * i) if i < 60 else math.nan for i, _ in enumerate(steps)]
        return {
            "step": steps,
            "loss": losses,
            "lr": [0.1] * len(steps),
            "seconds": [0.011 * s for s in steps],
        }

    def _trunk(self, trial: int, rung: int, start: int, end: int) -> None:
        self.journal.append(
            "segment",
            sync=False,
            trial=trial,
            run="trunk",
            rung=rung,
            repeat=None,
            start=start,
            end=end,
            curve=self._curve(trial, start, end),
            valid=None,
            checkpoint="step-000000123",
            sha="0" * 64,
        )

    def _judged(self, trial: int, rung: int, step: int) -> None:
        metric = self.skill[trial] - 0.06 * (2 - rung) + 0.01 * self.random.random()
        self.journal.append(
            "judged",
            sync=False,
            trial=trial,
            rung=rung,
            step=step,
            loss=math.nan if trial == 2 else 0.4 * (1 - metric) * 4,
            metric=math.nan if trial == 2 else metric,
            seconds=0.011 * step,
            outcome="diverged" if trial == 2 else "ok",
        )

    def _finals(self, finalists: list[int]) -> None:
        self.journal.append("finalists", sync=False, trials=finalists)
        results: dict[int, list[float]] = {trial: [] for trial in finalists}
        for trial in finalists:
            for repeat in range(SEEDS):
                metric = (
                    self.skill[trial] + 0.012 + 0.004 * Random(repeat).random() + 0.006 * self.random.random()
                )
                results[trial].append(metric)
                self.journal.append(
                    "segment",
                    sync=False,
                    trial=trial,
                    run="final",
                    rung=None,
                    repeat=repeat,
                    start=0,
                    end=STEPS,
                    curve=self._curve(trial, 0, STEPS, repeat),
                    valid={"step": STEPS // 2, "loss": 0.2, "metric": metric - 0.03, "seconds": 2.2},
                    checkpoint=None,
                    sha=None,
                )
                self.journal.append(
                    "final",
                    sync=False,
                    trial=trial,
                    repeat=repeat,
                    seed=1000 + repeat,
                    step=STEPS,
                    loss=4 * (1 - metric),
                    metric=metric,
                    test_loss=0.1,
                    test_metric=metric - 0.005,
                    seconds=4.4,
                    outcome="ok",
                )
        standings = self._standings(results)
        (self.folder / "standings.json").write_bytes(standings)
        self.journal.append("end", standings=hashlib.sha256(standings).hexdigest())

    def _standings(self, results: dict[int, list[float]]) -> bytes:
        means = {trial: sum(values) / len(values) for trial, values in results.items()}
        order = sorted(means, key=lambda t: -means[t])
        rows = []
        for rank, trial in enumerate(order, 1):
            difference = means[trial] - means[order[0]]
            low, high = difference - 0.004, difference + 0.004
            rows.append(
                {
                    "rank": rank,
                    "name": self.trials[trial]["names"][0],
                    "trial": trial,
                    "stage": "final",
                    "status": "ok",
                    "metric": means[trial],
                    "metrics": results[trial],
                    "test_metric": means[trial] - 0.005,
                    "difference": difference,
                    "low": None if rank == 1 else low,
                    "high": None if rank == 1 else high,
                    "tied": rank > 1 and high > 0,
                }
            )
        winner = self.trials[order[0]]
        data = {
            "level": 0.95,
            "winner": {"name": winner["names"][0], "trial": order[0], "recipe": winner["recipe"]},
            "rows": rows,
        }
        return json.dumps(data).encode()


TOLD = {
    step: [{"by": "spikes", "did": "skip", "why": "its loss jumped", "facts": {"loss": 10.0 + step}}]
    for step in range(40, 80)
} | {
    step: [{"by": "restart", "did": "start", "why": "at = 25 %", "facts": {"start": start}}]
    for start, step in ((2, 200), (3, 300))
}
GAME = {"critic": (1, 0.005), "maker": (5, 0.001)}


def training(
    folder: Path,
    text: str = "",
    *,
    finished: bool = True,
    steps: int = STEPS,
    players: Mapping[str, tuple[int, float]] = MappingProxyType({}),
    growing: bool = False,
    told: Mapping[int, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
) -> None:
    """A made-up training with two skipped updates; of `players`, each with its cadence and peak rate; by
    batches that grow; in which strategies `told` this, by step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(recipe("adamw", 0.003, f"# {text}\n"), "utf-8")
    random = Random(5)
    with Journal.open(folder / "journal.jsonl") as journal:
        journal.append(
            "start",
            task="digits-cnn" + text,
            recipe="0" * 64,
            seed=0,
            steps=steps,
            metric="accuracy" + text,
            higher_is_better=True,
        )
        for step in range(1, steps + 1):
            lr = 0.003 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            loss = 2.3 * math.exp(-0.015 * step) + 0.02 + 0.03 * random.random()
            moves = {
                name + text: {"loss": loss * (place + 1), "lr": peak * lr / 0.003}
                for place, (name, (every, peak)) in enumerate(players.items())
                if step % every == 0
            }
            own = {"loss": sum(move["loss"] for move in moves.values()), "players": moves} if moves else {}
            fields = {"loss": loss, "lr": lr, "seconds": 0.011 * step, **own}
            if growing and step > 100:
                fields["batches"] = step // 50
            for deed in told.get(step, ()):
                journal.append("strategy", sync=False, step=step, **deed)
            journal.append("step", sync=False, step=step, **fields)
            if step in (60, 61):
                journal.append("skip", sync=False, step=step, names=["conv.weight" + text])
            if step % 20 == 0:
                metric = 0.985 - 0.8 * math.exp(-0.02 * step)
                journal.append(
                    "valid", sync=False, step=step, loss=loss + 0.02, metric=metric, seconds=0.011 * step
                )
        if finished:
            result = {"loss": 0.06, "metric": 0.983}
            journal.append("end", step=steps, valid=result, test=result)
