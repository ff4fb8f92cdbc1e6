"""Initialisation against torch.nn.init, closed forms, and the papers' algorithms written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downslope import init
from downslope.errors import BadInput


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(model: nn.Module, *, weights: bool = True) -> list[Any]:
    tensors = [*(model.parameters() if weights else ()), *model.buffers()]
    modes = [module.training for module in model.modules()]
    return [
        *(t.detach().clone() for t in tensors),
        torch.get_rng_state(),
        modes,
        [p.grad for p in model.parameters()],
    ]


def same(one: list[Any], two: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, two, strict=True))


# Gains


@pytest.mark.parametrize("name", ["linear", "relu", "tanh", "sigmoid", "selu", "leaky_relu"])
def test_gains_are_torchs_where_it_has_them(name: str) -> None:
    assert init.gain(name) == nn.init.calculate_gain(name)


@pytest.mark.parametrize(
    "module", [nn.GELU(), nn.SiLU(), nn.ELU(), nn.Mish(), nn.Softplus(), nn.GELU(approximate="tanh")]
)
def test_other_gains_keep_the_second_moment(module: nn.Module) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    squares = module(torch.from_numpy(nodes)).numpy() ** 2
    expected = 1 / math.sqrt((weights * squares).sum() / math.sqrt(2 * math.pi))
    assert init.gain(module) == pytest.approx(expected, rel=1e-4)


def test_gains_know_the_slope_of_a_module() -> None:
    assert init.gain(nn.LeakyReLU(0.3)) == nn.init.calculate_gain("leaky_relu", 0.3)
    assert init.gain(nn.PReLU(init=0.5)) == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.5))
    assert init.gain(nn.RReLU(0.1, 0.3)) == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.2))
    assert init.gain(2) == 2.0
    with pytest.raises(BadInput, match=r"'rellu'.*Did you mean 'relu'"):
        init.gain("rellu")
    with pytest.raises(BadInput, match="'Softmax'"):
        init.gain(nn.Softmax(-1))


class Functional(nn.Module):
    """Activations as functions, a layer that nothing bends, and one that goes two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.act = nn.LayerNorm(4), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.norm(self.a(x)), 0.2)
        x = torch.tanh(functional.dropout(self.b(x), 0.1, self.training).view(-1, 4))
        x = self.act(self.c(x)) + x
        y = self.d(x)
        return y * y.sigmoid()


class Branching(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.isfinite().all()) else x


def named(found: dict[str, str | nn.Module]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else type(value).__name__ for key, value in found.items()}


def test_the_activation_that_follows_is_found_in_the_calls() -> None:
    found = init.following(Functional().train())
    assert named(found) == {"a": "LeakyReLU", "b": "tanh", "c": "GELU", "d": "linear"}
    assert init.gain(found["a"]) == nn.init.calculate_gain("leaky_relu", 0.2)


def test_or_in_the_order_of_the_modules_and_in_transformer_layers() -> None:
    assert named(init.following(Branching())) == dict.fromkeys("abc", "linear") | {"d": "GELU"}
    block = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3)
    )
    assert named(init.following(block)) == {"0": "ReLU", "4": "linear"}
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu")
    assert named(init.following(layer)) == {
        "linear1": "gelu",
        "linear2": "linear",
        "self_attn.out_proj": "linear",
    }
    layer.activation = lambda x: x.square()
    assert named(init.following(layer))["linear1"] == "linear"


# By the size of the layer

REFERENCES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "xavier_uniform": lambda w, g: nn.init.xavier_uniform_(w, math.sqrt(2), generator=g),
    "xavier_normal": lambda w, g: nn.init.xavier_normal_(w, math.sqrt(2), generator=g),
    "kaiming_uniform": lambda w, g: nn.init.kaiming_uniform_(w, nonlinearity="relu", generator=g),
    "kaiming_normal": lambda w, g: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g),
    "orthogonal": lambda w, g: nn.init.orthogonal_(w, math.sqrt(2), generator=g),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(3, 8, 3), nn.Conv1d(4, 2, 5)], ids=repr)
