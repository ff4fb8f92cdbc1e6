"""Chains: order, names of numbers and slots, what is refused, and what a trace makes of them."""

from __future__ import annotations

import re
from typing import Any

import pytest

import downslope as ds
from downslope.rules import LINKS, RULES, trace
from downslope.rules.glossary import TERMS, term

WITHOUT_METRIC = {
    *("signsgd", "signum", "lion", "rprop", "lars", "lamb"),
    *("schedule_free_sgd", "schedule_free_adamw", "prodigy", "dog", "ftrl"),
}
"""Rules without an effective step, which refuse proximal links by name."""

ARRAYS = {
    3: "gd sgd signsgd",
    5: "momentum momentum_textbook nesterov asgd adagrad rmsprop signum lion schedule_free_sgd",
    6: "dog",
    7: "rprop rmsprop_centered adadelta adam adam_uncorrected adamw adamax nadam radam adabelief yogi adopt "
    "schedule_free_adamw ftrl lars",
    9: "amsgrad ademamix",
    11: "adan lamb",
    13: "prodigy",
}
"""Arrays that a step of a rule moves, each read once a pass and written once."""

TWO_PASSES = {"dog", "lars", "lamb", "prodigy"}


def test_numbers_are_flat_as_in_torch() -> None:
    chained = ds.chain(ds.clip_norm(2.0), ds.adam(lr=0.1, betas=(0.8, 0.9)), ds.decay(0.3))
    assert chained.defaults == {
        "lr": 0.1,
        "max_norm": 2.0,
        "betas": (0.8, 0.9),
        "eps": 1e-8,
        "weight_decay": 0.3,
    }


