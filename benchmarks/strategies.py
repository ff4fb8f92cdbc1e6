"""What each strategy changes: a task's recipe with one change against the same recipe without it.

    python benchmarks/strategies.py --out FOLDER [--tasks …] [--strategies …] [--seeds 10] [--json]

Both are trained equally long, on the same split of the data, from the same first weights, in the same order
of samples: such pairs are made for seeds 0, 1, … Every training that has ended is a line in
FOLDER/curves.jsonl, on disk before the next begins, with validations along the way: after a stop the same
command goes on, and at most one training is lost. A line counts for the very recipe it was trained by, and
for no other; of the code it knows nothing, so take a new FOLDER when that has changed. `--seeds 0` trains
nothing, and shows what is there. Numbers are those of the test part, which chose nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput, nearest
from downslope.journal import Journal, read
from downslope.race.statistics import Difference, paired
from downslope.rules import Part
from downslope.train import Training

TASKS: Mapping[str, str | None] = {
    "digits-cnn": None,
    "digits-resnet": "10 epochs",
    "chars-transformer": "2 epochs",
}
"""The length of the recipe on a task where it is not the task's own, to be done in a night of one core."""

SAME = "(the recipe itself)"
POINTS = 10
"""Validations along a training."""

cached = cache(ds.task)
FEWEST = 5
"""Pairs below which nothing is concluded: equal differences of accuracy would look like certainty."""

Make = Callable[[ds.Recipe], ds.Recipe]


@dataclass(frozen=True)
class Change:
    """One change to a recipe. `off`: why it is left out of a task; `against`: the change that it is compared
    with, where that is not the recipe itself.
    """

    make: Make
    off: Mapping[str, str] = field(default_factory=dict)
    against: str = SAME


def also(*chosen: st.Strategy, **changes: Any) -> Make:
    """With strategies."""
    return lambda recipe: recipe.with_(strategies=[*recipe.strategies.values(), *chosen], **changes)


def before(part: Any) -> Make:
    """With a link that sees the gradient first."""
    return lambda recipe: recipe.with_(chain=ds.chain(part, *recipe.chain.parts))


def behind(part: Any, **changes: Any) -> Make:
    """With a link that sees what the rule made."""
    return lambda recipe: recipe.with_(chain=ds.chain(*recipe.chain.parts, part)).with_(**changes)


def rate(make: Callable[[float], Any], **changes: Any) -> Make:
    """With another learning rate, made of the recipe's highest."""
    return lambda recipe: recipe.with_(lr=make(recipe.chain.defaults["lr"].peak), **changes)


def by(rule: Any, times: float, **numbers: Any) -> Make:
    """With another rule, links and shape of the schedule as before; its rate is adamw's `times` this, and its
    decay over this, so that what is decayed in a step stays.
    """

    def make(recipe: ds.Recipe) -> ds.Recipe:
        parts = [_other(part, rule, times, numbers) for part in recipe.chain.parts]
        return recipe.with_(chain=ds.chain(*(one for some in parts for one in some)))

    return make


def _other(part: Part, rule: Any, times: float, numbers: Mapping[str, Any]) -> list[Any]:
    if part.rule.kind != "rule":
        return [part]
    lr, decay = part.numbers["lr"].scaled(times), part.numbers["weight_decay"] / times
    if "weight_decay" in rule.numbers:
        return [rule(lr=lr, weight_decay=decay, **numbers)]
    return [rule(lr=lr, **numbers), ds.decay(decay)]


def steady(peak: float) -> ds.Schedule:
    """The highest rate throughout, after the warmup."""
    return ds.constant(peak, warmup="5 %")


def matrices(rule: Any) -> Make:
    """With another rule for the weights of hidden layers."""

    def make(recipe: ds.Recipe) -> ds.Recipe:
        return recipe.with_(route=dict.fromkeys(("matrix", "conv"), by(rule, 1.0)(recipe).chain))

    return make


def halfway(recipe: ds.Recipe) -> ds.Recipe:
    """With momentum from the middle on, whose rate goes on from what adamw's steps are worth."""
    peak = recipe.chain.defaults["lr"].peak
    to = ds.momentum(lr=ds.cosine(30 * peak, steps="100 %"))
    return also(st.switch(at="50 %", to=to))(recipe)


TOKENS = {"chars-transformer": "inputs and targets are tokens"}
NO_BATCHNORM = {"chars-transformer": "the model has no BatchNorm"}
UNBRANCHED = {"digits-cnn": "the model has no residual branches"}
CLIPPED = {"chars-transformer": "the recipe has it already"}
FALLING = {"steps": "100 %", "warmup": "5 %"}
BRANCHES = tuple(f"{place}.body" for place in range(3, 9))

