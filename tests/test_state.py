"""State that comes from elsewhere: torch's optimizers, other orders, groups and names, part of a model.

Traps are those that keep coming back in public projects where optimizers are saved and loaded.
"""

from __future__ import annotations

import copy
import io
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

import downslope as ds
from downslope.foreign import TWINS, translate_state
from downslope.rules import LINKS, RULES, Chain, Slot, Step, rule
from downslope.state import Loaded, plain_name, restore

SHAPES = {"matrix": (4, 3), "vector": (5,), "number": (), "kernel": (2, 3, 2, 2), "tall": (6, 2)}
MATRICES = ("matrix", "kernel", "tall")

Named = dict[str, nn.Parameter]


def named(dtype: torch.dtype = torch.float64, only: tuple[str, ...] = tuple(SHAPES)) -> Named:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(value) for name, value in drawn.items() if name in only}


def twin(parameters: Named) -> Named:
    return {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}


def drive(parameters: Named, optimizer: Any, steps: int, first: int = 0) -> None:
    """Gradients of a bowl, with noise that the step and the name choose."""
    for step in range(first, first + steps):
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (2 * parameter.detach() + 0.3 * noise).to(parameter.dtype)
        optimizer.step()


def close(one: Any, two: Any) -> None:
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-10, atol=1e-12)


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def doubles() -> Iterator[None]:
    """torch keeps its own 0-d state (NAdam's product, ASGD's eta) in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def filed(state_dict: dict[str, Any]) -> Any:
    """Through a file, without pickle."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def chained(parts: str) -> Chain:
    return ds.chain(*({**RULES, **LINKS}[part]() for part in parts.split(" > ")))


# --- from torch

ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}
RMS = {"lr": 0.02, "alpha": 0.9, "eps": 1e-2, "weight_decay": 0.1}
COUPLED, DECOUPLED = {"decoupled_weight_decay": False}, {"decoupled_weight_decay": True}
FROM_TORCH: list[tuple[str, str, dict[str, Any]]] = [
    ("l2 > sgd", "SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("sgd > decay", "SGD", {"lr": 0.1, "dampening": 0.5, "weight_decay": 0.1}),
    ("l2 > momentum", "SGD", {**SGD, "dampening": 0.2}),
    ("l2 > nesterov", "SGD", {**SGD, "nesterov": True}),
    (
        "l2 > adagrad",
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3, "initial_accumulator_value": 0.3, "weight_decay": 0.1},
    ),
    ("l2 > rmsprop", "RMSprop", RMS),
    ("l2 > rmsprop_centered", "RMSprop", {**RMS, "centered": True}),
    ("l2 > rmsprop > momentum", "RMSprop", {**RMS, "momentum": 0.5}),
    ("l2 > rmsprop_centered > momentum", "RMSprop", {**RMS, "momentum": 0.5, "centered": True}),
    ("l2 > adadelta", "Adadelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1}),
    ("l2 > adam", "Adam", ADAM),
    ("adam > decay", "Adam", {**ADAM, **DECOUPLED}),
    ("adam > decay", "AdamW", ADAM),
    ("adamw", "AdamW", ADAM),
    ("adamw", "Adam", {**ADAM, **DECOUPLED}),
    ("l2 > amsgrad", "Adam", {**ADAM, "amsgrad": True}),
    ("amsgrad > decay", "AdamW", {**ADAM, "amsgrad": True}),
    ("l2 > adamax", "Adamax", ADAM),
    ("l2 > nadam", "NAdam", {**ADAM, "momentum_decay": 0.01}),
    ("nadam > decay", "NAdam", {**ADAM, **DECOUPLED}),
    ("l2 > radam", "RAdam", ADAM),
    ("radam > decay", "RAdam", {**ADAM, **DECOUPLED}),
    ("l2 > asgd", "ASGD", {"lr": 0.1, "lambd": 0.01, "alpha": 0.6, "t0": 3.0, "weight_decay": 0.1}),
    ("rprop", "Rprop", {"lr": 0.05, "etas": (0.4, 1.3), "step_sizes": (1e-3, 1.0)}),
    ("adafactor", "Adafactor", {"lr": 0.1, "beta2_decay": -0.7, "d": 1.5, "weight_decay": 0.1}),
    ("adafactor", "Adafactor", {"lr": 0.1, "eps": (1e-5, 1e-2)}),
    ("muon", "Muon", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    ("muon_rms", "Muon", {"lr": 0.05, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}),
]


def known(parts: str) -> bool:
    return set(parts.split(" > ")) <= {*RULES, *LINKS}


@pytest.mark.parametrize(("parts", "kind", "numbers"), [case for case in FROM_TORCH if known(case[0])])
def test_a_run_of_torchs_goes_on_with_the_same_numbers(
    parts: str, kind: str, numbers: dict[str, Any]
) -> None:
    """The chain has its default numbers: those that count come with the checkpoint."""
    flat, counted = kind == "Muon", kind not in ("SGD", "Muon")
    one = named(only=("matrix", "tall") if flat else tuple(SHAPES))
    with doubles():
        theirs = getattr(torch.optim, kind)(one.items(), **numbers)
        drive(one, theirs, 5)
        two = twin(one)
        ours = ds.Optimizer(two.items(), chained(parts))
        with quiet():
            report = ours.load_state_dict(filed(theirs.state_dict()))
        drive(one, theirs, 5, first=5)
    drive(two, ours, 5, first=5)
    assert report == Loaded(tuple(one))
    assert ours.steps == (10 if counted else 5)
    if flat:  # torch's Muon iterates in bfloat16
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=0.02)
        return
    close(one, two)
    for name in one:
        entry, held = translate_state(ours.chain, theirs.state[one[name]]), ours.state[two[name]]
        if entry:
            assert not counted or int(held["t"]) == entry["t"] == 10
            close({key: value for key, value in entry.items() if key != "t"}, held)


@pytest.mark.parametrize("rules", [rules for rules in TWINS if known(rules)])
def test_the_table_calls_slots_and_numbers_as_the_rules_do(rules: str) -> None:
    made, table = chained(rules), TWINS[rules]
    ours = [[name] if isinstance(name, str) else name for name in table.numbers.values()]
    assert table.slots.keys() == made.slots.keys()
    assert {name for names in ours for name in names} <= made.defaults.keys()
    tried = {" > ".join(part for part in case[0].split(" > ") if part in RULES) for case in FROM_TORCH}
    assert rules in tried


DROP_INS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.5, "centered": True, "eps": 1e-2}),
    ("Adam", {}),
    ("AdamW", {}),
    ("Adadelta", {}),
    ("Adamax", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("ASGD", {}),
    ("Rprop", {}),
    ("Adafactor", {"eps": (1e-6, 1e-3)}),
]