def test_numbers_and_slots_of_one_name_are_told_apart() -> None:
    chained = ds.chain(ds.adamw(weight_decay=0.1), ds.decay(0.2))
    assert (chained.defaults["weight_decay"], chained.defaults["decay.weight_decay"]) == (0.1, 0.2)
    assert list(ds.chain(ds.rmsprop(), ds.momentum()).slots) == ["v", "momentum.v"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ds.chain(ds.clip_norm(1.0)),
            r"a chain needs a rule, such as sgd\(\) or adamw\(\); only clip_norm",
        ),
        (lambda: ds.chain(), r"only nothing was given"),
        (
            lambda: ds.chain(ds.lion(), ds.l1(0.1)),
            r"l1 cannot stand behind lion, which has no effective step",
        ),
        (lambda: ds.chain(ds.sgd(), ds.l1(0.1), ds.decay()), r"decay cannot stand behind l1"),
        (lambda: ds.chain(ds.sgd(lr=0.1), ds.momentum(lr=0.1)), r"one learning rate"),
        (lambda: ds.chain(ds.adamw(), ds.adamw(), ds.adamw()), r"adamw stands more than twice"),
        (lambda: ds.chain("adamw"), r"made of rules and links.*'adamw' was given"),  # type: ignore[arg-type]
        (lambda: ds.adamw(learning_rate=0.1), r"adamw has no number 'learning_rate'"),
        (lambda: ds.sgd(lrr=0.1), r"Did you mean 'lr'\?"),
        (lambda: ds.adamw(lr=-1.0), r"lr must be at least 0; -1 was given"),
        (lambda: ds.adamw(lr=ds.constant(-1.0)), r"lr \(its peak\) must be at least 0"),
        (lambda: ds.adamw(lr=float("nan")), r"lr must be at least 0; nan was given"),
        (lambda: ds.adamw(betas=(0.9, 1.0)), r"betas must be at least 0 and below 1; 1 was given"),
        (lambda: ds.adamw(betas=0.9), r"betas must be 2 numbers"),
        (lambda: ds.adamw(lr="0.1"), r"lr must be a number or a schedule; '0.1' was given"),
        (lambda: ds.adamw(lr=True), r"lr must be a number or a schedule; True was given"),
        (lambda: ds.clip_norm(0.0), r"max_norm must be above 0; 0 was given"),
        (lambda: ds.sgd(0.1, 0.9), r"sgd takes at most 1 numbers"),
        (lambda: RULES["rprop"](etas=(0.5, 1.2, 2.0)), r"etas must be 2 numbers, such as \(0.5, 1.2\)"),
        (lambda: RULES["adan"](betas=(0.9, 0.9)), r"betas must be 3 numbers"),
        (
            lambda: ds.chain(RULES["momentum_textbook"](), ds.momentum()),
            r"momentum cannot stand behind momentum_textbook, which returns the whole step",
        ),
        (lambda: ds.chain(ds.sgd(), LINKS["sam"]()), r"sam stands at the head of a chain"),
        (lambda: ds.momentum(0.1, lr=0.2), r"lr was given twice"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(ds.BadInput, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_norm_cuts_a_chain_in_two_and_costs_one_read() -> None:
    plain, clipped = ds.chain(ds.adamw()), ds.chain(ds.clip_norm(), ds.adamw(), ds.decay(), ds.l1(0.1))
    assert (len(trace(plain).stages), trace(plain).bytes_moved) == (1, 4 * 7)
    assert (len(trace(clipped).stages), trace(clipped).bytes_moved) == (2, 4 * 8)


@pytest.mark.parametrize("name", [name for names in ARRAYS.values() for name in names.split()])
def test_a_rule_moves_no_array_twice_a_pass(name: str) -> None:
    program = trace(ds.chain(RULES[name]()))
    assert len(program.stages) == 1 + (name in TWO_PASSES)
    assert name in ARRAYS[program.bytes_moved // 4].split()


def test_a_library_costs_what_it_reads_and_returns_and_lines_cost_nothing() -> None:
    adafactor, agc, muon = (
        trace(ds.chain(*parts)) for parts in ((ds.adafactor(),), (ds.agc(), ds.sgd()), (ds.muon(),))
    )
    # g, p -> squares; squares by row, and by column; g; g, p -> p
    assert (len(adafactor.stages), adafactor.bytes_moved) == (3, 4 * (3 + 2 + 1 + 3))
    # g, p -> both again, in batches; each by unit; g, p -> p
    assert (len(agc.stages), agc.bytes_moved) == (2, 4 * (4 + 2 + 3))
    # g, m -> the look-ahead; it is read, its orthogonal factor returned; that, g, p, m -> p, m
    assert (len(muon.stages), muon.bytes_moved) == (2, 4 * (3 + 2 + 6))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_without_an_effective_step_refuses_proximal_links_by_name(name: str) -> None:
    assert name not in WITHOUT_METRIC or RULES[name].metric is None
    if RULES[name].metric is None:
        for link in ("l1", "elastic_net"):
            with pytest.raises(
                ds.BadInput, match=f"{link} cannot stand behind {name}, which has no effective"
            ):
                ds.chain(RULES[name](), LINKS[link]())
    else:
        assert ds.chain(RULES[name](), LINKS["l1"]()).name == f"{name} > l1"


def test_the_guard_is_free_where_the_norm_is_taken_anyway() -> None:
    clipped = ds.chain(ds.clip_norm(), ds.adamw())
    assert trace(clipped, guard=True).bytes_moved == trace(clipped).bytes_moved
    plain = ds.chain(ds.adamw())
    assert trace(plain, guard=True).bytes_moved == trace(plain).bytes_moved + 4
    transformed = ds.chain(
        ds.l2(0.1), ds.clip_norm(), ds.adamw()
    )  # its norm is of g + λp: the guard reads g itself
    assert len(trace(transformed, guard=True).stages[0].reductions) == 2


def test_a_slot_that_does_not_exist_is_named() -> None:
    @ds.rule("velocity")
    def misspelt(g: Any, p: Any, s: Any) -> Any:
        s.velocty = g
        return g

    with pytest.raises(ds.BadInput, match=r"'velocty' is not declared. Did you mean 'velocity'\?"):
        ds.chain(misspelt)


def test_an_argument_without_default_must_be_one_of_the_context() -> None:
    with pytest.raises(ds.BadInput, match=r"'stp' needs a default, or is one of t, step, lr, effective, "):

        @ds.rule()
        def wrong(g: Any, p: Any, s: Any, *, stp: Any) -> Any:
            return g


@pytest.mark.parametrize("entry", [*RULES.values(), *LINKS.values()], ids=lambda entry: entry.name)
def test_every_entry_explains_itself(entry: ds.Rule) -> None:
    text = entry.body.__doc__ or ""
    assert entry.summary.endswith((".", ".)"))
    assert "Not for:" in text
    assert re.search(r"\b(18|19|20)\d\d\b", entry.source), "a source has a year"
    assert entry.formula.splitlines()[-1].startswith(("p ←", "g ←", "p′ ←"))
    if entry.kind == "rule":
        assert "lr:" in text
        assert list(entry.rates) == sorted(entry.rates)
        assert entry.rates[0] <= entry.numbers["lr"] <= entry.rates[-1]
    for number, value in entry.numbers.items():
        for one in value if isinstance(value, tuple) else (value,):
            assert term(number, of=entry.name).admits(one), f"{number} has a default that is not allowed"


def test_the_glossary_tells_numbers_of_one_name_apart() -> None:
    assert term("rho", of="adadelta").allowed == "at least 0 and below 1"
    assert term("rho", of="sam") is not term("rho", of="asam")
    assert term("betas", of="adam") is term("betas")
    for name in TERMS:
        of, _, number = name.rpartition(".")
        entry = {**RULES, **LINKS}.get(of)
        assert entry is None or number in entry.numbers, f"{name} is a number that {of} does not have"


def test_formulas_read_as_the_papers_print_them() -> None:
    formula = {name: rule.formula.splitlines() for name, rule in RULES.items()}
    assert formula["momentum"] == ["v ← μ · v + where(t > 1, 1 - τ, 1) · g", "p ← p - lr · v"]
    assert formula["lion"] == [
        "m ← β₂ · m + (1 - β₂) · g",
        "p ← p - lr · (sign(β₁ · mₜ₋₁ + (1 - β₁) · g) + λ · p)",
    ]
    assert formula["adamax"][1] == "u ← max(β₂ · u, |g| + ε)"
    assert LINKS["lookahead"].formula.splitlines()[-1] == "p ← where(t mod every < 1, slow, p)"
    assert LINKS["l1"].formula == "p ← sign(p) · max(|p| - η · λ, 0)"


def test_a_rule_of_the_users_own_gets_everything() -> None:
    """Five lines; the same trace, kernels, formula and checks as ours."""

    @ds.rule("m", source="ours", lr=0.5)
    def halves(g: Any, p: Any, s: Any, *, keep: float = 0.5) -> Any:
        """Average halves."""
        s.m = keep * s.m + (1 - keep) * g
        return ds.Step(s.m, metric=1.0)

    import torch

    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    ds.Optimizer([weight], ds.chain(halves(keep=0.0), ds.l1(0.25))).step()
    assert torch.equal(weight.detach(), torch.full((3,), 0.375))
    assert halves.formula == "m ← keep · m + (1 - keep) · g\np ← p - lr · m"


@pytest.mark.parametrize(
    ("parts", "weights"),
    [
        (("sgd",), {"p": 1.0}),
        (("asgd",), {"average": 1.0}),
        (("sgd", "lookahead"), {"slow": 1.0}),
        (("asgd", "lookahead"), {"slow": 1.0}),
        (("schedule_free_sgd",), {"p": 1 / 0.9, "z": 1 - 1 / 0.9}),
        (("schedule_free_adamw",), {"p": 1 / 0.9, "z": 1 - 1 / 0.9}),
    ],
)
def test_what_is_evaluated_is_said_by_the_last_part_that_keeps_it(
    parts: tuple[str, ...], weights: dict[str, float]
) -> None:
    from downslope.kernels.reference import Arrays, Space

    chained = ds.chain(*[{**RULES, **LINKS}[name]() for name in parts])
    space = Space(((),), (0,), ("w",))
    values = {"p": 3.0, **{name: 5.0 + 2 * k for k, name in enumerate(chained.slots)}}
    known = {name: Arrays((value,), space) for name, value in values.items()}

    def number(key: Any) -> Any:
        value: Any = chained.defaults[key[0]]
        return Arrays((float(value if key[1] is None else value[key[1]]),), space)

    found = chained.evaluated(known["p"], {name: known[name] for name in chained.slots}, number)
    want = sum(share * values[name] for name, share in weights.items())
    assert float(found.values[0]) == pytest.approx(want, rel=1e-14)
