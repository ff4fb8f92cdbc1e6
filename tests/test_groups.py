"""Roles over all of torch.nn, layers against their papers' formulas, rates and freezing in optimizers."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import downslope as ds
from downslope.errors import BadInput
from downslope.groups import (
    ROLES,
    UNDECAYED,
    Frozen,
    discriminative,
    freeze,
    gradual_unfreeze,
    groups,
    layer_decay,
    layers,
    no_decay,
    param_groups,
    roster,
)
from downslope.schedule import KINDS, Schedule, branch, constant, cosine, exponential, linear, step, wsd

# --- roles, over every module of torch

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["Linear", "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"], (4, 3)),
    **{f"Conv{d}d": (4, 2, 2) for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": (4, 2, 2) for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": (4,) for d in (1, 2, 3)},
    **{f"InstanceNorm{d}d": (4, 1e-5, 0.1, True) for d in (1, 2, 3)},
    "AdaptiveLogSoftmaxWithLoss": (8, 20, [5, 10]),
    "Bilinear": (4, 3, 2),
    "Embedding": (5, 4),
    "EmbeddingBag": (5, 4),
    "GroupNorm": (2, 4),
    "LayerNorm": (4,),
    "LinearCrossEntropyLoss": (4, 3),
    "MultiheadAttention": (4, 2),
    "NonDynamicallyQuantizableLinear": (4, 3),
    "PReLU": (),
    "RMSNorm": (4,),
    "RNNBase": ("LSTM", 4, 3),
    "RNNCellBase": (4, 3, True, 2),
    "SyncBatchNorm": (4,),
    "Transformer": (4, 2, 2, 2, 8),
    "TransformerDecoder": (nn.TransformerDecoderLayer(4, 2, 8), 2),
    "TransformerDecoderLayer": (4, 2, 8),
    "TransformerEncoder": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
    "TransformerEncoderLayer": (4, 2, 8),
}
FOUND = {
    "Embedding": {"embedding"},
    "EmbeddingBag": {"embedding"},
    "PReLU": {"scale"},
    "AdaptiveLogSoftmaxWithLoss": {"matrix", "head"},
    "LinearCrossEntropyLoss": {"matrix"},
}


def expected(name: str) -> set[str]:
    if "Norm" in name:
        return {"norm"}
    if name.startswith("Transformer"):  # alone, a block's last linear layer is the last that is named
        return {"matrix", "bias", "norm"} | ({"head"} if name.endswith("Layer") else set())
    return FOUND.get(name, {"conv", "bias"} if name.startswith("Conv") else {"matrix", "bias"})


def made(name: str) -> nn.Module | None:
    """An instance, if the class can be made at all with the arguments known here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(nn, name)(*ARGUMENTS.get(name, ()))
        except TypeError:  # it wants arguments, so must be one of those without parameters
            return None


CLASSES = [name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)]
INSTANCES = {name: module for name in CLASSES if (module := made(name)) is not None}
HOLDING = [name for name, module in INSTANCES.items() if any(True for _ in module.parameters())]


def test_every_class_of_torch_nn_with_parameters_is_tried() -> None:
    """What cannot be made without arguments has none: nothing in its source registers a parameter."""
    import inspect

    left = [getattr(nn, name) for name in CLASSES if name not in INSTANCES]
    for kind in left:
        source = inspect.getsource(kind)
        assert "Parameter(" not in source or kind.__name__.startswith("Lazy"), kind
    assert len(HOLDING) > 35
    assert {name for name in ARGUMENTS if hasattr(nn, name)} <= {*HOLDING}


@pytest.mark.parametrize("name", [name for name in HOLDING if not name.startswith("Lazy")])
def test_trap_25_every_module_of_torch_has_its_roles(name: str) -> None:
    module = INSTANCES[name]
    members = list(groups(module))
    assert Counter(member.name for member in members) == Counter(n for n, _ in module.named_parameters())
    assert {member.role for member in members} == expected(name)
    for member in members:
        assert (member.role == "bias") == ("bias" in member.name and "norm" not in member.role)


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("Lazy")])
def test_lazy_parameters_are_refused_by_name(name: str) -> None:
    module = getattr(nn, name)(*([2] if "Linear" in name else [2, 2] if "Conv" in name else []))
    with pytest.raises(BadInput, match=r"^inner\.weight is lazy, without a shape yet"):
        groups(nn.ModuleDict({"inner": module}))


