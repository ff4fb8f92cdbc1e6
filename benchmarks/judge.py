"""Which is the better judge of a rung, the loss or the metric on the validation part?

Every recipe of the race's grid is cooled down at a part of its training and judged, by one seed at a time.
Its true worth is the metric of full trainings on other seeds, over validation and test part. Printed is the
rank correlation (Spearman) of judgement and worth, of all recipes and of the better half, where it is hard.

    python benchmarks/judge.py [TASK] [PART]        about 5 minutes of one core for digits-cnn
"""

import sys
from fractions import Fraction

import numpy as np
import torch

import downslope as ds
from downslope.race.planning import Request
from downslope.race.record import Trial

JUDGES, TRUTHS = range(3), range(10, 14)


def trained(task: ds.Task, trial: Trial, seed: int, part: Fraction) -> ds.Training | None:
    """The trial at this part of its training, cooled down; None if it diverged."""
    stop, end = trial.length.rung(part)
    state = ds.Training(task, ds.Recipe.parse(trial.recipe), seed)
    state.optimizer.follow(
        "lr", ds.Schedule.from_data(trial.trunk).cooldown(stop, max(1, end - stop), trial.end)
    )
    try:
        state.advance(end)
    except ds.Diverged:
        return None
    return state


def judgement(task: ds.Task, trial: Trial, seed: int, part: Fraction) -> tuple[float, float]:
    """(loss, metric), both so that smaller is better; infinite if it diverged."""
    state = trained(task, trial, seed, part)
    if state is None:
        return np.inf, np.inf
    loss, metric = state.evaluate("valid")
    return loss, -metric if task.higher_is_better else metric


def worth(task: ds.Task, trial: Trial, seed: int) -> float:
    """The metric of a full training, smaller is better."""
    state = trained(task, trial, seed, Fraction(1))
    if state is None:
        return np.inf
    metric = np.mean([state.evaluate(part).metric for part in ("valid", "test")])
    return float(-metric if task.higher_is_better else metric)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, equal values sharing theirs."""
    ranks = [(x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2 for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main(name: str = "digits-cnn", part: str = "1/4") -> None:
    torch.set_num_threads(1)
    task = ds.task(name)
    field, _ = Request(task, "20x", 5, 0, {}, None).field()
    truth = np.array([np.mean([worth(task, trial, seed) for seed in TRUTHS]) for trial in field])
    better = truth <= np.median(truth)
    print(f"{name}: {len(field)} recipes, judged at {part} of a training by one seed at a time")
    print(f"{'seed':>4} {'loss':>7} {'metric':>7}   better half: {'loss':>7} {'metric':>7}")
    for seed in JUDGES:
        found = np.array([judgement(task, trial, seed, Fraction(part)) for trial in field]).T
        every, half = (
            [spearman(row[mask], truth[mask]) for row in found] for mask in (truth < np.inf, better)
        )
        print(f"{seed:>4} {every[0]:>7.2f} {every[1]:>7.2f} {'':>14} {half[0]:>7.2f} {half[1]:>7.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
