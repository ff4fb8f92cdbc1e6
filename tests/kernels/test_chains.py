"""Chains of any parts agree on every executor: drawn at random, and all pairs of links on two rules."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any

import pytest
import torch
from cases import CASES, FULL, LINK_CASES, MATRICES, Shapes, draw
from executors import buckets_by_kind, stepped_by
from hypothesis import HealthCheck, Phase, example, given, reject, settings
from hypothesis import strategies as st

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when it is imported

import kernels.test_truth as truth

import downslope as ds
from downslope.kernels import cpu, gpu
from downslope.rules import LINKS, RULES, Chain, Part, Rule, chain, trace
from downslope.rules.glossary import term

STEPS = 4
BUCKETS = {"eager": "EagerBucket", "cpu": "CpuBucket", "gpu": "GpuBucket"}
PLAIN: Shapes = ((), (0,), (1,), (7,), (3, 4), (1, 1), (4, 1), (0, 3), (2, 3, 2), (2, 1, 2, 3))

FEW: Shapes = ((), (0,), (7,), (3, 4), (2, 3, 2))

SMOOTH = ("sgd", "momentum", "momentum_textbook", "nesterov")
"""Rules that keep a matrix of full rank one, and numbers that differ apart."""

TYING = {"clip_value", "signsgd", "signum", "lion", "rprop", "sophia", "adopt"}
"""Parts behind which several numbers are often equal: their mean, taken off, leaves what rounding left, and
no two executors round alike.
"""


def compiled(made: Chain) -> bool:
    return cpu.can(trace(made))


def allowed(parts: Sequence[Part]) -> bool:
    """Whether the parts keep a margin from ties and jumps, which only rounding decides."""
    names = [part.name for part in parts]
    for place, name in enumerate(names):
        earlier = names[:place]
        if name == "centralize" and TYING & {*earlier}:
            return False
        if name == "soap" and {*earlier} & {*RULES} - {*SMOOTH}:
            return False
    return not ("gd" in names and names[0] in ("sam", "asam"))  # given a closure, gd backtracks


def near(number: str, of: Rule, value: Any, shift: Callable[[], int]) -> Any:
    """A number by up to a half beside another, whole where it counts something, and within its term."""
    if isinstance(value, tuple):
        return tuple(near(number, of, one, shift) for one in value)
    if number in ("every", "seed"):
        return float(1 + shift() % 4)
    found, high = value * shift() / 100, term(number, of.name).high
    return min(found, 0.98) if high <= 1 else found


@st.composite
def parts(drawn: Any, entry: Rule, rated: bool = True) -> Part:
    shift = lambda: drawn(st.integers(50, 150))  # noqa: E731
    own = CASES[entry.name].numbers if entry.name in CASES else LINK_CASES[entry.name].numbers
    numbers = {**entry.numbers, **own}
    if "lr" in numbers:
        numbers["lr"] = CASES[entry.name].lr
        if not rated:
            del numbers["lr"]
    return entry(**{name: near(name, entry, value, shift) for name, value in numbers.items()})


@dataclass(frozen=True)
class Drawn:
    """A chain, shapes of its weights, a seed of weights and gradients, and a rate a step."""

    chain: Chain
    shapes: Shapes
    seed: int
    rates: tuple[float, ...]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"{self.chain!r} on {self.shapes}, seed {self.seed}, rates {self.rates}")


@st.composite
def chains(drawn: Any) -> Drawn:
    """Up to five parts: perhaps a second point, links and rules on the update, links on the weight."""
    main = RULES[drawn(st.sampled_from(sorted(RULES)))]
    first = [RULES[drawn(st.sampled_from(sorted(RULES)))]] if drawn(st.integers(0, 4)) == 4 else []
    added = [LINKS[name] for name in drawn(st.lists(st.sampled_from(sorted(LINKS)), max_size=4 - len(first)))]
    ascent, update, weight = ([a for a in added if a.kind == k] for k in ("ascent", "update", "weight"))
    split = drawn(st.integers(0, len(update)))
    entries = [*ascent, *update[:split], *first, main, *update[split:], *weight]
    rated = next(entry for entry in entries if entry.kind == "rule")
    made = [drawn(parts(entry, rated=entry is rated)) for entry in entries]
    try:
        linked = chain(*made)
    except ds.BadInput:
        reject()
    if not allowed(made):
        reject()
    pool = PLAIN
    if linked.matrix or "nuclear" in {part.name for part in made}:
        pool = FULL if "soap" in {part.name for part in made} else (*MATRICES, (2, 2, 2, 2), (1, 3))
    shapes = tuple(drawn(st.lists(st.sampled_from(pool), min_size=1, max_size=4)))
    lr = float(linked.lr)
    rates = tuple(lr * drawn(st.integers(50, 150)) / 100 for _ in range(STEPS))
    return Drawn(linked, shapes, drawn(st.integers(0, 9999)), rates)


@pytest.fixture(params=["eager", "cpu", "gpu"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every executor that is compared with the reference. The GPU's is interpreted where there is none."""
    if request.param == "gpu":
        if not gpu.runs_here():
            pytest.skip("Triton is not installed, or was imported without its interpreter")
        monkeypatch.setattr(gpu, "CHUNK", 16)  # so small that few numbers have several chunks
        monkeypatch.setattr(gpu, "BLOCK", 8)
    return str(request.param)