def test_weights_are_the_numbers_that_torch_draws(layer: nn.Module, method: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(copy.deepcopy(layer), nn.ReLU()).to(dtype)
    state = torch.get_rng_state()
    init.initialise(model, method, generator=3)
    assert torch.equal(torch.get_rng_state(), state)
    expected = REFERENCES[method](torch.empty_like(model[0].weight), seeded(3))
    torch.testing.assert_close(model[0].weight.detach(), expected.detach())
    assert not model[0].bias.any()


def test_aliases_fans_and_gains_by_name() -> None:
    one, two = nn.Linear(6, 3), nn.Linear(6, 3)
    init.initialise(one, "he_normal", fan="out", follows="tanh", generator=seeded(1))
    nn.init.kaiming_normal_(two.weight, mode="fan_out", nonlinearity="tanh", generator=seeded(1))
    torch.testing.assert_close(one.weight, two.weight)
    init.initialise(one, "glorot_uniform", follows=0.5, generator=1)
    nn.init.xavier_uniform_(two.weight, 0.5, generator=seeded(1))
    torch.testing.assert_close(one.weight, two.weight)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(32, 64, 3, groups=4), (32, 32, 16, 16)),
        (nn.ConvTranspose2d(32, 16, 4, stride=2), (8, 32, 12, 12)),
        (nn.ConvTranspose1d(32, 64, 6, stride=3, groups=2), (16, 32, 40)),
        (nn.Bilinear(16, 24, 200), (400, 16)),
        (nn.Linear(64, 32), (400, 64)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("method", ["kaiming_normal", "kaiming_uniform"])
def test_the_variance_of_the_signal_is_kept_by_groups_strides_and_pairs(
    layer: nn.Module, shape: tuple[int, ...], method: str
) -> None:
    """torch's own fan of a transposed convolution gives 4 times too little here."""
    init.initialise(layer, method, generator=0)
    x = torch.randn(shape, generator=seeded(1))
    with torch.no_grad():
        out = (
            layer(x, torch.randn(400, 24, generator=seeded(2)))
            if isinstance(layer, nn.Bilinear)
            else layer(x)
        )
    inner = out[(..., *[slice(4, -4)] * (out.ndim - 2))] if out.ndim > 2 else out
    assert float(inner.var()) == pytest.approx(1, abs=0.12)


def test_gates_and_heads_are_matrices_of_their_own() -> None:
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(6, 6), "attention": nn.MultiheadAttention(8, 2), "cell": nn.GRUCell(5, 5)}
    )
    done = init.initialise(model, "orthogonal", generator=0)
    matrices = [*model["lstm"].weight_hh_l0.chunk(4), *model["attention"].in_proj_weight.chunk(3)]
    matrices += [*model["cell"].weight_ih.chunk(3), model["attention"].out_proj.weight]
    for matrix in matrices:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    assert not any(bool(p.any()) for name, p in model.named_parameters() if "bias" in name)
    assert done.left == ()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 10, bias=False)
        self.embedding = nn.Embedding(10, 6, padding_idx=2)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.full((6,), 3.0))
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x)) * self.scale)


def test_norms_embeddings_tied_and_unknown_parameters() -> None:
    model = Mixed()
    with torch.no_grad():
        model.norm.weight.fill_(5), model.norm.bias.fill_(5), model.norm.running_mean.fill_(5)
    done = init.initialise(model, embedding=0.5, generator=0)
    weight = model.embedding.weight.detach()
    assert model.head.weight is model.embedding.weight
    assert not weight[2].any()
    assert float(weight.std()) == pytest.approx(0.5, rel=0.25)
    assert (model.norm.weight == 1).all()
    assert not model.norm.bias.any()
    assert not model.norm.running_mean.any()
    assert done.left == ("scale",)
    assert (model.scale == 3).all()
    assert [row.name for row in done.layers] == ["embedding", "norm"]
    assert "left as it was" in str(done)


def test_the_table_says_what_was_done_and_why() -> None:
    done = init.initialise(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)))
    assert [(row.name, row.done, row.follows) for row in done.layers] == [
        ("0", "kaiming_normal × 1.414, bias 0", "relu"),
        ("1", "1 and 0", ""),
        ("3", "kaiming_normal × 1, bias 0", ""),
    ]


def test_half_precision_gets_the_same_numbers_rounded() -> None:
    one, two = nn.Linear(6, 6), nn.Linear(6, 6).bfloat16()
    init.initialise(one, "orthogonal", generator=0), init.initialise(two, "orthogonal", generator=0)
    assert torch.equal(one.weight.bfloat16(), two.weight)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(BadInput, match=r"'kaiming_norml'.*Did you mean 'kaiming_normal'"):
        init.initialise(nn.Linear(2, 2), "kaiming_norml")
    with pytest.raises(BadInput, match="fan is 'in' or 'out', got 'both'"):
        init.initialise(nn.Linear(2, 2), fan="both")
    with pytest.raises(BadInput, match="no shape yet"):
        init.initialise(nn.Sequential(nn.LazyLinear(2)))


# LSUV


def deep(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(2, width, 3),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(width),
        nn.Flatten(),
    ]
    layers += [nn.Linear(width * 9, width), nn.Dropout(0.5), nn.Tanh(), nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, 5))


X = torch.randn(32, 2, 5, 5, generator=seeded(9)) * 3 + 1