@pytest.mark.parametrize(("name", "numbers"), [case for case in DROP_INS if hasattr(ds, case[0])])
def test_a_drop_in_takes_over_from_the_class_whose_name_it_has(name: str, numbers: dict[str, Any]) -> None:
    """With the same keywords nothing differs, so nothing is said: warnings are errors here."""
    one = named()
    with doubles():
        theirs = getattr(torch.optim, name)(one.items(), **numbers)
        drive(one, theirs, 3)
        two = twin(one)
        ours = getattr(ds, name)(two.items(), **numbers)
        ours.load_state_dict(theirs.state_dict())
        drive(one, theirs, 3, first=3)
    drive(two, ours, 3, first=3)
    close(one, two)


def handed_over(kind: str, numbers: dict[str, Any], *made: Any) -> ds.Optimizer:
    parameters = named()
    theirs = getattr(torch.optim, kind)(parameters.items(), **numbers)
    drive(parameters, theirs, 2)
    ours = ds.Optimizer(parameters.items(), ds.chain(*made))
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.mark.parametrize(
    ("kind", "numbers", "parts", "message"),
    [
        ("Adam", {"maximize": True}, "adam", r"maximize=True, which is not adam; no rule does that"),
        ("Adam", {"amsgrad": True}, "adam", r"amsgrad=True, which is not adam but amsgrad"),
        ("Adam", {}, "amsgrad", r"amsgrad=False, which is not amsgrad but adam or adamw"),
        ("SGD", {"momentum": 0.9, "nesterov": True}, "momentum", r"True, which is not momentum but nesterov"),
        ("SGD", {"momentum": 0.9}, "nesterov", r"nesterov=False, which is not nesterov but momentum"),
        ("SGD", {"momentum": 0.9}, "sgd", r"momentum=0.9, which is not sgd but momentum"),
        ("RMSprop", {"momentum": 0.9}, "rmsprop", r"0.9, which is not rmsprop but rmsprop > momentum"),
        ("RMSprop", {"centered": True}, "rmsprop", r"True, which is not rmsprop but rmsprop_centered"),
        ("Adam", {"weight_decay": 0.1}, "adamw", r"=0.1 is L2 \(decoupled_weight_decay=False\)"),
        ("Adam", {}, "adamw", r"adamw must have its decay in front of the rule, and only there"),
        ("Adam", {"weight_decay": 0.1}, "adam", r"adam must have its decay in front of the rule"),
        ("AdamW", {}, "l2 > adam", r"is decoupled \(decoupled_weight_decay=True\).*in or behind the rule"),
        ("NAdam", DECOUPLED | {"weight_decay": 0.1}, "l2 > nadam", r"decoupled_weight_decay=True"),
        ("NAdam", {}, "adam", r"the checkpoint is of torch's NAdam; adam takes that of torch's Adam"),
        ("Adamax", {}, "adam", r"of torch's Adamax or RAdam; adam takes that of torch's Adam"),
        ("SparseAdam", {}, "radam", r"of a class that is not known here; radam takes that of torch's RAdam"),
        ("SGD", {"momentum": 0.9}, "lion", r"one of torch's optimizers, none of which is lion"),
        ("RAdam", {}, "adamax", r"has exp_avg_sq, m, t for parameter 0; adamax: m, u, t"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_makes_another_algorithm_is_refused_by_name(
    kind: str, numbers: dict[str, Any], parts: str, message: str, strict: bool
) -> None:
    parameters = named()
    theirs = getattr(torch.optim, kind)(list(parameters.items()), **numbers)
    if kind != "SparseAdam":  # which takes no dense gradient; its numbers tell
        drive(parameters, theirs, 2)
    ours = ds.Optimizer(parameters.items(), chained(parts))
    if kind == "RAdam" and not strict:
        assert ours.load_state_dict(theirs.state_dict(), strict=False).misshapen == tuple(parameters)
        return
    with pytest.raises(ds.BadInput, match=message):
        ours.load_state_dict(theirs.state_dict(), strict=strict)
    assert not ours.state


def test_flags_that_pick_an_implementation_are_dropped() -> None:
    ours = handed_over("AdamW", {"foreach": True}, ds.adamw())
    assert {"foreach", "fused", "maximize", "amsgrad", "capturable"}.isdisjoint(ours.param_groups[0])


def test_links_around_the_rule_keep_their_own_numbers() -> None:
    ours = handed_over("AdamW", {"lr": 0.001}, ds.clip_norm(0.3), ds.adamw(), ds.l1(1e-4))
    group = ours.param_groups[0]
    assert (group["max_norm"], group["l1"], group["lr"]) == (0.3, 1e-4, 0.001)


def test_a_link_that_would_need_state_of_its_own_is_refused() -> None:
    if "lookahead" in LINKS:
        with pytest.raises(
            ds.BadInput, match=r"has m, t, v for parameter 0; adamw > lookahead: m, v, slow, t"
        ):
            handed_over("AdamW", {}, ds.adamw(), LINKS["lookahead"]())


def test_a_rate_that_torch_held_as_a_tensor_becomes_a_number() -> None:
    ours = handed_over("Adam", {"lr": torch.tensor(0.25), "foreach": False}, ds.adam(lr=0.25))
    assert ours.param_groups[0]["lr"] == 0.25
    assert type(ours.param_groups[0]["lr"]) is float


def test_torchs_momentum_is_not_taken_for_a_first_step() -> None:
    """torch does not count SGD's steps; dampening spares only the first, and t = 1 says that it is over."""
    ours = handed_over(
        "SGD", {"momentum": 0.9, "dampening": 0.5}, ds.momentum(momentum=0.9, dampening=0.5, lr=1e-3)
    )
    assert {int(slots["t"]) for slots in ours.state.values()} == {1}
    assert ours.steps == 0


def test_parameters_that_torch_stepped_less_often_are_younger() -> None:
    parameters = named()
    theirs = torch.optim.Adam(parameters.items())
    drive(parameters, theirs, 2)
    parameters["vector"].grad = None
    drive({name: parameters[name] for name in parameters if name != "vector"}, theirs, 3)
    ours = ds.Adam(parameters.items())
    ours.load_state_dict(theirs.state_dict())
    assert {name: int(ours.state[parameters[name]]["t"]) for name in ("vector", "tall")} == {
        "vector": 2,
        "tall": 5,
    }
    assert ours.steps == 5


def test_a_schedule_of_ours_reads_the_step_that_torch_had_reached() -> None:
    """And what torch's scheduler left in the group does not stand in its way."""
    plan, beta = ds.cosine(0.1, steps=20, warmup=2), ds.linear(0.8, steps=10, end=0.9)
    parameters = named()
    theirs = torch.optim.Adam(parameters.items(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.9)
    for step in range(6):
        drive(parameters, theirs, 1, first=step)
        scheduler.step()
    ours = ds.Optimizer(parameters.items(), ds.chain(ds.adam(lr=plan, betas=(beta, 0.999))))
    ours.load_state_dict(theirs.state_dict())
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["betas"]) == (plan(6), (beta(6), 0.999))
    drive(parameters, ours, 1)
    assert ours.param_groups[0]["lr"] == plan(7)


def test_a_scheduler_of_torchs_goes_on_from_where_it_was() -> None:
    parameters = named()
    theirs = torch.optim.Adam(parameters.items(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.9)
    drive(parameters, theirs, 1)
    scheduler.step()
    ours = ds.Adam(parameters.items(), lr=0.1)
    with quiet():
        ours.load_state_dict(theirs.state_dict())
    goes_on = torch.optim.lr_scheduler.ExponentialLR(ours, 0.9, last_epoch=0)
    goes_on.load_state_dict(scheduler.state_dict())
    ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"]
    drive(parameters, ours, 1)
    goes_on.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(0.081)


def test_where_torch_counts_no_steps_a_schedule_says_so() -> None:
    with pytest.warns(UserWarning, match="torch counted no steps"):
        handed_over("SGD", {"momentum": 0.9}, ds.momentum(lr=ds.cosine(0.1, steps=9)))


def test_torchs_unnamed_parameters_are_matched_by_order_and_shape() -> None:
    one = named()
    theirs = torch.optim.Adam(one.values(), lr=0.05)
    drive(one, theirs, 3)
    two = twin(one)
    ours = ds.Adam(two.items(), lr=0.05)
    with pytest.warns(UserWarning, match="matched by order"):
        ours.load_state_dict(theirs.state_dict())
    drive(one, theirs, 3, first=3)
    drive(two, ours, 3, first=3)
    close(one, two)
    turned = ds.Adam(dict(reversed(two.items())).items(), lr=0.05)
    with pytest.raises(ds.BadInput, match=r"what is saved for tall, kernel, vector, matrix does not fit"):
        turned.load_state_dict(theirs.state_dict())


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    return nn.Sequential(*layers).double()


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "way"),
    [  # torch itself unflattens only what has the keys of the optimizer that it is for
        (ds.AdamW, "straight"),
        (ds.AdamW, "by DCP"),
        (ds.AdamW, "by DCP, flat"),
        (torch.optim.AdamW, "straight"),
        (torch.optim.AdamW, "by DCP"),
    ],
)
def test_what_dcp_makes_of_a_state_dict_is_taken(kind: Any, way: str) -> None:
    """`get_optimizer_state_dict` keys it by names, and drops what it does not know."""
    one = model_of()
    first = kind(one.named_parameters() if kind is ds.AdamW else one.parameters(), lr=0.05)
    train(one, first, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=way.endswith("flat"))
    saved = filed(get_optimizer_state_dict(one, first, options=options))
    two = copy.deepcopy(one)
    second = ds.AdamW(two.named_parameters(), lr=0.05)
    if way == "straight":
        second.load_state_dict(saved)
    else:
        set_optimizer_state_dict(two, second, saved, options=options)
    train(one, first, 3, seed=5)
    train(two, second, 3, seed=5)
    close(dict(one.named_parameters()), dict(two.named_parameters()))
    assert second.steps == 6


# --- part of a model


def part_of_a_run() -> tuple[Named, dict[str, Any]]:
    parameters = named()
    optimizer = ds.Adam(parameters.items(), lr=0.05)
    drive(parameters, optimizer, 4)
    return parameters, optimizer.state_dict()


def test_trap_2_part_is_restored_when_asked_and_names_are_told() -> None:
    one, saved = part_of_a_run()
    two = {**twin(one), "new": nn.Parameter(torch.ones(2, dtype=torch.float64))}
    two["tall"] = nn.Parameter(torch.ones(7, 2, dtype=torch.float64))
    del two["number"]
    ours = ds.Adam(two.items(), lr=0.05)
    told = (
        r"lacks new and the program lacks number and what is saved for tall does not fit \(m of parameter 4"
    )
    with pytest.raises(ds.BadInput, match=told):
        ours.load_state_dict(saved)
    assert not ours.state
    report = ours.load_state_dict(saved, strict=False)
    assert report == Loaded(("matrix", "vector", "kernel"), ("new",), ("number",), ("tall",))
    said = "3 parameters restored; new missing from the checkpoint; number not in the program; "
    assert str(report) == said + "tall of another shape."
    assert {name for name in two if two[name] in ours.state} == set(report.restored)
    assert (ours.steps, int(ours.state[two["matrix"]]["t"])) == (4, 4)
    whole = ds.Adam(one.items(), lr=0.05)
    whole.load_state_dict(saved)
    drive(one, whole, 2, first=4)
    drive(two, ours, 2, first=4)
    assert same({name: one[name] for name in report.restored}, two)
    assert int(ours.state[two["new"]]["t"]) == 2


@pytest.mark.parametrize("strict", [True, False])
def test_a_whole_load_reports_every_name(strict: bool) -> None:
    parameters, saved = part_of_a_run()
    report = ds.Adam(parameters.items(), lr=0.05).load_state_dict(saved, strict=strict)
    assert report == Loaded(tuple(parameters))
    assert str(report) == "5 parameters restored."


def test_what_is_not_in_the_checkpoint_keeps_the_state_it_has() -> None:
    _, saved = part_of_a_run()
    two = {**named(), "new": nn.Parameter(torch.ones(2, dtype=torch.float64))}
    ours = ds.Adam(two.items(), lr=0.05)
    drive(two, ours, 2)
    before = {key: value.clone() for key, value in ours.state[two["new"]].items()}
    ours.load_state_dict(saved, strict=False)
    assert same(before, ours.state[two["new"]])
    drive(two, ours, 1)
    assert [int(ours.state[two[name]]["t"]) for name in ("new", "vector")] == [3, 5]


def test_part_of_torchs_state_is_restored_too() -> None:
    one, two = named(), named(only=("vector", "matrix"))
    theirs = torch.optim.Adam(one.items(), lr=0.05)
    drive(one, theirs, 3)
    ours = ds.Adam(two.items(), lr=0.05)
    report = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert report == Loaded(("matrix", "vector"), (), ("number", "kernel", "tall"))
    assert torch.equal(ours.state[two["vector"]]["m"], theirs.state[one["vector"]]["exp_avg"])


def test_state_of_another_rule_is_not_restored_and_brings_no_numbers() -> None:
    parameters, saved = part_of_a_run()
    other = ds.Momentum(parameters.items(), lr=0.25)
    report = other.load_state_dict(saved, strict=False)
    assert report.misshapen == tuple(parameters)
    assert not report.restored
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.25
    assert "betas" not in other.param_groups[0]


def test_many_names_are_cut_short() -> None:
    said = str(Loaded(missing=tuple(map(str, range(30)))))
    assert said.endswith("18, 19 and 10 more missing from the checkpoint.")


# --- slots of every kind


@rule(Slot("m"), Slot("row", "row"), Slot("column", "column"), Slot("factor", "left"), Slot("d", "tensor"))
def shaped(g: Any, p: Any, s: Any) -> Step:
    """State of every kind."""
    return Step(g, metric=1.0)


STATE_SHAPES = {
    "matrix": {"m": (4, 3), "row": (4, 1), "column": (1, 3), "factor": (4, 4), "d": ()},
    "vector": {"m": (5,), "row": (5, 1), "column": (1, 1), "factor": (5, 5), "d": ()},
    "kernel": {"m": (2, 3, 2, 2), "row": (2, 3, 2, 1), "column": (2, 3, 1, 2), "factor": (2, 2), "d": ()},
    "number": {"m": (), "row": (1, 1), "column": (1, 1), "factor": (1, 1), "d": ()},
}


def shaped_state(dtype: torch.dtype) -> tuple[Named, dict[str, Any], dict[str, Any]]:
    """Parameters, their group, and a state dict with state of every kind."""
    parameters = named(dtype, only=tuple(STATE_SHAPES))
    state: dict[str, Any] = {}
    for name in parameters:
        state[name] = {slot: torch.randn(shape) for slot, shape in STATE_SHAPES[name].items()}
        state[name] |= {"d": torch.tensor(0.1, dtype=torch.float64), "t": torch.tensor(3)}
    group = {"params": list(parameters.values()), "param_names": list(parameters), "lr": 0.001, "step": 0}
    return parameters, group, {"state": state, "param_groups": [{**group, "params": list(state), "step": 3}]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_trap_6_every_kind_of_state_keeps_its_shape_and_precision(dtype: torch.dtype) -> None:
    parameters, group, saved = shaped_state(dtype)
    found = restore([group], [ds.chain(shaped(lr=0.001))], [{}], filed(saved)).state
    for name, parameter in parameters.items():
        held, given = found[parameter], saved["state"][name]
        assert {slot: tuple(value.shape) for slot, value in held.items()} == {**STATE_SHAPES[name], "t": ()}
        assert same(held, given)
        assert all(held[slot].dtype == given[slot].dtype for slot in held)


@pytest.mark.parametrize("slot", ["m", "row", "column", "factor", "d"])
def test_a_slot_of_another_shape_is_told(slot: str) -> None:
    _, group, saved = shaped_state(torch.float32)
    saved["state"]["matrix"][slot] = torch.ones(9)
    told = rf"matrix does not fit \({slot} of parameter matrix has shape \(9,\), the parameter \(4, 3\)"
    with pytest.raises(ds.BadInput, match=told):
        restore([group], [ds.chain(shaped(lr=0.001))], [{}], saved)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_trap_6_state_from_torch_keeps_its_precision(held: torch.dtype) -> None:
    parameters = named(torch.bfloat16)
    theirs = torch.optim.Adam(parameters.items(), lr=0.05)
    drive(parameters, theirs, 2)
    saved = theirs.state_dict()
    for slots in saved["state"].values():
        slots["exp_avg"] = slots["exp_avg"].to(held)
    ours = ds.Adam(parameters.items(), lr=0.05)
    ours.load_state_dict(saved)
    assert {slots["m"].dtype for slots in ours.state.values()} == {held}


STATEFUL = [name for name, one in RULES.items() if one.slots]


@pytest.mark.parametrize("parts", [*STATEFUL, *(f"adam > {n}" for n, one in LINKS.items() if one.slots)])
def test_trap_11_every_rule_resumes_to_the_bit_from_a_file_in_another_order(parts: str) -> None:
    """From torch's file with weights_only, and with the tensors from safetensors."""
    made = chained(parts)
    one = named(torch.float32, MATRICES if made.matrix else tuple(SHAPES))
    first = ds.Optimizer(one.items(), made)
    drive(one, first, 2)
    saved = filed(first.state_dict())
    flat = {f"{key}/{slot}": value for key, slots in saved["state"].items() for slot, value in slots.items()}
    flat = load(save(flat))
    saved["state"] = {
        key: {slot: flat[f"{key}/{slot}"] for slot in slots} for key, slots in saved["state"].items()
    }
    two = twin(dict(reversed(one.items())))
    second = ds.Optimizer(two.items(), chained(parts))
    second.load_state_dict(saved)
    drive(one, first, 2, first=2)
    drive(two, second, 2, first=2)
    assert same(one, two)


# --- orders, groups, numbers


def grouped(parameters: Named, *groups: str) -> list[dict[str, Any]]:
    split = [names.split() for names in groups]
    return [{"params": [parameters[name] for name in names], "param_names": names} for names in split]


@pytest.mark.parametrize(
    "groups",
    [
        ("tall kernel number vector matrix",),
        ("tall number", "matrix kernel vector"),
        ("tall", "", "matrix kernel", "number vector"),
        ("", "matrix vector number kernel tall"),
    ],
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, ds.AdamW])
def test_trap_1_another_order_other_groups_and_empty_ones(kind: Any, groups: tuple[str, ...]) -> None:
    one = named()
    lr: Any = ds.cosine(0.05, steps=20) if kind is ds.AdamW else 0.05
    first = kind(one.items(), lr=lr)
    drive(one, first, 4)
    two = twin(one)
    second = ds.AdamW(grouped(two, *groups), lr=lr)
    second.load_state_dict(first.state_dict())
    assert {group["step"] for group in second.param_groups} == {second.steps} == {4}
    assert {group["lr"] for group in second.param_groups} == {first.param_groups[0]["lr"]}
    drive(one, first, 4, first=4)
    drive(two, second, 4, first=4)
    close(one, two)
    assert kind is not ds.AdamW or same(one, two)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, ds.AdamW])