def test_attention_is_told_apart_inside_and_is_no_head() -> None:
    for module in (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    ):
        known = groups(nn.Sequential(nn.Linear(4, 4), module))
        assert known.role("1.out_proj.weight") == "matrix"
        assert {m.role for m in known if "weight" in m.name and m.name.startswith("1.")} == {"matrix"}
        assert {m.role for m in known if "bias" in m.name} == {"bias"}
        assert known.role("0.weight") == "head"


class Own(nn.Module):
    """Parameters directly on a module of the user's own, by shape."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "gain": (), "gamma": (4,), "unbiased": (4,), "layer_scale": (4, 1, 1), "cls_token": (1, 1, 4),
            "table": (5, 4), "column": (5, 1), "position": (1, 7, 4), "q_bias": (4,), "bias_table": (9, 2),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


def test_parameters_on_a_users_own_module_go_by_their_shape() -> None:
    known = groups(Own())
    assert {role: known.names(role) for role in ROLES if known.names(role)} == {
        "scale": ("gain", "gamma", "unbiased", "layer_scale", "cls_token"),
        "matrix": ("table", "column"),
        "bias": ("q_bias", "bias_table"),
        "other": ("position",),
    }


class Added(nn.Module):
    """A parametrization that is trained itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(size, size))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up


def test_parametrised_modules_keep_the_role_of_what_is_parametrised() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 3, 2)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"),
        parametrizations.weight_norm(nn.Linear(4, 3)),
    )
    parametrize.register_parametrization(model[2], "bias", nn.Identity())
    parametrize.register_parametrization(model[1], "weight", Added(4))
    known = groups(model)
    roles = {member.name: member.role for member in known}
    assert roles["0.parametrizations.weight.original0"] == "scale"
    assert roles["0.parametrizations.weight.original1"] == "conv"
    assert roles["1.parametrizations.weight.original"] == "matrix"
    assert roles["1.parametrizations.weight.1.up"] == "matrix"
    assert roles["2.parametrizations.weight.original"] == "matrix"
    assert roles["2.parametrizations.bias.original"] == "bias"
    assert roles["3.parametrizations.weight_hh_l0.original0"] == "scale"
    assert roles["3.parametrizations.weight_hh_l0.original1"] == "matrix"
    assert roles["4.parametrizations.weight.original1"] == "head"
    assert roles.keys() == dict(model.named_parameters()).keys()
    assert "other" not in roles.values()


def test_the_older_norms_and_pruning_too() -> None:
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv1d(2, 3, 2))
    model = nn.Sequential(
        conv, nn.utils.spectral_norm(nn.Linear(4, 4)), prune.l1_unstructured(nn.Linear(4, 2), "weight", 1)
    )
    roles = {member.name: member.role for member in groups(model)}
    assert (roles["0.weight_g"], roles["0.weight_v"]) == ("scale", "conv")
    assert (roles["1.weight_orig"], roles["2.weight_orig"]) == ("matrix", "head")


def test_names_are_those_of_the_plain_model_under_compile_and_groups_know_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="eager")
    assert list(groups(compiled)) == list(groups(model))
    assert groups(compiled).role("_orig_mod.1.weight") == groups(compiled).role("1.weight") == "head"
    with pytest.raises(KeyError):
        groups(model).role("2.weight")
    assert layer_decay(compiled, 0.5) == layer_decay(model, 0.5)


# --- layers


class Block(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, 2)
        self.gamma = nn.Parameter(torch.ones(size))
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))


class Vit(nn.Module):
    """The names of timm's and BEiT's vision transformers."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)})
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


def beit(name: str, depth: int) -> int:
    """`get_num_layer_for_vit` of BEiT's optim_factory: the layer of a name, of depth + 2 in all."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


@pytest.mark.parametrize("depth", [2, 4, 12])
def test_layer_decay_is_that_of_beit(depth: int) -> None:
    model = Vit(depth)
    got = layer_decay(model, 0.75)
    assert got == pytest.approx(
        {name: 0.75 ** (depth + 1 - beit(name, depth)) for name, _ in model.named_parameters()}, rel=1e-14
    )
    assert got["head.weight"] == got["norm.bias"] == 1.0
    assert min(got.values()) == got["pos_embed"] == 0.75 ** (depth + 1)


