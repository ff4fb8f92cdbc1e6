"""Distillation, measured: a student with a teacher against the same student without one, seed by seed.

    python benchmarks/distillation.py --out FOLDER [--seeds 10] [digits chars]

Both are trained equally long by one recipe, from the same first weights, in the same order of samples. Every
training is a run in FOLDER: after a stop the same command goes on where it was. Numbers are those of the
test part, which chose nothing: rates, temperatures and shares were chosen on validation, at seeds from 1000.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import downslope as ds
from downslope.race.statistics import Difference, paired
from downslope.strategies import teacher
from downslope.tasks.text import CONTEXT, Transformer

TEACHERS_SEED = 999


def digits_student(seed: int = 0) -> ds.Task:
    """The data of `digits-cnn`; one hidden layer of 8 units, at the rate that is best for it alone."""
    whole = ds.task("digits-cnn", seed)
    return replace(
        whole,
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)),
        recipe=whole.recipe.with_(steps="80 epochs", lr=ds.cosine(1e-2, steps="100 %", warmup="5 %")),
        name="digits-student",
        entry=None,
    )


def chars_student(seed: int = 0) -> ds.Task:
    """The data of `chars-transformer`; two blocks of width 20, at the rate that is best for it alone."""
    whole = ds.task("chars-transformer", seed)
    alphabet = int(whole.train[1].max()) + 1  # type: ignore[index]
    return replace(
        whole,
        model=lambda: Transformer(alphabet, CONTEXT, width=20, heads=2, blocks=2),
        recipe=whole.recipe.with_(lr=ds.cosine(5e-2, steps="100 %", warmup="5 %")),
        name="chars-student",
        entry=None,
    )


@dataclass(frozen=True)
class Pair:
    """A student's task, the task whose finished run teaches it, and how."""

    student: Callable[[], ds.Task]
    teacher: str
    temperature: float
    alpha: float


PAIRS = {
    "digits": Pair(digits_student, "digits-cnn", temperature=1.0, alpha=0.9),
    "chars": Pair(chars_student, "chars-transformer", temperature=1.0, alpha=0.9),
}


@dataclass(frozen=True)
class Row:
    """What was measured of a pair; `better` is the gain in the metric, positive where the teacher helps."""

    pair: Pair
    sizes: tuple[int, int]
    teacher: float
    alone: list[float]
    taught: list[float]
    better: Difference

    def __str__(self) -> str:
        task, pair = self.pair.student(), self.pair
        student, whole = self.sizes
        gains = [b - a for a, b in zip(self.alone, self.taught, strict=True)]
        won = sum(gain * (1 if task.higher_is_better else -1) > 0 for gain in gains)
        low, high = self.better.low, self.better.high
        cells = [
            f"`{pair.teacher}`, {whole:_}".replace("_", " "),
            f"{student:_} ({student / whole:.1%})".replace("_", " "),
            f"T {pair.temperature:g}, alpha {pair.alpha:g}",
            task.metric_name,
            f"{self.teacher:.4f}",
            f"{_mean(self.alone):.4f}",
            f"{_mean(self.taught):.4f}",
            f"{self.better.mean:+.4f}",
            f"{low:+.4f} to {high:+.4f}" if low is not None and high is not None else "too few seeds",
            f"{won} of {len(gains)}",
            "no effect shown" if self.better.tied else "better" if self.better.mean > 0 else "worse",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| teacher, weights | student's weights | by | metric | teacher's | student alone | with teacher | gain "
    "| 95 % interval | better at | so |"
)


def measure(pair: Pair, out: Path, seeds: int) -> Iterator[Row]:
    """The row after each seed."""
    folder = out / pair.teacher
    taught_by = ds.train(pair.teacher, out=folder, seed=TEACHERS_SEED, quiet=True)
    task = pair.student()
    kind = teacher(run=str(folder), temperature=pair.temperature, alpha=pair.alpha)
    recipes = {"alone": task.recipe, "taught": task.recipe.with_(strategies=[kind])}
    found: dict[str, list[float]] = {"alone": [], "taught": []}
    sizes = _size(task.model()), _size(taught_by.model)
    for seed in range(seeds):
        for name, recipe in recipes.items():
            run = ds.train(task, recipe, out=out / task.name / f"{name}-{seed}", seed=seed, quiet=True)
            found[name].append(_test(run))
        print(
            f"{task.name}, seed {seed}: alone {found['alone'][-1]:.4f}, taught {found['taught'][-1]:.4f}",
            flush=True,
        )
        ordered = (
            (found["taught"], found["alone"]) if task.higher_is_better else (found["alone"], found["taught"])
        )
        yield Row(pair, sizes, _test(taught_by), found["alone"], found["taught"], paired(*ordered))


def _test(run: ds.Run) -> float:
    assert run.test is not None
    return run.test.metric


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Measure, and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("pairs", nargs="*", metavar="PAIR", help=f"of {', '.join(PAIRS)}; default: all")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--seeds", type=int, default=10)
    given = arguments.parse_args()
    if unknown := [name for name in given.pairs if name not in PAIRS]:
        arguments.error(f"there is no pair {unknown[0]!r}; there are {', '.join(PAIRS)}.")
    torch.set_num_threads(1)
    rows = {}
    for name in given.pairs or PAIRS:
        for row in measure(PAIRS[name], given.out, given.seeds):
            rows[name] = row
            table = [HEAD, f"|{'---|' * HEAD.count(' | ')}---|", *map(str, rows.values())]
            (given.out / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