def test_trap_1_groups_in_another_order_keep_their_own_numbers(kind: Any) -> None:
    one = named()
    some, others = grouped(one, "matrix vector", "kernel number tall")
    first = kind([{**some, "lr": 0.1, "weight_decay": 0.0}, {**others, "lr": 0.01}])
    drive(one, first, 3)
    second = ds.AdamW(grouped(one, "tall number kernel", "vector", "matrix"))
    with pytest.warns(UserWarning, match="the checkpoint's numbers are used"):
        second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.01, 0.1, 0.1]
    assert [group["weight_decay"] for group in second.param_groups] == [0.01, 0.0, 0.0]


def test_groups_that_become_one_must_agree() -> None:
    one = named()
    some, others = grouped(one, "matrix vector", "kernel number tall")
    first = ds.AdamW([{**some, "lr": 0.1}, {**others, "lr": 0.01}])
    drive(one, first, 3)
    merged = ds.AdamW(one.items(), lr=0.5)
    with pytest.raises(ds.BadInput, match=r"spread over groups \[0, 1\] of the checkpoint, whose numbers"):
        merged.load_state_dict(first.state_dict())
    assert not merged.state
    with pytest.warns(UserWarning, match="it keeps its own"):
        merged.load_state_dict(first.state_dict(), strict=False)
    assert (merged.param_groups[0]["lr"], merged.steps) == (0.5, 3)
    first.param_groups[0]["lr"] = 0.01
    with quiet():
        merged.load_state_dict(first.state_dict())
    assert merged.param_groups[0]["lr"] == 0.01