def test_each_layer_has_a_2_6th_of_the_rate_above_as_in_ulmfit() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 4), nn.LSTM(4, 4), nn.LSTM(4, 4), nn.Linear(4, 2))
    got = layer_decay(model, 1 / 2.6, blocks=["0", "1", "2", "3", "4"])
    rates = [
        got[name] for name in ("0.weight", "1.weight_ih_l0", "2.bias_hh_l0", "3.weight_hh_l0", "4.weight")
    ]
    assert rates[-1] == 1
    assert [above / below for below, above in pairwise(rates)] == pytest.approx([2.6] * 4)


def test_blocks_are_found_in_the_models_of_transformers() -> None:
    """The layers that the names of real models say."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **small))
    held = layers(bert)
    assert len(held) == 5
    assert all(name.startswith("bert.embeddings.") for name in held[0])
    for i in range(3):
        assert all(name.startswith(f"bert.encoder.layer.{i}.") for name in held[i + 1])
    assert {name.split(".")[-2] for name in held[4]} == {"dense", "classifier"}
    assert groups(bert).names("head") == ("classifier.weight",)

    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2, n_positions=8)
    )
    held = layers(gpt)
    assert held[0] == ("transformer.wte.weight", "transformer.wpe.weight")
    assert [{name.split(".")[2] for name in names} for names in held[1:4]] == [{"0"}, {"1"}, {"2"}]
    assert held[4] == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    assert groups(gpt).role("lm_head.weight") == "embedding"

    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8, 8], depths=[1, 1, 1], layer_type="basic"
        )
    )
    held = layers(resnet)
    assert [len({name.split(".")[3] for name in names}) for names in held[1:4]] == [1, 1, 1]
    assert all("embedder" in name for name in held[0])
    assert all(name.startswith("classifier") for name in held[4])


class Stages(nn.Module):
    """torchvision's resnet: stages that stand beside each other, each of like blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.layer1 = nn.Sequential(Block(), Block())
        self.between = nn.Linear(4, 4)
        self.layer2 = nn.Sequential(Block(), Block(), Block())
        self.fc = nn.Linear(4, 2)


def heads(held: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    return [
        sorted({".".join(name.split(".")[:2]) for name in names if "between" not in name}) for names in held
    ]


def test_all_outermost_containers_of_like_blocks_count_and_names_overrule_them() -> None:
    model = Stages()
    blocks = [["layer1.0"], ["layer1.1"], ["layer2.0"], ["layer2.1"], ["layer2.2"]]
    ends = (["conv1.bias", "conv1.weight"], ["fc.bias", "fc.weight"])
    assert heads(layers(model)) == [ends[0], *blocks, ends[1]]
    assert "between.weight" in layers(model)[2]
    coarse = layers(model, blocks=["layer?"])
    assert [len(names) for names in coarse] == [2, 2 * 11 + 2, 3 * 11, 2]
    turned = layers(model, blocks=["fc", "layer2", "layer1", "conv1"])
    assert [names[0].split(".")[0] for names in turned] == ["fc", "layer2", "layer1", "conv1"]
    with pytest.raises(BadInput, match=r"called 'layer3'\. Did you mean 'layer2'"):
        layers(model, blocks=["layer3"])
    with pytest.raises(BadInput, match="layer1 is named twice"):
        layers(model, blocks=["layer?", "layer1"])
    assert groups(model).names("head") == ("fc.weight",)


def test_experts_and_branches_inside_a_block_are_no_layers() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.ModuleList([Block(), Block()])})

    assert len(layers(nn.Sequential(block(), block(), block()))) == 3


def test_blocks_may_stand_between_a_stem_and_a_head_in_one_container() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block(), nn.ReLU(), Block(), nn.Linear(4, 2))
    held = [sorted({name.split(".")[0] for name in names}) for names in layers(model)]
    assert held == [["0", "1"], ["2"], ["4"], ["5"]]
    assert groups(model).names("head") == ("5.weight",)


def test_a_plain_network_and_a_single_block_have_a_head() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert groups(plain).names("head") == ("2.weight",)
    assert groups(nn.Sequential(plain)).names("head") == ("0.2.weight",)
    assert len(layers(nn.Sequential(plain))) == 2
    assert not groups(nn.Sequential(plain, copy.deepcopy(plain))).names("head")


