"""BatchNorm's tools against torch's own layers and against NumPy written from the papers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from downslope import norm
from downslope.errors import BadInput


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * 9, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).to(dtype)
    with torch.no_grad():
        for layer in (model[1], model[6]):
            layer.weight.uniform_(0.5, 2), layer.bias.normal_()
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return model


def images(seed: int, count: int = 16) -> Tensor:
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed)).double() * 2 + 1


def everything(model: nn.Module) -> list[Any]:
    """All that a probe must leave alone, bit for bit."""
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    modes = [module.training for module in model.modules()]
    return [*tensors, torch.get_rng_state(), modes, [p.grad for p in model.parameters()]]


def same(one: list[Any], two: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, two, strict=True))


# What the two modes do


def test_the_gap_of_one_layer_is_what_numpy_finds() -> None:
    layer = network()[1]
    x = images(1)[:, :1].expand(-1, 4, -1, -1) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)
    (gap,) = norm.compare(nn.Sequential(layer), x)
    a = x.numpy()
    mean, variance = a.mean((0, 2, 3)), a.var((0, 2, 3))
    m, v, w, b = (
        t.detach().numpy() for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    assert gap.mean == pytest.approx(np.sqrt(((mean - m) ** 2 / (v + 1e-5)).mean()), rel=1e-5)
    assert gap.variance == pytest.approx(np.exp(np.log((variance + 1e-5) / (v + 1e-5)).mean()), rel=1e-5)
    line = (4, 1, 1)
    trained = (a - mean.reshape(line)) / np.sqrt(variance.reshape(line) + 1e-5) * w.reshape(line)
    evaluated = (a - m.reshape(line)) / np.sqrt(v.reshape(line) + 1e-5) * w.reshape(line)
    distance = np.sqrt(((trained - evaluated) ** 2).mean()) / (trained + b.reshape(line)).std()
    assert gap.output == pytest.approx(distance, rel=1e-5)
    assert gap.through == pytest.approx(gap.output, rel=1e-6)


def test_gaps_add_up_through_the_layers_with_dropout_off() -> None:
    model, x = network(), images(1)
    before = everything(model.train())
    gaps = norm.compare(model, (x, "labels"))
    assert same(everything(model), before)
    assert [gap.layer for gap in gaps] == ["1", "6"]
    quiet = copy.deepcopy(model)
    quiet[4].p = 0.0
    trained = quiet[:7].train()(x).detach()
    evaluated = copy.deepcopy(model)[:7].eval()(x).detach()
    expected = float((trained - evaluated).square().mean().sqrt() / trained.std(correction=0))
    assert gaps.layers[1].through == pytest.approx(expected, rel=1e-5)
    assert str(gaps).splitlines()[0].split() == ["layer", "mean", "variance", "output", "through"]


def test_statistics_of_the_batch_itself_leave_no_gap_and_neither_does_freezing() -> None:
    model, x = network(), images(1)
    assert max(gap.output for gap in norm.compare(model, x)) > 0.1
    norm.freeze(model)
    assert max(gap.through for gap in norm.compare(model, x)) == 0
    norm.unfreeze(model)
    norm.recalibrate(model, [x])
    for gap in norm.compare(model, x):
        assert gap.mean < 1e-6
        assert gap.variance == pytest.approx(1, abs=0.07)  # n / (n - 1) of the unbiased estimate, n = 16
        assert gap.output < 0.04


def test_a_layer_without_running_statistics_has_one_mode() -> None:
    (gap,) = norm.compare(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), torch.randn(8, 3))
    assert (gap.mean, gap.variance, gap.output, gap.through) == (0, 1, 0, 0)


@pytest.mark.parametrize("tool", [norm.compare, norm.recalibrate])
def test_a_model_without_batchnorm_is_refused(tool: Callable[..., Any]) -> None:
    with pytest.raises(BadInput, match="Linear has no BatchNorm"):
        tool(nn.Linear(2, 2), torch.zeros(3, 2))


# Running statistics measured anew


def test_even_batches_give_what_torch_gives() -> None:
    model = network()
    model[4].p = 0.0  # torch leaves dropout on
    batches = [images(seed) for seed in range(5)]
    reference = copy.deepcopy(model)
    update_bn(batches, reference)
    norm.recalibrate(model, batches)
    for (name, mine), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_trap_38_ragged_batches_are_weighted_by_their_items() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2)).double()
    model[0].running_mean.fill_(7)
    batches = [images(0, 16), images(1, 3) * 4, images(2, 2)[:, :, :2]]
    norm.recalibrate(model, iter(batches))
    flat = [batch.movedim(1, -1).reshape(-1, 2).numpy() for batch in batches]
    weights = [len(part) for part in flat]
    mean = np.concatenate(flat).mean(0)
    variance = np.average([part.var(0, ddof=1) for part in flat], axis=0, weights=weights)
    np.testing.assert_allclose(model[0].running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(model[0].running_var.numpy(), variance, rtol=1e-12)
    assert int(model[0].num_batches_tracked) == 3


def test_only_the_statistics_change_and_dropout_is_off() -> None:
    model = network()
    before = everything(model.train())
    norm.recalibrate(model, [images(0)])
    after = everything(model)
    first = len(list(model.parameters()))
    assert same(before[:first] + before[-3:], after[:first] + after[-3:])
    once = model[6].running_mean.clone()
    norm.recalibrate(model, [images(0)])
    assert torch.equal(model[6].running_mean, once)


def test_half_precision_statistics_do_not_stall() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1)).bfloat16()
    batches = [torch.full((2, 1), float(k)).bfloat16() + torch.tensor([[-1.0], [1.0]]) for k in range(200)]
    norm.recalibrate(model, [batch.bfloat16() for batch in batches])
    assert float(model[0].running_mean) == pytest.approx(99.5, rel=2**-8)


def failing() -> Iterator[Tensor]:
    yield images(0)
    raise KeyError("the loader's own")


def test_trap_46_the_live_statistics_come_back_also_after_an_exception() -> None:
    model = network()
    before = everything(model)
    with norm.recalibrated(model, [images(0), images(1)]) as inside:
        assert inside is model
        assert not same(everything(model), before)
    assert same(everything(model), before)
    with pytest.raises(KeyError), norm.recalibrated(model, [images(0)]):
        raise KeyError
    assert same(everything(model), before)
    for use in (norm.recalibrate, lambda m, b: norm.recalibrated(m, b).__enter__()):
        with pytest.raises(KeyError, match="loader"):
            use(model, failing())
        assert same(everything(model), before)


def test_trap_43_statistics_of_averaged_weights_are_recomputed_and_not_averaged() -> None:
    model = network()
    averaged = AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    averaged.update_parameters(model)
    stale = averaged.module[1].running_mean.clone()
    norm.recalibrate(averaged, [images(0)])
    expected = averaged.module[0](images(0)).mean((0, 2, 3))
    torch.testing.assert_close(averaged.module[1].running_mean, expected.detach())
    assert not torch.allclose(stale, expected)


def test_what_cannot_be_measured_is_refused() -> None:
    model = network()
    before = everything(model)
    with pytest.raises(BadInput, match="no batches"):
        norm.recalibrate(model, [])
    with pytest.raises(BadInput, match="one value per channel"):
        norm.recalibrate(model, [images(0), images(1, 1)])
    assert same(everything(model), before)


def test_layers_that_are_not_called_are_not_passed_over_in_silence() -> None:
    for tool, given in ((norm.compare, images(0)), (norm.recalibrate, [images(0)])):
        with pytest.raises(BadInput, match="no BatchNorm layer was called"):
            tool(network(), given, call=lambda model, batch: model[0](batch))


def test_what_is_frozen_is_not_recalibrated() -> None:
    model = network()
    norm.freeze(model)
    before = everything(model)
    norm.recalibrate(model, [images(0)])
    assert same(everything(model), before)


# Freezing


def test_frozen_layers_evaluate_through_a_later_train() -> None:
    model = network()
    model[4].p = 0.0
    expected = copy.deepcopy(model).eval()(images(0))
    assert norm.freeze(model) == ("1", "6")
    assert model[1].train() is model[1]
    for held in (model, copy.deepcopy(model)):
        buffers = [buffer.clone() for buffer in held.buffers()]
        assert torch.equal(held.train()(images(0)), expected)
        assert all(torch.equal(a, b) for a, b in zip(buffers, held.buffers(), strict=True))
        held(images(0)).sum().backward()
        assert held[1].weight.grad is not None


def test_a_model_compiled_before_notices_that_it_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(8, 3)
    compiled.train()(x)
    norm.freeze(compiled)
    before = [buffer.clone() for buffer in model.buffers()]
    compiled.train()(x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    norm.unfreeze(compiled)
    compiled.train()(x)
    assert int(model[1].num_batches_tracked) == 2


def test_freezing_is_undone_whole_on_copies_too() -> None:
    model = network()
    model[1].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    reference = copy.deepcopy(model)
    norm.freeze(model, affine=True)
    assert not any(p.requires_grad for layer in (model[1], model[6]) for p in layer.parameters())
    norm.freeze(model)  # again, and otherwise
    assert [p.requires_grad for p in model.parameters()] == flags
    norm.freeze(model, affine=True)
    twin = copy.deepcopy(model)
    for held in (model, twin):
        assert norm.unfreeze(held) == ("1", "6")
        assert norm.unfreeze(held) == ()
        assert [p.requires_grad for p in held.parameters()] == flags
    torch.manual_seed(3)
    expected = reference.train()(images(0))
    torch.manual_seed(3)
    assert torch.equal(model.train()(images(0)), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))


# Folding

SIZES = {1: (6,), 2: (6, 5), 3: (4, 5, 3)}
PAIRS: dict[str, tuple[Callable[..., nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "linear": (lambda **k: nn.Linear(4, 6, **k), nn.BatchNorm1d, (9, 4)),
    "ghost": (lambda **k: nn.Linear(4, 6, **k), norm.GhostBatchNorm1d, (9, 4)),
    "sync": (lambda **k: nn.Conv2d(4, 6, 3, **k), nn.SyncBatchNorm, (9, 4, 6, 5)),
    "grouped": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, padding=1, **k), nn.BatchNorm2d, (9, 4, 6, 5)),
    "grouped transposed": (
        lambda **k: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, **k),
        nn.BatchNorm2d,
        (9, 4, 6, 5),
    ),
}
for d, size in SIZES.items():
    batch_norm = getattr(nn, f"BatchNorm{d}d")
    for kind in (f"Conv{d}d", f"ConvTranspose{d}d"):
        layer = getattr(nn, kind)
        PAIRS[kind] = (lambda layer=layer, **k: layer(4, 6, 3, stride=2, **k), batch_norm, (9, 4, *size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_folding_keeps_the_outputs(pair: str, affine: bool, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, kind, shape = PAIRS[pair]
    model = nn.Sequential(make(bias=bias), kind(6, affine=affine), nn.Tanh()).to(dtype)
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.3, 3)
    if affine:
        nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
    x = torch.randn(shape, dtype=dtype)
    before = everything(model)
    folded = norm.fold(model, x)
    assert same(everything(model), before)
    assert isinstance(model[1], kind)
    assert folded.pairs == (("1", "0"),)
    assert folded.kept == {}
    assert isinstance(folded.model[1], nn.Identity)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(folded.model(x), model.eval()(x), rtol=tolerance, atol=tolerance)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # a branch on the mode, which a trace of the evaluation leaves behind
            x = x + 0.0
        return torch.relu(self.last(x + self.norm(self.conv(x))))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class Odd(nn.Module):
    """Every reason against folding that a graph shows."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("twice", "fork", "read", "parametrised", "hooked", "tied", "other"):
            setattr(self, name, nn.Linear(3, 3))
            setattr(self, f"{name}_norm", nn.BatchNorm1d(3))
        self.first_norm, self.shared_norm = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.alias = self.shared_norm
        self.bare, self.bare_norm = nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)
        self.unused_norm = nn.BatchNorm1d(3)
        self.own, self.own_norm = Doubled(3, 3), nn.BatchNorm1d(3)
        self.other.weight = self.tied.weight
        nn.utils.parametrizations.weight_norm(self.parametrised)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own_norm(self.own(self.shared_norm(self.first_norm(x))))
        x = self.twice_norm(self.twice(self.twice(x)))
        y = self.fork(x)
        x = self.fork_norm(y) + y
        x = self.read_norm(self.read(x)) + self.read.bias
        x = self.bare_norm(self.bare(self.parametrised_norm(self.parametrised(x))))
        return self.tied_norm(self.tied(self.hooked_norm(self.hooked(x)))) + self.other_norm(self.other(x))