def test_the_role_of_a_group_is_the_programs() -> None:
    one = named()
    (whole,) = grouped(one, "matrix vector kernel number tall")
    first = ds.AdamW([{**whole, "role": "matrix", "name": "old"}])
    drive(one, first, 1)
    second = ds.AdamW([{**whole, "role": "rest"}])
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["role"] == "rest"
    assert "name" not in second.param_groups[0]


@pytest.mark.parametrize("kind", [torch.optim.Adam, ds.Adam])
def test_trap_5_loading_shares_no_tensor(kind: Any) -> None:
    one = named()
    first = kind(one.items(), lr=torch.tensor(0.05))
    drive(one, first, 2)
    saved = first.state_dict()
    before = copy.deepcopy(saved)
    second = ds.Adam(one.items(), lr=0.05)
    with quiet():
        second.load_state_dict(saved)
    rate = second.param_groups[0]["lr"]
    second.param_groups[0]["lr"] = rate.mul_(2) if isinstance(rate, torch.Tensor) else 2 * rate
    drive(one, second, 2)
    assert all(same(slots, saved["state"][key]) for key, slots in before["state"].items())
    assert float(saved["param_groups"][0]["lr"]) == pytest.approx(0.05)


def test_trap_5_a_state_dict_loaded_where_it_came_from_changes_nothing() -> None:
    one = named()
    first = ds.Adam(one.items(), lr=0.05)
    drive(one, first, 3)
    two = twin(one)
    second = ds.Adam(two.items(), lr=0.05)
    second.load_state_dict(first.state_dict())
    first.load_state_dict(first.state_dict())
    drive(one, first, 3)
    drive(two, second, 3)
    assert same(one, two)