CHANGES: Mapping[str, Change] = {
    "guard off (control)": Change(lambda recipe: recipe.with_(guard=False)),
    "micro-batches of 8": Change(also(st.micro(items=8))),
    "rate × 3": Change(rate(lambda peak: ds.cosine(3 * peak, **FALLING))),
    "rate / 3": Change(rate(lambda peak: ds.cosine(peak / 3, **FALLING))),
    "constant": Change(rate(steady)),
    "ema 0.99 on constant": Change(
        rate(steady, strategies=[st.average(decay=0.99, warmup="ratio")]),
        against="constant",
    ),
    "ema 0.99": Change(also(st.average(decay=0.99, warmup="ratio"))),
    "swa of the last quarter": Change(also(st.average(kind="swa", start="75 %", every=10))),
    "mixup 0.2": Change(also(st.mix(mixup=0.2)), TOKENS),
    "cutmix 1.0": Change(also(st.mix(mixup=0, cutmix=1.0)), TOKENS),
    "label smoothing 0.1": Change(
        also(st.smoothing(share=0.1)), {"chars-transformer": "the loss takes ids of tokens only"}
    ),
    "stochastic depth 0.2": Change(
        also(st.depth(branches=BRANCHES, rate=0.2)),
        UNBRANCHED | {"chars-transformer": "the branches named are the residual network's"},
    ),
    "sam 0.05": Change(before(ds.sam(0.05))),
    "momentum": Change(by(ds.momentum, 30.0)),
    "lion": Change(by(ds.lion, 0.1)),
    "muon for matrices": Change(matrices(ds.muon_rms)),
    "schedule-free adamw": Change(lambda recipe: by(ds.schedule_free_adamw, 1.0)(rate(steady)(recipe))),
    "early stopping": Change(also(st.stop(patience=5), observe="30 steps")),
    "layer-wise rates 0.8": Change(also(st.rates(decay=0.8))),
    "gradual unfreezing": Change(also(st.freeze(every="5 %"))),
    "group norm": Change(also(st.normalisation(to="group", groups=4)), NO_BATCHNORM),
    "ghost batches of 8": Change(also(st.normalisation(to="ghost", size=8)), NO_BATCHNORM),
    "orthogonal start": Change(also(st.start(method="orthogonal"))),
    "lsuv start": Change(also(st.start(lsuv=True))),
    "residual branches at zero": Change(also(st.start(zero_residual=True)), UNBRANCHED),
    "clip_norm 1": Change(before(ds.clip_norm(1.0)), CLIPPED),
    "agc 0.01": Change(before(ds.agc(0.01))),
    "gradient noise": Change(before(ds.noise(1e-4))),
    "no decay": Change(lambda recipe: recipe.with_(weight_decay=0.0)),
    "decay × 10": Change(
        lambda recipe: recipe.with_(weight_decay=10 * recipe.chain.defaults["weight_decay"])
    ),
    "l2 1e-4 in place of decay": Change(
        lambda recipe: before(ds.l2(1e-4))(recipe.with_(weight_decay=0.0)), against="no decay"
    ),
    "l1 1e-5": Change(behind(ds.l1(1e-5))),
    "cautious": Change(behind(ds.cautious())),
    "lookahead": Change(behind(ds.lookahead(every=5, blend=0.5))),
    "linear": Change(rate(lambda peak: ds.linear(peak, **FALLING))),
    "one_cycle": Change(rate(lambda peak: ds.one_cycle(peak, steps="100 %"))),
    "wsd": Change(rate(lambda peak: ds.wsd(peak, **FALLING))),
    "cosine_restarts": Change(rate(lambda peak: ds.cosine_restarts(peak, every="32 %", warmup="5 %"))),
    "plateau": Change(
        rate(lambda peak: ds.plateau(peak, factor=0.3, patience=3, warmup="5 %"), observe="30 steps")
    ),
    "no warmup": Change(rate(lambda peak: ds.cosine(peak, steps="100 %"))),
    "switch to momentum half-way": Change(halfway),
}
"""Every change by name, in the order in which they are measured. None was tuned."""

ELSEWHERE = {
    "teacher": "measured by benchmarks/distillation.py",
    "dropout": "none of the three models has a dropout layer",
    "spikes": "none of the three trainings has any; tests/strategies/test_spikes.py plants them",
    "growth": "its updates see more data than those of the recipe without it",
    "escape": "for a loss that stands still at a saddle, see tests/strategies/test_escape.py",
    "restart": "for small models with bad minima, see tests/strategies/test_restart.py",
}
"""Strategies that no change takes."""


