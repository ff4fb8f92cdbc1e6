"""F11: NaN, infinities and 1e38 in a loss or a gradient, at any update, parameter, element and rank.

What must come of a case is that of a run in which nothing goes wrong: its batches are the same without those
that the policy leaves out, and its rate has the cuts of the policy written down as a schedule. A gradient
that is finite, however large, is clipped and used: that is compared with float64, written out by hand.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from faults.host import Found, hosted
from faults.matrix import Figure, row
from parallel.parts import as_ranks
from race import synthetic
from torch import Tensor, nn

import downslope as ds
from downslope.journal import read
from downslope.parallel import ALONE, Ranks
from downslope.race.record import Job, Record
from downslope.race.standings import standings
from downslope.train import Diverged, Training
from downslope.train.order import order

STEPS, BATCH, BATCHES, SEED, SAVE_EVERY = 16, 16, 48, 1, 4
RATE, EPS, DECAY, NORM = 0.01, 1e-3, 0.01, 0.5
WINDOW, CALM, KEEP = 8, 3, 5
VALUES = (math.nan, math.inf, -math.inf, 1e38)
PLACES = ("gradient", "loss times", "loss plus", "input")
LADDERS = {"guard": (), "stop": (), "skip": ("skip",), "cut": ("cut",), "back": ("back",)}
Spoil = Callable[[str, Tensor], Tensor]


class Layer(nn.Linear):
    """A layer whose gradients a case spoils on their way, also where the weight was gathered for it."""

    spoil: Spoil | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, spoil = self.weight, self.bias, self.spoil
        if spoil is not None and torch.is_grad_enabled():
            weight, bias = weight.view_as(weight), bias.view_as(bias)
            weight.register_hook(partial(spoil, "weight"))
            bias.register_hook(partial(spoil, "bias"))
        return nn.functional.linear(x, weight, bias)


class Net(nn.Module):
    """Without draws, of which a batch that is left out takes its own. The statistics are for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Layer(8, 8)
        self.blocks = nn.ModuleList([Layer(8, 8)])
        self.head = Layer(8, 3)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        x = x if self.training else normal
        return self.head(self.blocks[0](self.first(x).tanh()).tanh())


NAMES = tuple(name for name, _ in Net().named_parameters())


class Case(NamedTuple):
    """A value planted where sample `at` of batch `step` is, and what the recipe is to do about it."""

    value: float
    place: str
    policy: str
    step: int
    at: int
    name: str
    element: int

    @classmethod
    def drawn(cls, draw: Random, policies: Sequence[str]) -> "Case":
        place, policy = draw.choice(PLACES), draw.choice(policies)
        value = draw.choice(VALUES[:3] if policy == "stop" else VALUES)
        if place == "input":
            value = math.nan  # what comes of another is the model's own affair
        if policy == "stop" and place == "loss plus":
            place = "loss times"  # alone, the guard has nothing against a constant
        element = draw.randrange(24)
        return cls(
            value, place, policy, draw.randrange(STEPS), draw.randrange(BATCH), draw.choice(NAMES), element
        )

    @property
    def recipe(self) -> ds.Recipe:
        found = LADDERS[self.policy]
        spikes = ds.strategies.spikes(
            ladder=found or ("skip",), window=WINDOW, calm=CALM, keep=KEEP, deviations=1e6
        )
        return recipe(ds.constant(RATE), [spikes] if found else [])

    def spoilt(self, loss: Tensor) -> Tensor:
        return loss * self.value if self.place == "loss times" else loss + self.value

    def spoil(self, layer: str) -> Spoil | None:
        if self.place != "gradient" or not self.name.startswith(f"{layer}."):
            return None

        def spoil(name: str, gradient: Tensor) -> Tensor:
            if f"{layer}.{name}" != self.name:
                return gradient
            found = gradient.clone()
            found.view(-1)[self.element % found.numel()] = self.value
            return found

        return spoil

    def task(self, train: tuple[Tensor, ...]) -> ds.Task:
        """The task with the fault in it; with policy "stop", of all batches from then on."""
        batches = order(BATCHES * BATCH, SEED, 0).view(BATCHES, BATCH)
        bad = (
            batches[self.step :, self.at]
            if self.policy == "stop"
            else batches[self.step, self.at : self.at + 1]
        )

        def loss(model: nn.Module, batch: Any) -> Tensor:
            wrong = model.training and bool(torch.isin(batch[2], bad).any())
            for name, layer in model.named_modules():
                if isinstance(layer, Layer):
                    layer.spoil = self.spoil(name) if wrong else None
            inputs = torch.where(torch.isin(batch[2], bad)[:, None], self.value, batch[0])
            found = nn.functional.cross_entropy(
                model(inputs if self.place == "input" else batch[0]), batch[1]
            )
            return self.spoilt(found) if wrong and self.place.startswith("loss") else found

        return ds.Task(model=Net, loss=loss, train=train, valid=data(1, 64))


