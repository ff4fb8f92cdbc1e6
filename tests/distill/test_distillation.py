"""distill: the terms it adds up, whose gradients go where, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from downslope.distill import METHODS, Distillation, Teacher, Teachers, TopK, born_again, distill
from downslope.errors import BadInput

room = importlib.import_module("downslope.distill")  # `downslope.distill` itself is the function

CE = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """A small convolutional network with named parts."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.embed = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.body(self.stem(x)).mean((2, 3))
        found: Tensor = self.head(torch.relu(self.embed(self.drop(pooled))))
        return found


class Tokens(nn.Module):
    """A token model: embeddings, an LSTM, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.core = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.core(self.embed(x))[0])
        return found


def images(items: int = 6, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, 1, 5, 5, generator=generator)
    return x, torch.randint(3, (items,), generator=generator)


def texts(items: int = 4, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(11, (items, 7), generator=generator) for _ in range(2))
    lengths = torch.tensor([7, 2, 5, 1])[:items]
    return x, y.masked_fill(torch.arange(7) >= lengths.unsqueeze(1), -100)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


LAYERS = {"body": "body", "embed": "embed"}
EMBEDDED = {"embed": "embed"}


def made(method: str, student: Net, teacher: Net | Teacher | None) -> Distillation:
    if method in ("logits", "decoupled"):
        return distill(student, teacher, method)
    layers = {"body": "body"} if method in ("hints", "attention") else EMBEDDED
    return distill(student, teacher, method, layers=layers, sample=images(2)[0])


def by_hand(method: str, student: Net, teacher: Net, x: Tensor, y: Tensor) -> Tensor:
    """The term of a method from explicit passes, without hooks."""

    def parts(model: Net) -> tuple[Tensor, Tensor, Tensor]:
        body = model.body(model.stem(x))
        embedded = model.embed(body.mean((2, 3)))
        return body, embedded, model.head(torch.relu(embedded))

    own, theirs = parts(student), parts(copy.deepcopy(teacher).eval())
    return {
        "logits": lambda: room.divergence(own[2], theirs[2]),
        "decoupled": lambda: room.decoupled(own[2], theirs[2], y),
        "attention": lambda: room.attention(own[0], theirs[0]),
        "distance": lambda: room.distance(own[1], theirs[1]),
        "angle": lambda: room.angle(own[1], theirs[1]),
        "relational": lambda: room.relational(own[1], theirs[1]),
    }[method]()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "hints"])
def test_the_loss_is_hard_and_term_mixed_by_alpha(method: str) -> None:
    student, teacher, (x, y) = Net(4), Net(8), images()
    loss = made(method, student, teacher)
    loss.alpha = 0.3
    term, hard = by_hand(method, student, teacher, x, y), CE(student(x), y)
    torch.testing.assert_close(loss(student, (x, y)), 0.7 * hard + 0.3 * term)
    loss.weights[method] = 10.0
    torch.testing.assert_close(loss(student, (x, y)), 0.7 * hard + 3.0 * term)


def test_hints_go_through_regressors_and_add_up_over_layers() -> None:
    student, teacher, (x, y) = Net(4), Net(8), images()
    loss = distill(student, teacher, "hints", layers=LAYERS, sample=x[:2], alpha=1.0)
    assert {name: p.shape for name, p in loss.named_parameters()} == {
        "regressor.body.weight": (16, 8, 1, 1),
        "regressor.body.bias": (16,),
        "regressor.embed.weight": (8, 4),
        "regressor.embed.bias": (8,),
    }
    frozen = copy.deepcopy(teacher).eval()
    own, theirs = student.body(student.stem(x)), frozen.body(frozen.stem(x))
    body, embed = loss.regressors["body"], loss.regressors["embed"]
    expected = (body(own) - theirs).square().mean()
    pooled = embed(student.embed(own.mean((2, 3)))), frozen.embed(theirs.mean((2, 3)))
    expected = expected + (pooled[0] - pooled[1]).square().mean()
    torch.testing.assert_close(loss(student, (x, y)), expected)


def test_several_methods_share_one_pass() -> None:
    student, teacher, (x, y) = Net(4), Net(8), images()
    passes = []
    for model in (student, teacher):
        model.register_forward_hook(lambda *_: passes.append(1))
    weights = {"logits": 0.9, "attention": 1000.0}
    loss = distill(student, teacher, weights, layers=["body"])
    found = loss(student, (x, y))
    assert len(passes) == 2
    soft = sum(weight * by_hand(name, student, teacher, x, y) for name, weight in weights.items())
    torch.testing.assert_close(found, 0.5 * CE(student(x), y) + 0.5 * soft)


# The teacher and the world around stay as they are (trap 64)


@pytest.mark.parametrize("method", METHODS)
def test_training_the_student_changes_no_bit_of_the_teacher(method: str) -> None:
    student, teacher, batch = Net(4, dropout=0.3), Net(8, dropout=0.3), images()
    before, modes = tensors(teacher), [module.training for module in teacher.modules()]
    loss = made(method, student, teacher)
    parameters = [*student.parameters(), *(p for _, p in loss.named_parameters())]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(student, batch).backward()
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(parameters, start, strict=True) if p.ndim > 1)
    assert same(tensors(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())
    assert modes == [module.training for module in teacher.modules()]


def test_nothing_is_left_behind() -> None:
    student, teacher, batch = Net(4), Net(8), images()
    attributes = {name for module in [*student.modules(), *teacher.modules()] for name in vars(module)}
    names, parameters = set(student.state_dict()), len(list(student.parameters()))
    loss = distill(student, teacher, {"hints": 1.0, "angle": 1.0}, layers=LAYERS, sample=batch[0])
    loss(student, batch)
    with pytest.raises(RuntimeError):
        loss(student, (batch[0][:, :, :, None], batch[1]))
    for module in [*student.modules(), *teacher.modules()]:
        assert not module._forward_hooks
        assert set(vars(module)) <= attributes
    assert all(module.training for module in [*student.modules(), *teacher.modules()])
    assert (set(student.state_dict()), len(list(student.parameters()))) == (names, parameters)


def test_features_are_freed_with_the_loss() -> None:
    student, teacher, batch = Net(4), Net(8), images()
    loss = distill(student, teacher, "attention", layers=["body"])
    seen: list[weakref.ref[Tensor]] = []
    student.body.register_forward_hook(lambda _m, _i, output: seen.append(weakref.ref(output)))
    loss(student, batch)
    gc.collect()
    assert seen[0]() is None


def test_a_student_with_dropout_draws_as_it_would_without_a_teacher() -> None:
    batch = images()
    alone, taught = Net(4, dropout=0.5), Net(4, dropout=0.5)
    taught.load_state_dict(alone.state_dict())
    loss = distill(taught, Net(8, dropout=0.5), {"logits": 1.0, "hints": 1.0}, layers=["body"], alpha=0.0,
                   regressors={"body": nn.Conv2d(8, 16, 1)})  # fmt: skip
    torch.manual_seed(3)
    expected = torch.autograd.grad(CE(alone(batch[0]), batch[1]), list(alone.parameters()))
    torch.manual_seed(3)
    found = torch.autograd.grad(loss(taught, batch), list(taught.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_looking_for_widths_leaves_no_trace_but_the_regressors() -> None:
    student, teacher = Net(4, dropout=0.5), Net(8)
    before = tensors(student), tensors(teacher)
    torch.manual_seed(1)
    loss = distill(student, teacher, "hints", layers=["body"], sample=images()[0])
    assert same(tensors(student), before[0])
    assert same(tensors(teacher), before[1])
    torch.manual_seed(1)
    expected = nn.Conv2d(8, 16, 1)  # the only thing that drew
    assert torch.equal(loss.regressors["body"].weight, expected.weight)  # type: ignore[arg-type]
    same_width = distill(student, Net(4), "hints", layers=["body"], sample=images()[0])
    assert not same_width.regressors


def test_a_shared_student_is_not_flipped() -> None:
    """Student and teacher are one model, or share layers (trl PR#5862)."""
    student, batch = Net(4, dropout=0.5), images()
    loss = distill(student, student, {"logits": 1.0, "hints": 1.0}, layers={"stem": "stem"})
    loss(student, batch).backward()
    assert all(module.training for module in student.modules())
    assert all(p.requires_grad and p.grad is not None for p in student.parameters())
    teacher = Net(4)
    teacher.stem = student.stem
    distill(student, teacher)(student, batch)
    assert student.stem[1].training


def test_the_state_is_the_regressors_and_no_teacher() -> None:
    student, teacher, batch = Net(4), Net(8), images()
    loss = distill(student, teacher, "hints", layers=LAYERS, sample=batch[0])
    other = distill(student, teacher, "hints", layers=LAYERS, sample=batch[0])
    assert set(loss.state_dict()) == {name for name, _ in loss.named_parameters()}
    assert loss(student, batch).item() != other(student, batch).item()
    other.load_state_dict(loss.state_dict())
    assert loss(student, batch).item() == other(student, batch).item()
    assert distill(student, teacher).state_dict() == {}
    with pytest.raises(BadInput, match="names differ"):
        other.load_state_dict({"regressor.body.weight": torch.zeros(1)})


# Wrapped students


@pytest.mark.parametrize("method", ["logits", "hints"])
@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_a_compiled_student_gives_the_same_loss(method: str, when: str) -> None:
    student, teacher, batch = Net(4), Net(8), images()
    loss = made(method, student, teacher)
    expected = torch.autograd.grad(loss(student, batch), list(student.parameters()))
    if when == "in place":
        student.compile(backend="eager")
        wrapped: Any = student
    else:
        wrapped = torch.compile(student, backend="eager")
    if when == "after":
        wrapped(batch[0])  # compiled without hooks: it would not see new ones
    found = loss(wrapped, batch)
    gradients = torch.autograd.grad(found, list(student.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
    assert loss(wrapped, batch).item() == found.item()
    torch.compiler.reset()


def test_without_layers_a_compiled_student_stays_compiled() -> None:
    student, batch = Net(4), images()
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    wrapped: Any = torch.compile(student, backend=backend)
    loss = distill(wrapped, Net(8))
    loss(wrapped, batch).backward()
    assert len(graphs) == 1
    loss(wrapped, batch).backward()
    assert len(graphs) == 1
    torch.compiler.reset()


def test_names_are_those_of_the_bare_model() -> None:
    student, teacher, batch = Net(4), Net(8), images()
    wrapped = nn.Sequential()
    wrapped.add_module("module", student)
    expected = distill(student, teacher, "attention", layers=["body"])(student, batch)
    compiled: Any = torch.compile(wrapped, backend="eager")
    loss = distill(compiled, teacher, "attention", layers=["body"])
    assert loss(compiled, batch).item() == expected.item()
    torch.compiler.reset()


# Token models and accumulation


@pytest.mark.parametrize("method", ["logits", "decoupled", "hints"])
def test_ragged_token_batches_add_up_to_the_big_batch(method: str) -> None:
    """Soup#720 had four times the gradient; the mean of means is wrong too (traps 38, 52)."""
    student, teacher, (x, y) = Tokens(6).double(), Tokens(10).double(), texts()
    layers = {"core": "core"} if method == "hints" else {}
    loss = distill(student, teacher, method, layers=layers, sample=x if layers else None)
    parameters = [*student.parameters(), *(p for _, p in loss.named_parameters())]
    big = torch.autograd.grad(loss(student, (x, y)), parameters)
    count = int((y != -100).sum())
    assert count == 15
    total = [torch.zeros_like(p) for p in parameters]
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        for sum_, own in zip(
            total, torch.autograd.grad(loss(student, (x[part], y[part]), count), parameters), strict=True
        ):
            sum_ += own
    for mine, theirs in zip(total, big, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", ["logits", "hints", "attention"])
def test_ragged_batches_of_items_add_up_with_a_hard_loss_of_ones_own(method: str) -> None:
    student, teacher, (x, y) = Net(4).double().eval(), Net(8).double(), images()
    x = x.double()
    layers = {} if method == "logits" else {"body": "body"}
    options: dict[str, Any] = {"layers": layers, "sample": x if layers else None, "hard": CE}
    loss = distill(student, teacher, method, **options)
    big = loss(student, (x, y))
    parts = [loss(student, (x[i:j], y[i:j]), count=6) for i, j in ((0, 1), (1, 3), (3, 6))]
    torch.testing.assert_close(torch.stack(parts).sum(), big, rtol=1e-12, atol=0)
    torch.testing.assert_close(big, distill(student, teacher, method, **{**options, "hard": None},
                                            regressors=loss.regressors)(student, (x, y)))  # fmt: skip


def test_a_batch_of_ignored_tokens_gives_zero() -> None:
    student, teacher, (x, y) = Tokens(6), Tokens(10), texts()
    loss = distill(student, teacher, {"logits": 1.0, "hints": 1.0}, layers=["core"], sample=x)
    found = loss(student, (x, torch.full_like(y, -100)))
    found.backward()
    assert found.item() == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in student.parameters())


def test_a_cached_teacher_is_found_by_the_rows_of_the_batch() -> None:
    student, teacher, (x, y) = Tokens(6), Tokens(10), texts()
    live = distill(student, teacher, temperature=2.0, alpha=0.7)
    cache = TopK.of(Teacher(teacher)(x), 11, temperature=2.0)
    kept = distill(student, cache, temperature=2.0, alpha=0.7)
    rows = torch.tensor([3, 0, 1])
    torch.testing.assert_close(
        kept(student, (x[rows], y[rows], rows)), live(student, (x[rows], y[rows])), rtol=1e-5, atol=0
    )
    with pytest.raises(BadInput, match=r"\(inputs, targets, rows\)"):
        kept(student, (x, y))


def test_mixed_targets_teach_with_the_teacher_of_the_mixed_inputs() -> None:
    student, teacher, (x, y) = Net(4), Net(8), images()
    soft = 0.6 * nn.functional.one_hot(y, 3) + 0.4 * nn.functional.one_hot(y.flip(0), 3)
    found = distill(student, teacher, alpha=0.3)(student, (x, soft))
    expected = 0.7 * CE(student(x), soft) + 0.3 * room.divergence(student(x), Teacher(teacher)(x))
    torch.testing.assert_close(found, expected)


def test_an_output_object_with_logits_is_read() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(8)

        def forward(self, x: Tensor) -> Output:
            return Output(self.net(x))

    student, teacher, batch = Net(4), Wrapped(), images()
    expected = distill(student, teacher.net)(student, batch)
    assert distill(student, teacher)(student, batch).item() == expected.item()


# Several teachers, and students that teach themselves


def test_several_teachers_are_averaged_by_name() -> None:
    student, batch = Net(4), images()
    models = {"a": Net(8), "b": Net(6)}
    loss = distill(student, Teachers(models, {"a": 3, "b": 1}), temperature=2.0, alpha=1.0)
    a, b = (torch.softmax(Teacher(model)(batch[0]) / 2, 1) for model in models.values())
    own = torch.log_softmax(student(batch[0]) / 2, 1)
    expected = 4 * nn.functional.kl_div(own, 0.75 * a + 0.25 * b, reduction="batchmean")
    torch.testing.assert_close(loss(student, batch), expected)


def test_deeper_layers_teach_without_being_taught() -> None:
    student, (x, y) = Net(4), images()
    loss = distill(student, None, "attention", layers={"stem": "body"}, alpha=1.0)
    found = loss(student, (x, y))
    shallow = student.stem(x)
    deep = student.body(shallow).detach()
    torch.testing.assert_close(found, room.attention(shallow, deep))
    shallow_, deep_ = torch.autograd.grad(found, [student.stem[0].weight, student.body.weight])
    assert shallow_.any()
    assert not deep_.any()
    regressed = distill(student, None, "hints", layers={"stem": "body"}, sample=x)
    assert regressed.regressors["stem"].weight.shape == (8, 4, 1, 1)


def test_a_student_learns_from_its_own_average() -> None:
    student, batch = Net(4), images()
    teacher = Teacher.copy_of(student)
    loss = distill(student, teacher, alpha=0.5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    start = tensors(teacher.model)
    for _ in range(3):
        optimizer.zero_grad()
        loss(student, batch).backward()
        optimizer.step()
        assert all(p.grad is None for p in teacher.model.parameters())
        teacher.follow(student, decay=0.5)
    assert not same(tensors(teacher.model), start)
    assert not same(tensors(teacher.model), tensors(student))


def test_the_next_generation_learns_from_a_frozen_copy() -> None:
    first, batch = Net(4), images()
    loss = born_again(first, alpha=0.6)
    second = Net(4)
    expected = 0.4 * CE(second(batch[0]), batch[1]) + 0.6 * room.divergence(
        second(batch[0]), Teacher(first)(batch[0]), temperature=1.0
    )
    with torch.no_grad():
        first.head.weight.zero_()  # what becomes of the first generation does not matter
    torch.testing.assert_close(loss(second, batch), expected)


# What cannot combine


def teachers() -> Teachers:
    return Teachers({"a": Net(8)})


def cache() -> TopK:
    return TopK.of(torch.randn(6, 3), 2, temperature=4.0)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "method": (partial(distill, None, Net(8), "logit"), "no method 'logit'. Did you mean 'logits'"),
    "no method": (partial(distill, None, Net(8), {}), "needs a method"),
    "no layers": (partial(distill, None, Net(8), "hints"), "compares features: name them"),
    "idle layers": (partial(distill, Net(4), Net(8), layers=["body"]), "compares logits"),
    "student's layer": (
        partial(distill, Net(4), Net(8), "angle", layers={"emb": "embed"}),
        "no layer 'emb'. Did you mean 'embed'",
    ),
    "teacher's layer": (
        partial(distill, Net(4), Net(8), "angle", layers={"embed": "heads"}),
        "no layer 'heads'. Did you mean 'head'",
    ),
    "features of several": (lambda: distill(None, teachers(), "angle", layers=["body"]), "Teachers"),
    "features of a cache": (lambda: distill(None, cache(), "angle", layers=["body"]), "TopK"),
    "decoupled cache": (lambda: distill(None, cache(), "decoupled"), "needs every class"),
    "cache's temperature": (lambda: distill(None, cache(), temperature=2.0), "at temperature 4.0; say"),
    "no teacher": (partial(distill, Net(4), None), "downslope.distill.exits"),
    "alpha": (partial(distill, None, Net(8), alpha=-0.1), "from 0 to 1, got -0.1"),
    "temperature": (partial(distill, None, Net(8), temperature=-1.0), "above 0, got -1.0"),
    "regressor": (
        partial(distill, None, Net(8), "hints", layers=["body"], regressors={"bod": nn.Linear(1, 1)}),
        "got 'bod'. Did you mean 'body'",
    ),
    "sample alone": (
        partial(distill, None, Net(8), "hints", layers=["body"], sample=images()[0]),
        "the student itself is needed",
    ),
    "no way": (
        partial(distill, Net(4), Net(8), "hints", layers={"body": "embed"}, sample=images()[0]),
        "give regressors",
    ),
    "widths": (
        lambda: distill(None, Net(8), "hints", layers=["body"])(Net(4), images()),
        "sample=inputs",
    ),
    "teacher": (partial(distill, None, lambda x: x), "must be a torch.nn.Module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_combine_is_refused_with_the_reason(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(BadInput, match=said.replace("(", r"\(")):
        call()


def test_layers_that_run_twice_or_never_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.pair({"x": x})
            found: Tensor = self.twice(self.twice(x))
            return found

    batch = torch.randn(4, 3), torch.zeros(4).long()
    for layer, said in (("twice", "ran twice"), ("never", "did not run"), ("pair", "puts out dict")):
        student = Odd()
        with pytest.raises(BadInput, match=said):
            distill(student, Odd(), "angle", layers=[layer])(student, batch)
        assert not any(module._forward_hooks for module in student.modules())


def test_a_larger_map_is_led_to_a_smaller_one_by_its_kernel() -> None:
    """FitNets, section 2.2: the regressor's kernel is what makes the sizes agree."""
    made = room.regressor(torch.zeros(2, 4, 9, 7), torch.zeros(2, 6, 5, 5))
    assert made is not None
    assert made(torch.zeros(2, 4, 9, 7)).shape == (2, 6, 5, 5)
    assert room.regressor(torch.zeros(2, 4, 9), torch.zeros(2, 4, 9)) is None
    tokens = room.regressor(torch.zeros(2, 4, 9), torch.zeros(2, 4, 3))
    assert isinstance(tokens, nn.Linear)
    with pytest.raises(BadInput, match="No linear layer"):
        room.regressor(torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 6, 6))