def test_lsuv_is_algorithm_1_of_the_paper() -> None:
    model = deep()
    reference = copy.deepcopy(model)
    init.initialise(reference, "orthogonal", follows="linear", generator=4)
    for module in reference:  # one forward pass of everything for each rescaling, as printed
        module.train(isinstance(module, nn.BatchNorm2d))
    for place, module in enumerate(reference):
        for _ in range(10 if isinstance(module, nn.Linear | nn.Conv2d) else 0):
            with torch.no_grad():
                variance = float(reference[: place + 1](X).var(correction=0))
                if abs(variance - 1) < 0.1:
                    break
                module.weight /= math.sqrt(variance)
    rows = init.lsuv(model, X, generator=4)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert [row.layer for row in rows] == ["0", "4", "7", "9"]
    assert all(row.converged and abs(row.after - 1) <= 0.1 for row in rows)
    assert any(row.passes for row in rows)


def test_lsuv_brings_weights_with_biases_within_a_narrow_tolerance() -> None:
    model = deep().double()
    rows = init.lsuv(model, X.double(), start=None, tolerance=1e-6, passes=50)
    assert all(row.converged for row in rows)
    model.eval()
    model[2].train()
    found: list[float] = []
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, out: found.append(float(out.detach().var(correction=0)))
            )
    model(X.double())
    assert found == pytest.approx([1] * 4, abs=1e-5)


def test_trap_46_lsuv_and_the_check_leave_all_but_weights_as_it_was() -> None:
    model = deep().train()
    model[5].eval()
    before = everything(model, weights=False)
    init.lsuv(model, X, generator=0)
    assert same(everything(model, weights=False), before)
    whole = everything(model)
    init.check(model, (X, 1), loss=lambda m, b: m(b[0]).square().mean())
    assert same(everything(model), whole)
    with pytest.raises(BadInput, match="'0' are not finite"):
        init.lsuv(model, X * math.inf, start=None)
    assert same(everything(model), whole)


def test_lsuv_leaves_what_it_cannot_scale() -> None:
    shared = nn.Linear(4, 4)
    tied, constant = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = shared.weight
    nn.init.zeros_(constant.weight)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(shared, tied, normed, constant)
    before = [p.detach().clone() for p in model.parameters()]
    rows = init.lsuv(model, torch.randn(8, 4, generator=seeded()) * 9, start=None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(row.converged or row.passes for row in rows)


# Residual branches


class Block(nn.Module):
    """As in ResNets: norm at the end of the branch, a projection where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        same_width = width == out
        self.skip = (
            nn.Sequential() if same_width else nn.Sequential(nn.Conv2d(width, out, 1), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        y += self.skip(x)
        return torch.relu(y)


class PreNorm(nn.Module):
    """As in language models: two branches, dropout that depends on the mode, a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.down(functional.gelu(self.up(self.norm2(x)))) * self.scale
        if self.training:
            y = y * (torch.rand(y.shape[0], 1, 1) > 0.2)
        return x + y


def test_zeroed_blocks_are_their_skips() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(3, 3), Block(3, 6))
    zeroed = init.zero_residual(model)
    assert zeroed.layers == ("0.norm2", "1.norm2")
    assert zeroed.left == {}
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(model[0](x), x.relu())
    assert torch.equal(model[1](x), model[1].skip(x).relu())
    assert "0.norm2" in str(zeroed)


@pytest.mark.parametrize("first", [True, False])
def test_zeroed_transformer_layers_add_nothing(first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first)
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=first)
    assert init.zero_residual(layer).layers == ("self_attn.out_proj", "linear2")
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert init.zero_residual(stack).layers[2:] == ("layers.1.self_attn.out_proj", "layers.1.linear2")
    assert init.zero_residual(decoder).layers == ("self_attn.out_proj", "multihead_attn.out_proj", "linear2")
    x = torch.randn(2, 5, 8)
    expected = x if first else layer.norm2(layer.norm1(x))
    torch.testing.assert_close(layer.train()(x), expected)


def test_branches_of_ones_own_are_found_in_any_mode() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), PreNorm(), PreNorm(), nn.Linear(8, 5)).train()
    before = everything(model, weights=False)
    zeroed = init.zero_residual(model)
    assert same(everything(model, weights=False), before)
    assert zeroed.layers == ("1.attention.out_proj", "1.down", "2.attention.out_proj", "2.down")
    tokens = torch.randint(5, (2, 7))
    torch.testing.assert_close(model(tokens), model[3](model[0](tokens)))