def test_trap_7_a_number_that_one_side_lacks_is_told() -> None:
    parameters = named()
    first = ds.Optimizer(parameters.items(), ds.chain(ds.clip_norm(0.5), ds.adam()))
    drive(parameters, first, 1)
    second = ds.Optimizer(parameters.items(), ds.chain(ds.adam(), ds.l1(1e-3)))
    with pytest.warns(UserWarning, match=r"l1 0.001 here only; group 0: max_norm 0.5 in the checkpoint only"):
        second.load_state_dict(first.state_dict())


class Meter(TorchDispatchMode):
    """Counts the bytes that operations make, and how many of some tensors are alive when they do."""

    def __init__(self, watched: list[torch.Tensor]) -> None:
        super().__init__()
        self.watched = [weakref.ref(tensor) for tensor in watched]
        self.made, self.alive = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in held:
            self.made += out.untyped_storage().nbytes()
            self.alive = max(self.alive, sum(ref() is not None for ref in self.watched) if out.ndim else 0)
        return out


@pytest.mark.parametrize("kind", [torch.optim.AdamW, ds.AdamW])
def test_trap_12_loading_makes_one_copy_of_the_state_when_the_old_is_gone(kind: Any) -> None:
    parameters = named(torch.float32)
    first = kind(parameters.items())
    drive(parameters, first, 1)
    saved = copy.deepcopy(first.state_dict())
    second = ds.AdamW(parameters.items())
    drive(parameters, second, 1)
    old = [second.state[p][slot] for p in parameters.values() if p.ndim for slot in ("m", "v")]
    state = sum(value.nbytes for slots in saved["state"].values() for value in slots.values())
    with Meter(old) as meter:
        del old
        second.load_state_dict(saved)
    assert meter.alive == 0
    assert 0 < meter.made <= state + 64 * len(parameters)