def stepped(of: Drawn, executor: str) -> tuple[Any, dict[str, list[Any]]]:
    """The weights, trained and to evaluate, and the state after all steps."""
    weights, gradients = draw(STEPS, seed=of.seed, shapes=of.shapes)
    _, estimates = draw(STEPS, seed=of.seed + 1, shapes=of.shapes)
    reference = executor == "reference"
    with stepped_by("cpu" if reference else executor):
        runner = (truth.Source if reference else truth.Public)(of.chain, weights)
        for k, rate in enumerate(of.rates):
            runner.rate(rate)
            if k % 2 == 0 and any(part.rule.estimate for part in of.chain.parts):
                runner.estimate(estimates[k])
            runner.step(gradients[k])
        results = runner.results()
        if reference:
            return results, runner.slots
        optimizer = runner.optimizer
        for kind, found in buckets_by_kind(optimizer).items():
            fits = compiled(of.chain) or "step" not in kind  # the programs beside a step are always short
            assert found == {BUCKETS[executor] if fits else "EagerBucket"}, kind
        held = [optimizer.state[p] for p in runner.parameters]
        return results, {name: [s[name].numpy() for s in held] for name in of.chain.slots}


def agree(of: Drawn, executor: str) -> None:
    """Weights and state equal the reference's to 1e-10. Bases of eigenvectors are known up to their signs."""
    want, held = stepped(of, "reference")
    got, mine = stepped(of, executor)
    for ours, theirs in zip(got, want, strict=True):
        truth.assert_close(ours, theirs)
    for name in held if not {"soap", "lbfgs"} & {part.name for part in of.chain.parts} else ():
        truth.assert_close(mine[name], held[name])


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""Five parts at most are read as they are: every smaller chain would have to be compiled."""


LONG = Drawn(
    chain(ds.sam(), ds.lbfgs(lr=0.2), ds.cautious_decay(), ds.clip_tensor(), ds.lookahead()),
    ((7,), (3, 4)),
    seed=0,
    rates=(0.2, 0.1, 0.3, 0.2),
)
"""Its step is too long to compile; its ascent and its evaluation weights are not."""


@settings(max_examples=40, phases=PHASES, suppress_health_check=QUIET)
@given(of=chains())
@example(of=LONG)
def test_a_random_chain_is_the_same_on_every_executor(executor: str, of: Drawn) -> None:
    agree(of, executor)


@pytest.mark.deep
@settings(max_examples=500, phases=PHASES, suppress_health_check=QUIET)
@given(of=chains())
def test_five_hundred_random_chains_are_the_same_on_every_executor(executor: str, of: Drawn) -> None:
    agree(of, executor)


def around(rule: str, links: Sequence[str]) -> Chain:
    """A rule with links where each belongs; of several in one place, in this order."""
    made = [LINKS[name](**LINK_CASES[name].numbers) for name in links]
    rows = [LINK_CASES[name] for name in links]
    ahead = [part for part, row in zip(made, rows, strict=True) if row.ascent]
    ahead += [part for part, row in zip(made, rows, strict=True) if row.before]
    behind = [part for part, row in zip(made, rows, strict=True) if row.between]
    behind += [part for part, row in zip(made, rows, strict=True) if row.after]
    return chain(*ahead, CASES[rule].part, *behind)


def accepted(rule: str, links: Sequence[str]) -> bool:
    """Whether they are a chain that is compiled."""
    try:
        return compiled(around(rule, links))
    except ds.BadInput:
        return False


PAIRS = list(combinations_with_replacement(LINKS, 2))
PLACE = {name: place for place, name in enumerate(LINKS)}


def refused(rule: str, pair: Sequence[str]) -> bool:
    """Whether a pair makes no sense: two second points, or singular values in a metric by element."""
    rows = [LINK_CASES[name] for name in pair]
    if all(row.ascent for row in rows):
        return True
    single = rule != "adam" and not {"cautious", "agc", "clip_value"} & {*pair}
    return "nuclear" in pair and not single


def covering(rule: str, most: int = 5) -> Iterator[list[str]]:
    """Few sets of links that hold every accepted pair: greedily, each next link for the most pairs that are
    missing.
    """

    def pairs(links: Sequence[str]) -> set[tuple[str, ...]]:
        return {tuple(sorted(pair, key=PLACE.__getitem__)) for pair in combinations(links, 2)}

    missing = {pair for pair in PAIRS if accepted(rule, pair)}
    while missing:
        held = list(min(missing, key=lambda pair: [PLACE[name] for name in pair]))
        while len(held) < most:
            found = {name: len(pairs([*held, name]) & missing) for name in LINKS if held.count(name) < 2}
            better = [name for name in found if found[name] > len(pairs(held) & missing)]
            better = sorted(better, key=lambda name: -found[name])
            chosen = next((name for name in better if accepted(rule, [*held, name])), None)
            if chosen is None:
                break
            held.append(chosen)
        missing -= pairs(held)
        yield held


def all_agree(rule: str, sets: Iterable[Sequence[str]], executor: str) -> None:
    """Every set of links agrees, or all that do not are told."""
    faults = []
    for links in sets:
        shapes = MATRICES if "nuclear" in links else FEW
        try:
            agree(Drawn(around(rule, links), shapes, len(links), (CASES[rule].lr,) * STEPS), executor)
        except Exception as fault:
            fault.add_note(f"in {around(rule, links).name}")
            faults.append(fault)
    if faults:
        raise ExceptionGroup("chains differ", faults)


@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_every_pair_of_links_is_in_a_chain_that_is_the_same_on_every_executor(
    executor: str, rule: str
) -> None:
    """Pair by pair for eager, which compiles nothing; for the others in chains that hold several."""
    pairs = (pair for pair in PAIRS if accepted(rule, pair))
    all_agree(rule, pairs if executor == "eager" else covering(rule), executor)


@pytest.mark.deep
@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_every_pair_of_links_is_the_same_on_every_executor_in_either_order(executor: str, rule: str) -> None:
    pairs = [pair for pair in PAIRS if accepted(rule, pair)]
    all_agree(rule, [*pairs, *(pair[::-1] for pair in pairs if pair[0] != pair[1])], executor)


@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_pairs_that_make_no_sense_are_refused_by_name(rule: str) -> None:
    for pair in PAIRS:
        if refused(rule, pair):
            with pytest.raises(ds.BadInput, match="|".join(pair)):
                around(rule, pair)
        else:
            assert accepted(rule, pair), pair