def data(seed: int, count: int) -> tuple[Tensor, ...]:
    """Inputs, classes, and the number of each sample."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    return inputs, (inputs @ torch.arange(24.0).view(8, 3).sin()).argmax(dim=1), torch.arange(count)


def recipe(rate: ds.Schedule, strategies: Any = ()) -> ds.Recipe:
    chain = ds.chain(ds.clip_norm(NORM), ds.adamw(lr=rate, eps=EPS, weight_decay=DECAY))
    return ds.Recipe(chain, steps=STEPS, batch_size=BATCH, strategies=list(strategies))


def without(left_out: Sequence[int]) -> tuple[Tensor, ...]:
    """The data in another order: their batches are the same, but those that are left out come last."""
    columns = data(0, BATCHES * BATCH)
    batches = order(BATCHES * BATCH, SEED, 0).view(BATCHES, BATCH)
    places = [*(k for k in range(BATCHES) if k not in left_out), *left_out]
    found = tuple(column.clone() for column in columns)
    for made, column in zip(found, columns, strict=True):
        made[batches.flatten()] = column[batches[places].flatten()]
    return found


def refused(case: Case, gradients: Callable[[], float]) -> str:
    """Why the update must not be made; "" if it must. `gradients`: the largest that there is, in float64."""
    finite = math.isfinite(case.value)
    watched = LADDERS[case.policy]
    if watched and case.place != "gradient":
        if not finite:
            return "its loss was not finite"
        if case.step >= WINDOW // 2:
            return "its loss jumped"
    if case.place == "gradient" and not finite:
        return "its gradients were not finite"
    if case.place == "input":
        return "its gradients were not finite"
    if case.place == "loss times" and not (finite and gradients() < torch.finfo(torch.float32).max):
        return "its gradients were not finite"
    return ""


def named(case: Case) -> list[str]:
    return [case.name] if case.place == "gradient" else list(NAMES)


def expected(case: Case, why: str, ranks: Ranks) -> Training | None:
    """A training without the fault that must end in the same bits; None where there is none."""
    rate, out = ds.constant(RATE), [case.step]
    if why and case.policy == "cut":
        rate = _piecewise((0, RATE), (case.step, RATE / 2), (case.step + CALM, RATE))
    elif why and case.policy == "back":
        kept = case.step // KEEP * KEEP
        rate, out = _piecewise((0, RATE), (kept, RATE / 2)), list(range(kept, case.step + 1))
    elif not why and (case.place != "loss plus"):
        return None
    clean = Case(0.0, "loss plus", "guard", case.step, case.at, "", 0)
    made = Training(clean.task(without(out if why else [])), recipe(rate), SEED, ranks=ranks)
    made.advance(case.step // SAVE_EVERY * SAVE_EVERY if case.policy == "stop" else None)
    return made


def _piecewise(*levels: tuple[int, float]) -> ds.Schedule:
    found = ds.constant(levels[0][1])
    for at, level in levels[1:]:
        found = found.then(ds.constant(level), at=at) if at else ds.constant(level)
    return found


def by_hand(case: Case, world: int) -> tuple[dict[str, Tensor], float]:
    """The weights in float64 where the update is made, from the papers (mean over ranks, clipping by norm,
    AdamW), and the largest gradient.
    """
    start = Training(case.task(without([])), case.recipe, SEED)
    model, columns, most = start.model.double(), data(0, BATCHES * BATCH), 0.0
    parameters = dict(model.named_parameters())
    first, second = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    for step, samples in enumerate(order(BATCHES * BATCH, SEED, 0).view(BATCHES, BATCH)[:STEPS]):
        batch = (columns[0][samples].double(), *(column[samples] for column in columns[1:]))
        parts = zip(*(column.chunk(world) for column in batch), strict=True)
        loss = torch.stack([start.task.loss(model, part) / world for part in parts]).sum()
        found = torch.autograd.grad(loss, list(parameters.values()))
        gradients = dict(zip(parameters, found, strict=True))
        size = max(float(gradient.abs().max()) for gradient in found)
        most = max(most, size)
        norm = size * math.sqrt(sum(float((g / size).square().sum()) for g in found))
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = gradients[name] * min(1.0, NORM / norm)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient.square()
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p -= RATE * (mean / (square.sqrt() + EPS) + DECAY * p)
    return {name: p.detach() for name, p in parameters.items()}, most


def state(made: Training) -> dict[str, str]:
    """Weights and what the optimizer keeps of each, bit by bit, and its step; rates are the policy's."""
    tensors = {
        key: text for key, text in made.fields().items() if key.startswith(("model ", "optimizer model."))
    }
    return {**tensors, "step": str(made.optimizer.steps)}