def test_without_blocks_each_weight_is_a_layer() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(),
        nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    assert [sorted({name.split(".")[0] for name in names}) for names in layers(model)] == [
        ["0", "1", "2", "3"], ["4"], ["6"],
    ]  # fmt: skip
    assert layers(nn.LayerNorm(3)) == (("weight", "bias"),)
    recurrent = nn.Sequential(parametrizations.weight_norm(nn.LSTM(4, 3, 2), "weight_hh_l0"), nn.Linear(3, 2))
    assert [len(names) for names in layers(recurrent)] == [9, 2]
    assert layers(nn.ReLU()) == ()


def trees() -> st.SearchStrategy[nn.Module]:
    leaf = st.sampled_from(
        [lambda: nn.Linear(2, 2), lambda: nn.LayerNorm(2), nn.ReLU, lambda: nn.Embedding(3, 2), Own, Block]
    ).map(lambda kind: kind())
    return st.recursive(
        leaf,
        lambda inner: st.builds(
            lambda kind, held: kind(held) if kind is nn.ModuleList else kind(*held),
            st.sampled_from([nn.Sequential, nn.ModuleList]),
            st.lists(inner, min_size=1, max_size=4),
        ),
        max_leaves=8,
    )


@settings(max_examples=60)
@given(trees(), st.integers(0, 3))
def test_trap_26_layers_roles_and_groups_hold_every_parameter_once(model: nn.Module, shared: int) -> None:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for table in tables[1 : 1 + shared]:
        table.weight = tables[0].weight
    names = [name for name, _ in model.named_parameters()]
    if not names:
        return
    assert [member.name for member in groups(model)] == names
    assert sorted(name for layer in layers(model) for name in layer) == sorted(names)
    held = [
        p
        for group in param_groups(model, 0.1, layer_decay(model, 0.5), no_decay())
        for _, p in group["params"]
    ]
    assert Counter(map(id, held)) == Counter(map(id, model.parameters()))


# --- rates that keep their ratio

SCHEDULES: dict[str, Schedule] = {
    "constant": constant(0.1, warmup=3),
    "linear": linear(0.1, steps=12, warmup=2),
    "step": step(0.1, every=4),
    "exponential": exponential(0.1, every=5),
    "cosine": cosine(0.1, steps=12, end=0.01, warmup=2),
    "wsd": wsd(0.1, steps=12, warmup=2, cooldown=4),
    "branch": branch(constant(0.1), start=5, cooldown=4),
}


def fed(model: nn.Module, step: int) -> None:
    """Gradients by the update and the place of a parameter, whatever the others do."""
    for place, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(1000 * step + place)
            parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", SCHEDULES)
def test_trap_17_multipliers_keep_their_ratio_under_every_schedule(name: str) -> None:
    model, schedule = Vit(), SCHEDULES[name]
    rates = layer_decay(model, 0.7)
    made = param_groups(model, schedule, rates, no_decay())
    optimizer = ds.Optimizer(made, ds.adamw(lr=schedule, weight_decay=0.1))
    for i in range(14):
        for group in optimizer.param_groups:
            for held in group["param_names"]:
                assert group["lr"] == pytest.approx(schedule(i) * rates[held], rel=1e-12)
        fed(model, i)
        optimizer.step()
    decays = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert decays == {m.name: 0.0 if m.role in UNDECAYED else 0.1 for m in groups(model)}


def test_a_step_moves_each_weight_by_its_own_rate() -> None:
    one, two = Vit(), Vit()
    two.load_state_dict(one.state_dict())
    rates = discriminative(one, {"blocks.[01]": 0.25, "bias": 2.0})
    ours = ds.Optimizer(param_groups(one, 0.1, rates), ds.sgd(lr=0.1))
    theirs = torch.optim.SGD(param_groups(two, 0.1, rates))
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    fed(one, 0)
    fed(two, 0)
    ours.step()
    theirs.step()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, before[name] - 0.1 * rates[name] * p.grad)
        torch.testing.assert_close(p, q)