# --- names


@pytest.mark.parametrize("mine", ["module.", "_orig_mod.", "module._orig_mod.", ""])
@pytest.mark.parametrize("saved_as", ["module.", "_orig_mod.module.", ""])
@pytest.mark.parametrize("kind", [torch.optim.Adam, ds.Adam])
def test_trap_13_prefixes_do_not_change_names(kind: Any, saved_as: str, mine: str) -> None:
    one, two = named(), dict(reversed(named().items()))
    first = kind([{"params": [(f"{saved_as}part.{saved_as}{name}", p) for name, p in one.items()]}], lr=0.05)
    drive(one, first, 2)
    second = ds.Adam([{"params": [(f"{mine}part.{mine}{name}", p) for name, p in two.items()]}], lr=0.05)
    report = second.load_state_dict(first.state_dict())
    assert report.restored == tuple(f"part.{name}" for name in two)
    slot = "m" if kind is ds.Adam else "exp_avg"
    assert torch.equal(second.state[two["vector"]]["m"], first.state[one["vector"]][slot])


def test_only_whole_parts_of_a_name_are_prefixes() -> None:
    assert plain_name("my_module.module_list.0.weight") == "my_module.module_list.0.weight"


def test_names_that_would_become_one_stay_two() -> None:
    parameters = {"module.w": nn.Parameter(torch.ones(2)), "w": nn.Parameter(torch.ones(3))}
    optimizer = ds.SGD([{"params": list(parameters.items())}], lr=0.1, momentum=0.9)
    drive(parameters, optimizer, 1)
    assert optimizer.load_state_dict(optimizer.state_dict()).restored == ("module.w", "w")


