"""A recipe's teacher: the paper's loss, whatever stands beside it; frozen, and the same after a stop."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from train import problems

import downslope as ds
from downslope.errors import BadInput
from downslope.recipe import Recipe
from downslope.strategies import average, growth, micro, mix, smoothing, teacher
from downslope.tasks import task
from downslope.train import Training, order

STEPS, ITEMS = 6, 16
STATE = importlib.import_module("downslope.train.training")  # `downslope.train` is a function, too
Kind = Callable[..., teacher]


class Net(nn.Module):
    """6 inputs, 3 classes; BatchNorm and dropout, which a teacher must not use as a student does."""

    def __init__(self, width: int, seed: int, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in [*self.parameters(), self.body[1].running_mean]:
                tensor.copy_(torch.randn(tensor.shape, generator=drawn))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x)))


class Student(Net):
    """Without dropout, so that a loop of torch's can follow it."""

    def __init__(self) -> None:
        super().__init__(4, seed=5)
        self.drop = nn.Identity()


def plain(**changes: Any) -> ds.Task:
    parts = {name: (x.double(), y) for name, (x, y) in problems.parts(0).items()}
    given = {"model": Student, "loss": ds.cross_entropy, "metric": ds.accuracy, "recipe": recipe()}
    return ds.Task(**{**parts, **given, **changes})


def recipe(*strategies: Any, rule: Any = None) -> Recipe:
    return Recipe(ds.chain(rule or ds.sgd(lr=0.1)), STEPS, ITEMS, strategies=list(strategies))


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> dict[str, Net]:
    """The models behind the folders "one" and "two"."""
    models = {"one": Net(9, seed=1).train(), "two": Net(7, seed=2).eval()}
    monkeypatch.setattr(STATE, "trained", models.__getitem__)
    return models


def trained(state: Training) -> tuple[list[float], dict[str, Tensor]]:
    losses: list[float] = []
    state.advance(on_step=lambda attempt: losses.append(float(attempt.loss)))
    return losses, {name: value.clone() for name, value in state.model.state_dict().items()}