def tried(case: Case, out: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a run in which this happens."""
    task = case.task(without([]))
    stops = case.policy == "stop"
    given: dict[str, Any] = {"seed": SEED, "save_every": SAVE_EVERY, "valid_every": STEPS, "quiet": True}
    try:
        ds.train(task, case.recipe, out=out, shard=ranks.shard, **given)
        ended = not stops
    except Diverged as error:
        ended = stops and named(case)[0] in str(error)
    wrong = [] if ended else ["did not end as it should"]
    ranks.meet()  # the journal is written by the first
    why = refused(case, lambda: by_hand(case, ranks.world)[1])
    events = read(out / "journal.jsonl")
    wrong += told(case, why, events)
    last = [event for event in events if event["kind"] == "checkpoint"][-1:]
    if not last:
        return wrong + ["saved nothing"] * (not stops or case.step >= SAVE_EVERY)
    found = Training.load(out / "ckpt" / last[0]["name"], task, case.recipe, last[0]["sha"], ranks)
    held = [*found.model.parameters(), *(v for s in found.optimizer.state.values() for v in s.values())]
    wrong += ["not finite"] * (not all(bool(torch.isfinite(_local(one)).all()) for one in held))
    clean = expected(case, why, ranks)
    if clean is not None:
        mine, theirs = state(found), state(clean)
        assert len(theirs) >= 4 * len(NAMES)
        wrong += [key for key in theirs if mine.get(key) != theirs[key]]
    else:
        for name, truth in by_hand(case, ranks.world)[0].items():
            value = _whole(found.model.get_parameter(name)).double()
            if not torch.allclose(value, truth, rtol=1e-4, atol=1e-5):
                wrong.append(f"{name} is off by {float((value - truth).abs().max()):.1e}")
    return wrong


def told(case: Case, why: str, events: Sequence[Any]) -> list[str]:
    """What is wrong with the journal's account."""
    skips = [event for event in events if event["kind"] == "skip"]
    notes = [event for event in events if event["kind"] == "strategy"]
    count = 20 if case.policy == "stop" else 1
    by_gradient = why == "its gradients were not finite"
    wrong = []
    if [(e["step"], e["names"]) for e in skips] != [(case.step, named(case))] * count * by_gradient:
        wrong.append(f"skips {skips}")
    acts = [(case.step, case.policy, why)] * bool(why and LADDERS[case.policy])
    if [(e["step"], e["did"], e["why"]) for e in notes] != acts:
        wrong.append(f"strategies {notes}")
    return wrong


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach()


def cases(count: int, seed: int, folder: Path, policies: Sequence[str], ranks: Ranks) -> list[Any]:
    wrong = []
    for number in range(count):
        case, out = Case.drawn(Random(f"{seed} {number}"), policies), folder / f"run-{number}"
        if found := tried(case, out, ranks):
            wrong.append({"seed": seed, "number": number, "case": str(case), "found": found})
        ranks.meet()
        if ranks.leads:
            shutil.rmtree(out)
    return wrong


def alone(count: int, seed: int, folder: Path) -> Found:
    return {"done": count, "wrong": cases(count, seed, folder, list(LADDERS), ALONE)}


def together(count: int, seed: int, folder: Path) -> Found:
    """On one of two ranks: half of the cases with whole weights, half with sharded ones."""
    wrong: list[Any] = []
    for shard, policies in ((False, list(LADDERS)), (True, [name for name in LADDERS if name != "back"])):
        place = folder / str(shard)
        place.mkdir()
        ends = as_ranks(2, shard, partial(cases, count // 2, seed, place, policies))
        wrong += [end for end in ends if end != {"code": 0, "note": []}]
    return {"done": count // 2 * 2, "wrong": wrong}


@row("F11", 200, slow=True)
def test_f11_a_number_that_is_not_finite(figure: Figure, tmp_path: Path) -> None:
    hosted(alone, figure, tmp_path)


@row("F11", 120, slow=True)
def test_f11_a_number_that_is_not_finite_on_one_of_two_ranks(figure: Figure, tmp_path: Path) -> None:
    hosted(together, figure, tmp_path)


@row("F11", 80)
def test_f11_a_candidate_that_is_not_finite_never_wins(figure: Figure) -> None:
    """Of the best of a race a worker says "ok", with a loss or metric that is not finite: the race goes as if
    it had said that the training diverged.
    """
    for number, draw in figure.draws():
        race = synthetic.plan(rates=3, seeds=3)
        truth = synthetic.truth(number, race)
        best = standings(Record.of(synthetic.run(race, truth))).rows[0].trial
        place, which = (best, draw.choice([0, 1, 2, None])), draw.choice(["loss", "metric"])
        wrong = {which: draw.choice(VALUES[:3])}
        found, honest = (
            standings(
                Record.of(synthetic.run(race, partial(planted, truth, place, {**wrong, "outcome": says})))
            )
            for says in ("ok", "diverged")
        )
        first = found.rows[0]
        assert first.trial != best, number
        assert first.status == "ok", number
        assert first.metric is not None, number
        ends = [[(r.trial, r.rank, r.status) for r in table.rows] for table in (found, honest)]
        assert ends[0] == ends[1], number


def planted(truth: synthetic.Truth, place: tuple[int, int | None], wrong: Any, job: Job) -> Any:
    """What comes of a job, which is `wrong` for a trial in one rung."""
    return {**truth(job), **(wrong if (job.trial, job.rung) == place else {})}