# --- what is broken


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"state": {}},
        {"param_groups": []},
        {"state": {}, "param_groups": [{"lr": 1.0}]},
        {"state": [], "param_groups": []},
        {f"state.{i}.m": 0 for i in range(99)},
    ],
)
def test_what_is_no_state_dict_is_refused_in_one_short_sentence(broken: dict[str, Any]) -> None:
    with pytest.raises(ds.BadInput, match="a state dict has 'state' and 'param_groups'") as refused:
        ds.Adam(named().items()).load_state_dict(broken)
    assert len(str(refused.value)) < 500


def test_a_slot_that_is_no_tensor_is_refused_and_nothing_changes() -> None:
    parameters, saved = part_of_a_run()
    saved["state"][0]["m"] = 3.0
    ours = ds.Adam(parameters.items(), lr=0.05)
    drive(parameters, ours, 2)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ds.BadInput, match=r"m of parameter 0 is float, not a tensor"):
        ours.load_state_dict(saved)
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(same(slots, after["state"][key]) for key, slots in before["state"].items())


def test_another_rule_with_slots_of_the_same_names_does_not_go_on_unnoticed() -> None:
    model = nn.Linear(3, 1)
    one, other = ds.Adam(model, lr=0.1), ds.RAdam(model, lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    one.step()
    with pytest.warns(UserWarning, match="the state was made by adam, and radam goes on with it"):
        other.load_state_dict(one.state_dict())