class Other(nn.Module):
    """Additions that are no residual branches, and branches that have no one end."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(5, 4), nn.Embedding(9, 4)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place(torch.arange(x.shape[1]))
        h = h + torch.sigmoid(self.a(h))
        h = h + self.b(h) * self.c(h)
        return self.a(h) + self.b(h)


def test_what_is_no_branch_or_has_no_end_is_left_and_named() -> None:
    model = Other()
    before = everything(model)
    zeroed = init.zero_residual(model)
    assert same(everything(model), before)
    assert zeroed.layers == ()
    assert list(zeroed.left) == ["add_1", "add_2"]


def test_branches_named_by_the_user() -> None:
    model = nn.Sequential(Block(3, 3), nn.Linear(2, 2))
    assert init.zero_residual(model, ["0.conv2"]).layers == ("0.conv2",)
    assert not model[0].conv2.weight.any()
    assert not model[0].conv2.bias.any()
    assert model[0].norm2.weight.all()
    with pytest.raises(BadInput, match=r"'0.conv3' is no linear.*Did you mean '0.conv2'"):
        init.zero_residual(model, ["0.conv3"])
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert init.zero_residual(tied, ["1"]).left == {"1": "its weight is tied to another layer's"}
    assert tied[1].weight.any()


# The check


def plain(depth: int = 8, width: int = 64) -> nn.Sequential:
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU(inplace=True))]
    model = nn.Sequential(*layers[:-1])
    init.initialise(model, generator=0)
    return model


BATCH = torch.randn(256, 64, generator=seeded(5))


def test_a_well_initialised_model_is_in_order_and_the_numbers_are_numpys() -> None:
    model = plain()
    found = init.check(model, BATCH, loss=lambda m, x: m(x).square().mean())
    assert found.off == ()
    assert found.verdict == "every layer keeps the signal's size"
    outputs = []
    x = BATCH
    for module in model:
        x = module(x.clone())
        if isinstance(module, nn.Linear):
            outputs.append(x)
            x.retain_grad()
    x.square().mean().backward()
    before = float(BATCH.std(correction=0))
    for row, out in zip(found.layers, outputs, strict=True):
        a, g = out.detach().numpy(), out.grad.numpy()
        assert (row.mean, row.std) == (pytest.approx(a.mean(), abs=1e-5), pytest.approx(a.std(), rel=1e-4))
        assert row.ratio == pytest.approx(a.std() / before, rel=1e-4)
        assert row.gradient == pytest.approx(g.std(), rel=1e-4)
        before = a.std()


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_the_layer_whose_weights_are_off_is_named_and_mended(factor: float) -> None:
    model = plain()
    with torch.no_grad():
        model[6].weight *= factor
    found = init.check(model, BATCH)
    assert [row.layer for row in found.off] == ["6"]
    assert f"its weights are {factor:.2g} times as large" in found.verdict
    assert found.layers[0].gradient is None
    init.initialise(model, generator=0)
    assert not init.check(model, BATCH).off


def test_torchs_default_fades_and_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(part for _ in range(8) for part in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 3)
    )
    found = init.check(model, BATCH, loss=lambda m, x: m(x).square().mean())
    assert found.off[0].layer == "0"
    assert "initialise, or lsuv" in found.verdict
    assert "gradients vanish" in found.verdict
    init.lsuv(model, BATCH, generator=0)
    assert not init.check(model, BATCH).off


def test_slow_drift_is_named_where_it_has_added_up() -> None:
    model = plain(depth=8)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight *= 0.6  # each within the bounds of one layer
    (row,) = init.check(model, BATCH).off
    assert "since the first layer" in row.verdict
    assert row.layer == "10"  # 0.6 to the fifth


def test_data_of_the_wrong_size_constants_and_infinities_are_told_apart() -> None:
    model = plain()
    (row,) = init.check(model, BATCH * 255).off
    assert (row.layer, row.verdict) == ("0", "its input has size 2.5e+02; standardise the data")
    nn.init.zeros_(model[14].weight)
    assert "constant: right only at the end" in init.check(model, BATCH).verdict
    nn.init.constant_(model[14].weight, math.inf)
    assert "14: its outputs are not finite" in init.check(model, BATCH).verdict


def test_embeddings_attention_and_layers_called_twice_have_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.line = nn.Embedding(5, 8), nn.Linear(8, 8)
            self.attention, self.rnn = nn.MultiheadAttention(8, 2), nn.GRU(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.line(self.line(self.embed(x)))
            return self.rnn(self.attention(x, x, x)[0])[0]

    found = init.check(Twice(), torch.randint(5, (6, 2)), loss=lambda m, x: m(x).mean())
    assert [row.layer for row in found.layers] == ["embed", "line", "line (call 2)", "attention", "rnn"]
    assert all(row.gradient is not None for row in found.layers)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "mean", "std", "ratio", "gradient", "std", "off"]
    assert len(lines) >= 7


def test_a_model_without_layers_or_trainable_weights() -> None:
    with pytest.raises(BadInput, match="ReLU called no layer"):
        init.check(nn.ReLU(), BATCH)
    frozen = plain().requires_grad_(False)
    assert init.check(frozen, BATCH, loss=lambda m, x: m(x).mean()).layers[0].gradient is None