def test_torchs_schedulers_keep_the_ratio_but_for_one_cycle() -> None:
    """Trap 17, live: OneCycleLR gives every group one rate."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    rates = layer_decay(model, 0.5)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, rates))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    low, high = (group["lr"] for group in optimizer.param_groups)
    assert high == pytest.approx(0.05)
    assert low / high == pytest.approx(0.5)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_a_route_finds_its_chain_by_the_role_of_a_group() -> None:
    model = Vit()
    made = param_groups(model, 0.02, layer_decay(model, 0.5), {"matrix": {}})
    optimizer = ds.Optimizer(made, ds.route({"matrix": ds.muon(), "rest": ds.adamw()}))
    found = {name: group["role"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, role in found.items() if role == "matrix"} == {*groups(model).names("matrix")}


# --- freezing


def trained(model: nn.Module, optimizer: Any, frozen: Frozen, steps: range) -> None:
    for i in steps:
        frozen.apply(model, i)
        optimizer.zero_grad()
        fed(model, i)
        optimizer.step()


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_trap_27_what_is_frozen_does_not_move_and_starts_as_new(kind: str) -> None:
    """A weight unfrozen at update 4 goes on as one whose optimizer was made then."""

    def optimizer(model: nn.Module) -> Any:
        if kind == "torch":
            return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        return ds.Optimizer(model, ds.adamw(lr=0.01, weight_decay=0.1))

    model = Vit(2)
    plan = freeze(model, {"blocks.1": 4, "patch_embed": "never", "blocks.0": 6})
    fresh = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = optimizer(model)
    trained(model, made, plan, range(4))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in plan.until), name
        assert p.requires_grad == (name not in plan.until)
    trained(model, made, plan, range(4, 8))
    late = optimizer(fresh)
    for i in range(4, 8):
        late.zero_grad()
        fed(fresh, i)
        late.step()
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if name.startswith("blocks.1"):
            assert torch.equal(p, q), name
        if name.startswith("patch_embed"):
            assert torch.equal(p, before[name]), name


def test_a_plan_is_a_function_of_the_update_and_resumes() -> None:
    model = Vit(2)
    plan = freeze(model, {"head": "1 epoch", "blocks": "50 %", "norm": 3}, run_steps=40, steps_per_epoch=10)
    assert plan.changes == (3, 10, 20)
    straight, jumped = Vit(2), Vit(2)
    for i in range(15):
        plan.apply(straight, i)
    changed = plan.apply(jumped, 14)
    assert [p.requires_grad for p in straight.parameters()] == [p.requires_grad for p in jumped.parameters()]
    assert {*changed} == {*plan.at(14)} == {n for n, p in jumped.named_parameters() if not p.requires_grad}
    assert plan.apply(jumped, 14) == ()


def test_gradual_unfreezing_goes_from_the_head_down_a_layer_at_a_time() -> None:
    model = Vit(3)
    plan = gradual_unfreeze(model, "1 epoch", steps_per_epoch=10)
    assert plan.changes == (10, 20, 30, 40)
    assert plan.until.keys() == dict(model.named_parameters()).keys()
    for i, trains in [(0, {"norm", "head"}), (9, {"norm", "head"}), (10, {"blocks.2"}), (39, {"blocks.0"})]:
        frozen = {*plan.at(i)}
        live = {name for name in plan.until if name not in frozen}
        assert any(name.startswith(tuple(trains)) for name in live)
        assert ("blocks.2.gamma" in live) == (i >= 10)
        assert ("pos_embed" in live) == (i >= 40)
    assert plan.at(40) == ()


def test_the_first_pattern_counts_and_what_takes_nothing_is_refused() -> None:
    model = Vit(2)
    known = groups(model)
    taken = known.taken(["norm", "blocks.*", "*"])
    assert [*taken] == [member.name for member in known]
    assert taken["blocks.0.norm.weight"] == "norm"
    assert taken["blocks.0.mlp.0.weight"] == "blocks.*"
    assert taken["pos_embed"] == "*"
    assert {*known.taken(["blocks.1"])} == {m.name for m in known if m.name.startswith("blocks.1.")}
    with pytest.raises(BadInput, match=r"has the role 'block\.\*'\. Did you mean 'blocks'"):
        freeze(model, {"block.*": 3})
    with pytest.raises(BadInput, match=r"'blocks\.0' takes nothing that 'blocks' has not taken before"):
        discriminative(model, {"blocks": 0.1, "blocks.0": 0.2})
    with pytest.raises(BadInput, match=r"'conv2'\. Did you mean 'conv'"):
        freeze(model, {"conv2": "never"})


def test_a_tied_weight_is_taken_under_any_of_its_names() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["table"].weight
    for pattern in ("table", "out", "out.*", "embedding"):
        assert discriminative(model, {pattern: 0.5}) == {"table.weight": 0.5}


def test_what_was_frozen_by_hand_and_is_not_in_the_plan_stays_frozen() -> None:
    model = Vit(2)
    model.head.requires_grad_(False)
    freeze(model, {"blocks": 5}).apply(model, 5)
    assert not model.head.weight.requires_grad
    assert model.blocks[0].gamma.requires_grad


def test_a_wrapped_model_that_noted_what_is_trained_is_refused(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        plan = freeze(model, {"0": 5})
        plan.apply(model, 0)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert plan.apply(wrapped, 4) == ()
        with pytest.raises(BadInput, match="DDP noted what is trained"):
            plan.apply(wrapped, 5)
        assert not model[0].weight.requires_grad
        assert plan.apply(model, 5) == ("0.weight", "0.bias")
    finally:
        dist.destroy_process_group()


# --- decay, tables, errors


def test_no_decay_is_by_role_and_what_recipes_take() -> None:
    recipe = ds.Recipe(ds.chain(ds.adamw(lr=1e-3)), steps=10, batch_size=4, roles=no_decay())
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2))
    decays = {name: g["weight_decay"] for g in recipe.build(model).param_groups for name in g["param_names"]}
    assert {name for name, decay in decays.items() if decay} == {"2.weight", "4.weight"}
    assert no_decay("norm") == {"norm": {"weight_decay": 0.0}}
    with pytest.raises(BadInput, match="'norms'. Did you mean 'norm'"):
        no_decay("norms")


def test_the_table_says_who_is_where() -> None:
    model = nn.Sequential(nn.Linear(40, 300), nn.LayerNorm(300), nn.Linear(300, 2, bias=False))
    rates = layer_decay(model, 0.5)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, rates, {"norm": {"weight_decay": 0.0}})[:2])
    plan = freeze(model, {"0": 100, "norm": "never"})
    assert roster(model, optimizer, rates, plan).splitlines() == [
        "role    parameter  shape   numbers  group    lr  decay  rate ×  trained from",
        "matrix  0.weight   300×40   12,000      0  0.05   0.01     0.5           100",
        "bias    0.bias     300         300      0  0.05   0.01     0.5           100",
        "norm    1.weight   300         300      1  0.05      0     0.5         never",
        "norm    1.bias     300         300      1  0.05      0     0.5         never",
        "head    2.weight   2×300       600   none     -      -       1             0",
    ]
    assert roster(model, ds.Optimizer(model, ds.sgd(lr=0.1))).splitlines()[-1].split() == [
        "head", "2.weight", "2×300", "600", "0", "0.1", "-",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: layer_decay(m, -1), "factor must be a number at least 0, got -1"),
        (lambda m: discriminative(m, {"*": "fast"}), r"multiplier of '\*' must be a number at least 0"),
        (lambda m: discriminative(m, {"*": float("inf")}), "must be a number at least 0, got inf"),
        (lambda m: param_groups(m, 0.1, {"haed.weight": 2.0}), "Did you mean 'head.weight'"),
        (lambda m: param_groups(m, 0.1, roles={"nrm": {}}), "unknown role 'nrm'. Did you mean 'norm'"),
        (lambda m: freeze(m, {"head": "nevr"}), "durations or 'never', got 'nevr'. Did you mean 'never'"),
        (lambda m: freeze(m, {"head": "3 epochs"}), "steps_per_epoch must be given"),
        (lambda m: freeze(m, {"head": -3}), "head must be a whole number of steps"),
        (lambda m: Frozen({"heat.weight": 3}).apply(m, 0), "no parameter 'heat.weight'. Did you mean 'head."),
    ],
)
def test_what_is_wrong_is_said(call: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        call(Vit(2))


def test_every_kind_of_schedule_that_stands_alone_is_tried() -> None:
    assert {*SCHEDULES} <= {*KINDS}