def soft(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """arXiv:1503.02531, section 2: T²·KL of the softened, in torch's words; `teacher` is probabilities."""
    log_q = functional.log_softmax(logits / temperature, -1)
    return temperature**2 * functional.kl_div(log_q, teacher, reduction="batchmean")


def followed(
    loss: Callable[[nn.Module, Tensor, Tensor, int], Tensor], pieces: int = ITEMS
) -> tuple[list[float], dict[str, Tensor]]:
    """A loop of torch's over the same batches, in pieces, whose gradients add up by items."""
    student, (x, y) = Student(), plain().train
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses, rows = [], torch.cat([order(len(x), 3, epoch)[:64] for epoch in (0, 1)])
    for step, batch in enumerate(rows.split(ITEMS)[:STEPS]):
        optimizer.zero_grad()
        total = 0.0
        for part in batch.tensor_split(-(-ITEMS // pieces)):
            own = loss(student, x[part], y[part], step) * len(part) / ITEMS
            own.backward()
            total += float(own.detach())
        optimizer.step()
        losses.append(total)
    return losses, student.state_dict()


def equal(
    found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-10)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12, msg=name)


def answers(model: Net, x: Tensor, temperature: float) -> Tensor:
    """By the definition: running statistics, no dropout, no gradient."""
    body = model.body
    with torch.no_grad():
        scaled = (body[0](x) - body[1].running_mean) / (body[1].running_var + body[1].eps).sqrt()
        hidden = (scaled * body[1].weight + body[1].bias).tanh()
        return functional.softmax((hidden @ model.head.weight.T + model.head.bias) / temperature, -1)


@pytest.mark.parametrize("pieces", [ITEMS, 6])
def test_it_is_hintons_loss_in_pieces_too(taught: dict[str, Net], pieces: int) -> None:
    def loss(student: nn.Module, x: Tensor, y: Tensor, _step: int) -> Tensor:
        logits = student(x)
        return 0.3 * functional.cross_entropy(logits, y) + 0.7 * soft(
            logits, answers(taught["one"], x, 3.0), 3.0
        )

    asked = recipe(teacher(run="one", temperature=3.0, alpha=0.7), micro(items=pieces))
    equal(trained(Training(plain(), asked, seed=3)), followed(loss, pieces))


def test_alpha_and_temperature_follow_schedules_beside_smoothed_targets(taught: dict[str, Net]) -> None:
    def loss(student: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
        alpha, temperature = 0.9 * (1 - step / STEPS), 1 + step / 2
        logits = student(x)
        hard = functional.cross_entropy(logits, y, label_smoothing=0.375)
        return (1 - alpha) * hard + alpha * soft(logits, answers(taught["one"], x, temperature), temperature)

    falling = ds.linear(0.9, steps="100 %")
    rising = ds.linear(1.0, steps=6, end=4.0)
    asked = recipe(teacher(run="one", temperature=rising, alpha=falling), smoothing(share=0.375))
    equal(trained(Training(plain(), asked, seed=3)), followed(loss))


def test_several_teach_by_the_weighted_mean_of_their_probabilities(taught: dict[str, Net]) -> None:
    def loss(student: nn.Module, x: Tensor, y: Tensor, _step: int) -> Tensor:
        mean = 0.75 * answers(taught["one"], x, 2.0) + 0.25 * answers(taught["two"], x, 2.0)
        logits = student(x)
        return 0.5 * functional.cross_entropy(logits, y) + 0.5 * soft(logits, mean, 2.0)

    asked = recipe(teacher(run=("one", "two"), weights=(3, 1), temperature=2.0))
    equal(trained(Training(plain(), asked, seed=3)), followed(loss))


def test_a_regressor_between_widths_learns_by_an_adam_of_its_own(taught: dict[str, Net]) -> None:
    asked = recipe(teacher(run="one", method={"hints": 2.0}, layers=(("body", "body"),), rate=0.01))
    state = Training(plain(), asked, seed=3)
    held = state.company.lives["teacher"].tensors()
    regressor = nn.Linear(4, 9).double()
    regressor.load_state_dict({key: held[f"regressor.body.{key}"].clone() for key in ("weight", "bias")})
    adam = torch.optim.Adam(regressor.parameters(), lr=0.01)

    def loss(student: Student, x: Tensor, y: Tensor, step: int) -> Tensor:
        if step:
            adam.step()
        adam.zero_grad()
        features = student.body(x)
        with torch.no_grad():
            theirs = taught["one"].eval().body(x)
        near = functional.mse_loss(regressor(features), theirs)
        return 0.5 * functional.cross_entropy(student.head(features), y) + 0.5 * 2.0 * near

    equal(trained(state), followed(loss))  # type: ignore[arg-type]
    adam.step()
    for key, value in regressor.state_dict().items():
        torch.testing.assert_close(state.company.tensors()[f"teacher/regressor.body.{key}"], value)


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_a_teacher_is_only_read_and_never_kept(
    taught: dict[str, Net], batchnorm: str, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in taught["one"].state_dict().items()}
    state = Training(plain(), recipe(teacher(run="one", batchnorm=batchnorm)), seed=3)
    alone = Training(plain(), recipe(), seed=3)
    for one in (state, alone):
        one.advance()
    assert all(torch.equal(value, before[name]) for name, value in taught["one"].state_dict().items())
    assert all(p.grad is None for p in taught["one"].parameters())
    assert taught["one"].training
    assert taught["one"].drop.training
    own = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert own == {id(p) for p in state.model.parameters()}
    for one, folder in ((state, "with"), (alone, "without")):
        one.save(tmp_path / folder)
    sizes = [
        {p.name: p.stat().st_size for p in (tmp_path / name).glob("*.safetensors")}
        for name in ("with", "without")
    ]
    assert sizes[0] == sizes[1]


def test_a_student_draws_what_it_would_draw_alone(taught: dict[str, Net]) -> None:
    def noisy() -> ds.Task:
        parts = {name: (x.double(), y) for name, (x, y) in problems.parts(0).items()}
        return problems.task(model=lambda: problems.Rich().double(), **parts)

    asked = problems.recipe(steps=12)
    features = teacher(
        run="one", alpha=0.0, method={"logits": 1.0, "hints": 1.0}, layers=(("first", "body"),)
    )
    alone, beside = (Training(noisy(), asked.with_(strategies=kinds), seed=3) for kinds in ([], [features]))
    assert trained(alone)[0] == trained(beside)[0]
    mine, theirs = alone.fields(), beside.fields()
    kept = {name: text for name, text in theirs.items() if not name.startswith("strategies state")}
    assert kept == mine


def test_statistics_of_the_batch_are_another_teacher_than_those_that_run(taught: dict[str, Net]) -> None:
    losses = [
        trained(Training(plain(), recipe(teacher(run="one", batchnorm=kind)), seed=3))[0]
        for kind in ("eval", "train")
    ]
    assert losses[0] != losses[1]


COMBINED: dict[str, list[Any]] = {
    "logits": [
        teacher(run="one", temperature=ds.linear(4.0, steps="100 %", end=1.0)),
        micro(items=6),
        mix(),
        average(),
    ],
    "decoupled": [teacher(run="one", method="decoupled", alpha=0.2), micro(items=7)],
    "hints": [
        teacher(run="one", method={"logits": 1.0, "hints": 0.5}, layers=(("body", "body"),)),
        micro(items=6),
        average(),
    ],
    "relational": [teacher(run="one", method="relational", layers=(("body", "body"),)), smoothing()],
    "two": [teacher(run=("one", "two"), average="logits"), mix(smoothing=0.1)],
}


@pytest.mark.parametrize("name", COMBINED)
def test_stopped_in_the_middle_it_goes_on_to_the_bit(
    taught: dict[str, Net], name: str, tmp_path: Path
) -> None:
    asked = recipe(*COMBINED[name], rule=ds.adamw(lr=1e-2))
    assert Recipe.parse(asked.text()) == asked
    straight, stopped = (Training(plain(), asked, seed=3) for _ in range(2))
    straight.advance()
    stopped.advance(3)
    sha = stopped.save(tmp_path / "half")
    resumed = Training.load(tmp_path / "half", plain(), asked, sha)
    assert resumed.fields() == stopped.fields()
    resumed.advance()
    assert resumed.fields() == straight.fields()


def test_another_teacher_in_the_folder_is_refused_by_name(taught: dict[str, Net], tmp_path: Path) -> None:
    state = Training(plain(), recipe(teacher(run=("one", "two"))))
    sha = state.save(tmp_path / "a")
    taught["two"].head.bias.data[0] += 1e-12
    with pytest.raises(BadInput, match="the teacher in two is not the one that this training began with"):
        Training.load(tmp_path / "a", plain(), sha=sha)


class Asked(Net):
    """A teacher that counts the items that it answers for."""

    items = 0

    def forward(self, x: Tensor) -> Tensor:
        self.items += len(x)
        return super().forward(x)


@pytest.mark.parametrize("pieces", [ITEMS, 6])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_cache_keeps_the_likeliest_classes_and_the_tail_as_one_more(
    taught: dict[str, Net], pieces: int, kept: int
) -> None:
    def loss(student: nn.Module, x: Tensor, y: Tensor, _step: int) -> Tensor:
        logits, theirs = student(x), answers(taught["one"], x, 3.0)
        own = functional.softmax(logits / 3.0, -1)
        top = theirs.topk(kept).indices
        p, q = (
            torch.cat([each.gather(-1, top), 1 - each.gather(-1, top).sum(-1, keepdim=True)], -1)
            for each in (theirs, own)
        )
        return 0.3 * functional.cross_entropy(logits, y) + 0.7 * 9 * (p * (p / q).log()).sum(-1).mean()

    asked = recipe(teacher(run="one", temperature=3.0, alpha=0.7, cache=kept), micro(items=pieces))
    found, expected = trained(Training(plain(), asked, seed=3)), followed(loss, pieces)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)  # the cache is in float32
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("beside", [(), (smoothing(share=0.375),), (growth(times=2),), (average(decay=0.5),)])
def test_a_cache_of_all_classes_is_the_teacher_itself(taught: dict[str, Net], beside: Any) -> None:
    both = {"run": ("one", "two"), "weights": (1.0, 3.0), "temperature": 2.0}
    straight = trained(Training(plain(), recipe(teacher(**both), *beside)))
    found = trained(Training(plain(), recipe(teacher(**both, cache=3), *beside)))
    assert found[0] == pytest.approx(straight[0], rel=1e-6)
    for name, value in straight[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_teacher_with_a_cache_is_asked_once_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those included that the first pass leaves out, which is 70 samples in batches of 16."""
    model = Asked(9, seed=1)
    monkeypatch.setattr(STATE, "trained", lambda _folder: model)
    state = Training(plain(), recipe(teacher(run="x", cache=2)).with_(steps="9 epochs"))
    probe = ITEMS  # one batch shows the shape of its answers
    assert model.items == len(plain().train[1]) + probe
    state.advance()
    assert model.items == len(plain().train[1]) + probe


@pytest.mark.parametrize("moment", [0, 1, 5])
def test_with_a_cache_a_resumed_training_has_the_same_bits(
    taught: dict[str, Net], tmp_path: Path, moment: int
) -> None:
    asked = recipe(teacher(run="one", cache=2), micro(items=6)).with_(steps=12)
    straight, stopped = Training(plain(), asked, seed=3), Training(plain(), asked, seed=3)
    straight.advance()
    stopped.advance(moment)
    sha = stopped.save(tmp_path / "a")
    assert "indices" not in json.dumps(json.loads((tmp_path / "a" / "state.json").read_text()))
    resumed = Training.load(tmp_path / "a", plain(), sha=sha)
    resumed.advance()
    assert resumed.fields() == straight.fields()


@pytest.mark.parametrize(
    ("options", "beside", "said"),
    [
        ({"cache": 0}, (), r"cache keeps at least 1 class, got 0"),
        (
            {"cache": 2, "method": "decoupled"},
            (),
            r"cache keeps logits, and the method 'decoupled' needs more",
        ),
        (
            {"cache": 2, "method": {"logits": 1.0, "attention": 9.0}, "layers": (("body", "body"),)},
            (),
            "the method 'attention' needs more of a teacher",
        ),
        ({"cache": 2, "batchnorm": "train"}, (), 'of batchnorm "train" each batch has its own'),
        (
            {"cache": 2, "temperature": ds.linear(1.0, steps=6, end=4.0)},
            (),
            "cache keeps answers at one temperature, not at a schedule's",
        ),
        ({"cache": 2}, (mix(classes=3),), r"leave out cache or \[mix\]"),
        ({"cache": 4}, (), r"\[teacher\] cache is at most the 3 classes, got 4"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused_with_the_reason(
    taught: dict[str, Net], options: Any, beside: Any, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        Training(plain(), recipe(teacher(run="one", **options), *beside))


class Shaken(torch.utils.data.Dataset[Any]):
    """Samples that are other ones each time they are read."""

    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> Any:
        return torch.randn(6, dtype=torch.float64), torch.tensor(index % 3)


def test_inputs_that_change_from_pass_to_pass_are_refused_by_a_cache(taught: dict[str, Net]) -> None:
    state = Training(plain(train=Shaken()), recipe(teacher(run="one", cache=2)))
    with pytest.raises(BadInput, match="hold none for an input of this batch: inputs must be the same"):
        state.advance(1)


def twice(model: nn.Module, batch: Any) -> Tensor:
    return ds.cross_entropy(model, batch) + ds.cross_entropy(model, batch)


def test_a_loss_of_two_passes_is_refused(taught: dict[str, Net]) -> None:
    with pytest.raises(BadInput, match=r"^\[teacher\] needs a loss that runs the model once; it ran 2 times"):
        Training(plain(loss=twice), recipe(teacher(run="one"))).advance(1)


def test_a_teacher_of_other_inputs_or_classes_is_refused_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for model, said in (
        (nn.Linear(5, 3).double(), "in x does not take this task's inputs"),
        (
            nn.Linear(6, 4).double(),
            r"in x answers with logits of shape \[16, 4\], and the student with \[16, 3\]",
        ),
    ):
        monkeypatch.setattr(STATE, "trained", lambda _folder, model=model: model)
        with pytest.raises(BadInput, match=said):
            Training(plain(), recipe(teacher(run="x")))


def test_regressors_do_not_follow_a_rule_that_asks_again(taught: dict[str, Net]) -> None:
    hints = teacher(run="one", method="hints", layers=(("body", "body"),))
    rule = ds.chain(ds.sam(rho=0.05), ds.sgd(lr=0.1))
    with pytest.raises(BadInput, match="steps the regressor behind 'body' once a batch"):
        Training(plain(), Recipe(rule, STEPS, ITEMS, strategies=[hints]))
    Training(plain(), Recipe(rule, STEPS, ITEMS, strategies=[teacher(run="one")])).advance(2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"run": ()}, "folder of a finished run"),
        ({"run": ("a", "a")}, "names a folder twice"),
        ({"run": "a", "weights": (1.0, 2.0)}, "weights has 2 numbers for 1 runs"),
        ({"run": ("a", "b"), "weights": (-1.0, 2.0)}, "numbers from 0"),
        ({"run": "a", "method": "logit"}, "Did you mean 'logits'"),
        ({"run": "a", "method": "hints"}, "compares features: name them"),
        ({"run": ("a", "b"), "method": "hints", "layers": (("x", "y"),)}, "needs the features of one model"),
        ({"run": "a", "method": "hints", "layers": ("x",)}, "layers is a list, got 'x'"),
        ({"run": "a", "batchnorm": "update"}, "one of eval, train"),
        ({"run": "a", "alpha": 1.5}, "from 0 to 1"),
        ({"run": "a", "temperature": 0.0}, "above 0"),
        ({"run": "a", "rate": 0.0}, "rate must be above 0"),
    ],
)
def test_what_is_not_allowed_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        teacher(**given)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ([teacher(run="a", method="angle", layers=(("x", "x"),)), micro(items=4)], r"\[micro\] takes apart"),
        ([teacher(run="a", method="decoupled"), mix()], r"\[mix\] makes probabilities"),
        ([teacher(run="a", method={"decoupled": 1.0}), smoothing()], r"\[smoothing\] makes probabilities"),
    ],
)
def test_what_does_not_combine_is_refused_with_the_reason(kinds: list[Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        recipe(*kinds)


BORN_AGAIN = """
steps = 40
batch_size = 32

[[chain]]
part = "adamw"
lr = 0.01

[teacher]
run = "first"
temperature = 2.0
alpha = { schedule = "linear", peak = 0.9, steps = "100 %" }
method = { logits = 1.0, attention = 100.0 }
layers = [["3", "3"]]
"""


def test_a_finished_run_teaches_the_next_generation_and_an_open_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = Recipe.parse(BORN_AGAIN)
    with pytest.raises(BadInput, match="there is no run in first"):
        ds.train("digits-cnn", asked, out="second", quiet=True)
    assert not Path("second").exists()
    first = ds.train("digits-cnn", asked.with_(strategies=[average()]), out="first", quiet=True)
    second = ds.train("digits-cnn", asked, out="second", quiet=True)
    state = Training(task("digits-cnn"), asked)
    live = state.company.lives["teacher"]
    inputs = task("digits-cnn").valid[0]
    torch.testing.assert_close(live.distillation.teacher.logits(inputs), first.model.eval()(inputs))  # type: ignore[attr-defined]
    assert second.losses[0] == pytest.approx(trained(state)[0][0], rel=1e-6)
    saved = json.loads(next(Path("second", "ckpt").iterdir()).joinpath("state.json").read_text())
    assert len(saved["parts"]["strategies"]["state"]["data"]["teacher"]["teachers"]["first"]) == 64
    journal = Path("first", "journal.jsonl")
    lines = [
        line
        for line in journal.read_text().splitlines(keepends=True)
        if '"kind":"end"' not in line.replace(" ", "")
    ]
    journal.write_text("".join(lines))
    with pytest.raises(BadInput, match="first has not ended; go on with it by `downslope resume first`"):
        Training(task("digits-cnn"), asked)