@dataclass(frozen=True)
class Pair:
    """A change on a task. `theirs` and `ours` are the recipes without it and with it."""

    task: str
    name: str

    @property
    def change(self) -> Change:
        """The change itself; that to nothing, where there is none."""
        return CHANGES.get(self.name) or Change(lambda recipe: recipe)

    @property
    def ours(self) -> ds.Recipe:
        """With the change."""
        steps, recipe = TASKS[self.task], cached(self.task).recipe
        return self.change.make(recipe if steps is None else recipe.with_(steps=steps))

    @property
    def theirs(self) -> Pair:
        """What it is compared with."""
        return Pair(self.task, self.change.against)


def trained(pair: Pair, seed: int) -> dict[str, Any]:
    """One training as plain data: validations along the way, and what it ended with, or why it failed."""
    state = Training(cached(pair.task, seed), pair.ours, seed=seed, threads=1)
    curve = []
    try:
        for point in range(1, POINTS + 1):
            state.advance(state.steps * point // POINTS)
            curve.append([state.step, state.evaluate().metric])
        state.finish()
    except BadInput as error:
        return {"curve": curve, "failed": str(error)}
    return {"curve": curve, "steps": state.step, **{part: state.evaluate(part).metric for part in PARTS}}


PARTS = ("valid", "test")


def cost(pair: Pair, blocks: int = 11, steps: int = 8) -> float:
    """CPU time of a step over that of a step without the change: the median of blocks taken in turn."""
    task = cached(pair.task)
    both = [Training(task, one.ours, threads=1) for one in (pair, pair.theirs)]
    ratios = []
    for _ in range(blocks):
        ours, theirs = (_seconds(state, steps) for state in both)
        ratios.append(ours / theirs)
    return statistics.median(ratios[1:])  # the first block compiles


def _seconds(state: Training, steps: int) -> float:
    start = time.process_time()
    state.advance(state.step + steps)
    return time.process_time() - start


@dataclass(frozen=True)
class Table:
    """What is known of every training, by task, seed and hash of the recipe, and of every cost."""

    events: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, path: Path) -> Table:
        """What a journal holds, which may not be there yet."""
        return cls(tuple(read(path)) if path.exists() else ())

    def runs(self, pair: Pair) -> dict[int, dict[str, Any]]:
        """Trainings by seed."""
        return {one["seed"]: one for one in self._of("run", pair)}

    def cost(self, pair: Pair) -> float | None:
        """Of a step, as a ratio."""
        against = pair.theirs.ours.hash
        found = [one["ratio"] for one in self._of("cost", pair) if one["against"] == against]
        return found[-1] if found else None

    def _of(self, kind: str, pair: Pair) -> list[dict[str, Any]]:
        recipe = pair.ours.hash
        return [
            one
            for one in self.events
            if (one["kind"], one["task"], one["recipe"]) == (kind, pair.task, recipe)
        ]


@dataclass(frozen=True)
class Row:
    """What a change was measured to do. `gain` is in the metric of the test part, positive if it is better;
    `sure` is its interval widened to hold for all changes of the task at once. None: not run, or diverged.
    """

    pair: Pair
    seeds: int
    without: float | None = None
    gain: Difference | None = None
    sure: Difference | None = None
    cost: float | None = None
    failed: int = 0

    @classmethod
    def of(cls, table: Table, pair: Pair) -> Row:
        """The row of a change, from the seeds that both sides have."""
        ours, theirs = table.runs(pair), table.runs(pair.theirs)
        seeds = sorted(ours.keys() & theirs.keys())
        if failed := sum("failed" in runs[seed] for runs in (ours, theirs) for seed in seeds):
            return cls(pair, len(seeds), failed=failed)
        if not seeds:
            return cls(pair, 0)
        a, b = ([runs[seed]["test"] for seed in seeds] for runs in (ours, theirs))
        higher = cached(pair.task).higher_is_better
        of = partial(paired, *((a, b) if higher else (b, a)))
        widened = of(comparisons=len(changes(pair.task)))
        return cls(pair, len(seeds), statistics.fmean(b), of(), widened, table.cost(pair))

    @property
    def verdict(self) -> str:
        """In words: "better" and "worse" hold for all rows of the task at once, "perhaps …" for one alone."""
        if self.failed:
            return f"diverged: {self.failed} trainings"
        if self.gain is None or self.sure is None:
            return "not run"
        if self.seeds < FEWEST:
            return "too few seeds"
        if self.gain.tied:
            return "no effect shown"
        return f"{'perhaps ' * self.sure.tied}{'better' if self.gain.mean > 0 else 'worse'}"

    def __str__(self) -> str:
        against = "" if self.pair.theirs.name == SAME else f" (against {self.pair.theirs.name})"
        cells = [f"{self.pair.name}{against}", str(self.seeds)]
        if self.gain is None or self.without is None:
            cells += [""] * 4
        else:
            low, high = self.gain.low, self.gain.high
            known = low is not None and high is not None
            cells += [
                f"{self.without:.4f}",
                f"{self.gain.mean:+.4f}",
                f"{low:+.4f} to {high:+.4f}" if known else "too few seeds",
                "" if self.cost is None else f"{self.cost:.2f}",
            ]
        return f"| {' | '.join([*cells, self.verdict])} |"

    def data(self) -> dict[str, Any]:
        """As plain data."""
        gain = self.gain
        return {
            "task": self.pair.task,
            "strategy": self.pair.name,
            "against": self.pair.theirs.name,
            "seeds": self.seeds,
            "without": self.without,
            "gain": gain and gain.mean,
            "interval": gain and [gain.low, gain.high],
            "widened": self.sure and [self.sure.low, self.sure.high],
            "cost": self.cost,
            "verdict": self.verdict,
        }