WHY = {
    "first_norm": "no linear or convolution layer",
    "shared_norm": "shared, as shared_norm and alias",
    "twice_norm": "twice, before it, is used twice",
    "fork_norm": "what fork gives is also used",
    "read_norm": "is also read",
    "parametrised_norm": "is parametrised",
    "hooked_norm": "has hooks",
    "tied_norm": "shares a weight",
    "other_norm": "shares a weight",
    "bare_norm": "keeps no running statistics",
    "own_norm": "no linear or convolution layer",
    "unused_norm": "no trace shows",
}


@pytest.mark.parametrize("name", WHY)
def test_what_cannot_be_folded_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadInput, match=f"'{name}' cannot be folded.*{WHY[name]}"):
        norm.fold(Odd(), layers=[name])


def test_what_cannot_be_folded_is_kept_and_the_outputs_stay() -> None:
    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(7, 3).double()
    model(x)  # running statistics that are not 0 and 1
    folded = norm.fold(model)
    assert folded.kept.keys() == WHY.keys()
    assert all(re.search(WHY[name], reason) for name, reason in folded.kept.items())
    assert "unused_norm" in str(folded)
    torch.testing.assert_close(folded.model(x), model.eval()(x))


def test_a_residual_block_is_folded_where_it_can_be_and_a_wrong_name_is_helped() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Residual(), Residual()).double(), torch.randn(4, 3, 6, 6).double()
    model(x)
    norm.freeze(model)
    folded = norm.fold(model)
    assert folded.pairs == (("0.norm", "0.conv"), ("1.norm", "1.conv"))
    assert folded.kept.keys() == {"0.last", "1.last"}
    torch.testing.assert_close(folded.model(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(BadInput, match=r"'0\.norn' is no BatchNorm.*Did you mean '0\.norm'"):
        norm.fold(model, layers=["0.norn"])


class Branching(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(x.isfinite().all()) else x


def test_neighbours_are_found_inside_what_cannot_be_traced() -> None:
    torch.manual_seed(0)
    model = Branching(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Branching(nn.BatchNorm1d(3))))
    x = torch.randn(5, 3)
    model(x)
    folded = norm.fold(model)
    assert folded.pairs == (("inner.1", "inner.0"),)
    assert folded.kept == {"inner.2.inner": "no trace shows where it is called"}
    torch.testing.assert_close(folded.model(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_channels_in_another_dimension_are_noticed() -> None:
    with pytest.raises(BadInput, match="channels in another dimension"):
        norm.fold(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)), layers=["1"])
    square = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    assert norm.fold(square, torch.randn(3, 6, 4)).pairs == ()
    assert norm.fold(square, torch.randn(3, 4)).pairs == (("1", "0"),)
    with pytest.raises(BadInput, match="is a Linear, and it a BatchNorm2d"):
        norm.fold(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm2d(6)), layers=["1"])


# Where batches are small


@pytest.mark.parametrize(("count", "parts"), [(8, [4, 4]), (11, [6, 5]), (3, [3]), (4, [4])])
def test_ghost_batches_are_algorithm_1_of_hoffer(count: int, parts: list[int]) -> None:
    layer = norm.GhostBatchNorm2d(2, size=4, momentum=0.2).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x, mean, variance = images(0, count), np.zeros(2), np.ones(2)
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = []
    for part in np.split(x.numpy(), np.cumsum(parts)[:-1]):
        m, v = part.mean((0, 2, 3)), part.var((0, 2, 3))
        line = (2, 1, 1)
        scaled = (part - m.reshape(line)) / np.sqrt(v.reshape(line) + 1e-5)
        expected.append(scaled * w.reshape(line) + b.reshape(line))
        n = part.shape[0] * 25
        mean, variance = 0.8 * mean + 0.2 * m, 0.8 * variance + 0.2 * v * n / (n - 1)
    np.testing.assert_allclose(layer(x).detach().numpy(), np.concatenate(expected), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-12)
    plain = nn.BatchNorm2d(2).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_to_ghost_keeps_names_values_and_the_old_model() -> None:
    model = network()
    model[1].eval()
    before = everything(model)
    ghost = norm.to_ghost(model, size=8)
    assert same(everything(model), before)
    assert ghost.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(ghost.state_dict()[name], value) for name, value in model.state_dict().items())
    assert [n for n, _ in ghost.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert (type(ghost[6]), ghost[6].size, ghost[1].training) == (norm.GhostBatchNorm1d, 8, False)
    x = images(0)
    halves = [copy.deepcopy(model[:2]).train()(part) for part in (x[:8], x[8:])]
    torch.testing.assert_close(ghost[:2].train()(x), torch.cat(halves))
    assert "size=8" in repr(ghost)


def test_to_group_keeps_names_and_affine_values() -> None:
    model = network()
    group = norm.to_group(model, groups=2)
    assert [n for n, _ in group.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not list(group.buffers())
    x = images(0)
    a = model[0](x).detach().numpy().reshape(16, 2, 2 * 9)
    scaled = (a - a.mean(2, keepdims=True)) / np.sqrt(a.var(2, keepdims=True) + 1e-5)
    w, b = (t.detach().numpy().reshape(4, 1, 1) for t in (model[1].weight, model[1].bias))
    expected = scaled.reshape(16, 4, 3, 3) * w + b
    np.testing.assert_allclose(group[:2](x).detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    assert group[6].num_groups == 1  # 5 channels have no divisor that leaves two together


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [
        (64, None, 4),
        (512, None, 32),
        (48, 32, 24),
        (16, 32, 8),
        (12, 5, 4),
        (7, None, 1),
        (1, 8, 1),
        (2, 2, 1),
    ],
)
def test_the_number_of_groups_divides_and_leaves_no_channel_alone(
    channels: int, groups: int | None, expected: int
) -> None:
    layer = norm.to_group(nn.BatchNorm1d(channels), groups)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == expected


@pytest.mark.parametrize("convert", [norm.to_ghost, norm.to_group])
def test_what_cannot_be_converted_is_refused_by_name(convert: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(BadInput, match="'0' is a SyncBatchNorm"):
        convert(nn.Sequential(nn.SyncBatchNorm(2)))
    model = network()
    norm.freeze(model)
    with pytest.raises(BadInput, match="'1' is frozen"):
        convert(model)
    shared = nn.BatchNorm1d(2)
    both = convert(nn.Sequential(shared, nn.Sequential(shared)))
    assert both[0] is both[1][0]
    assert type(both[0]) is not nn.BatchNorm1d


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(BadInput, match="at least 2 items, got size=1"):
        norm.to_ghost(network(), size=1)
    with pytest.raises(BadInput, match="groups must be at least 1, got 0"):
        norm.to_group(network(), 0)