def changes(task: str) -> list[str]:
    """Those that are measured on a task."""
    return [name for name, change in CHANGES.items() if task not in change.off]


def work(tasks: list[str], names: list[str], seeds: int) -> Iterator[tuple[Pair, int]]:
    """Trainings, all seeds of one change before the next; what a change is compared with comes before it."""
    for task in tasks:
        needed = [one for name in names for one in (CHANGES[name].against, name)]
        for name in dict.fromkeys([SAME, *needed]):
            if name == SAME or name in changes(task):
                yield from ((Pair(task, name), seed) for seed in range(seeds))


def measure(path: Path, tasks: list[str], names: list[str], seeds: int) -> None:
    """Train what the journal lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    planned = list(work(tasks, names, seeds))
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Journal.open(path) as journal, Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(planned))
        for pair, seed in planned:
            progress.update(bar, description=f"{pair.task}: {pair.name}, seed {seed}")
            known, about = Table.of(path), {"task": pair.task, "strategy": pair.name}
            about["recipe"] = pair.ours.hash
            if seed not in known.runs(pair):
                journal.append("run", **about, seed=seed, **trained(pair, seed))
            if seed == 0 and pair.name != SAME and known.cost(pair) is None:
                journal.append("cost", **about, against=pair.theirs.ours.hash, ratio=cost(pair))
            progress.advance(bar)


HEAD = "| change | seeds | without | gain | 95 % interval | time of a step | so |"


def markdown(rows: list[Row]) -> str:
    """A table a task, and what was left out of it."""
    lines = []
    for task in dict.fromkeys(row.pair.task for row in rows):
        whole, own = cached(task), TASKS[task]
        length = f"{own} instead of {whole.recipe.steps}" if own else f"{whole.recipe.steps}, the task's own"
        lines += [f"## {task}", "", f"{whole.metric_name} on the test part; {length}.", ""]
        found = [str(row) for row in rows if row.pair.task == task and row.seeds]
        lines += [HEAD, "|---|--:|--:|--:|---|--:|---|", *found] if found else ["Nothing was run."]
        left = [row.pair.name for row in rows if row.pair.task == task and not row.seeds]
        off = [f"{name} ({change.off[task]})" for name, change in CHANGES.items() if task in change.off]
        lines += ["", f"Not run: {', '.join(left)}."] if left else []
        lines += ["", f"Do not apply: {'; '.join(off)}."] if off else []
        lines += [""]
    return "\n".join([*lines, *(f"`{name}`: {why}." for name, why in ELSEWHERE.items())])


def _asked() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("--out", type=Path, required=True, help="the folder of curves.jsonl")
    asked.add_argument("--tasks", nargs="+", default=list(TASKS))
    asked.add_argument(
        "--strategies", nargs="+", default=list(CHANGES), help=f"of {'; '.join(CHANGES)}".replace("%", "%%")
    )
    asked.add_argument("--seeds", type=int, default=10)
    asked.add_argument("--markdown", action="store_true", help="print the tables of the docs (the default)")
    asked.add_argument("--json", action="store_true", help="print a row a line")
    given = asked.parse_args()
    for what, names, known in (("task", given.tasks, TASKS), ("strategy", given.strategies, CHANGES)):
        for name in names:
            if name not in known:
                raise BadInput(
                    f"there is no {what} {name!r}.{nearest(name, known)} There are: {', '.join(known)}."
                )
    if given.seeds < 0:
        raise BadInput(f"--seeds must be a whole number from 0, got {given.seeds}.")
    return given


def main() -> None:
    """Measure, and print the table."""
    given = _asked()
    path = given.out / "curves.jsonl"
    if given.seeds:
        measure(path, given.tasks, given.strategies, given.seeds)
    table = Table.of(path)
    rows = [
        Row.of(table, Pair(task, name))
        for task in given.tasks
        for name in given.strategies
        if name in changes(task)
    ]
    if given.json:
        print("\n".join(json.dumps(row.data()) for row in rows))
    else:
        print(markdown(rows))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(str(error))
