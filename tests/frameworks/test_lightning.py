"""Lightning's Trainer drives our optimizers as it drives torch's: same weights after every batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from frameworks.trajectory import PAIRS, Make, Trajectory, assert_equal, assert_near, weights
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import downslope as ds

pytestmark = [
    pytest.mark.xdist_group("lightning"),  # importing it takes seconds: in one worker only
    # Lightning 2.6 asks torch 2.13's pytree in the old way.
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning"),
    # Advice on speed, where the machine has more cores than these loaders have workers.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Of course: a run goes on in the folder where it was saved.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCHES, EPOCHS = 7, 4
HALF = BATCHES * EPOCHS // 2
Schedule = Callable[[torch.optim.Optimizer], Any]
BOTH = pytest.mark.parametrize("name", PAIRS)


def batches(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(8 * BATCHES, 4, generator=draw, dtype=torch.float64).to(dtype)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8)


class Regression(lightning.LightningModule):
    """A module as its users write it; it notes its weights after every batch."""

    def __init__(self, make: Make, schedule: Schedule | None = None, interval: str = "step") -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Linear(4, 6, bias=False)  # behind BatchNorm a bias has only noise for a gradient
        # In float64 from here: Lightning 2.6 loads a checkpoint before precision="64-true" has converted us.
        self.net = nn.Sequential(first, nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.make, self.schedule, self.interval = make, schedule, interval
        self.trajectory: Trajectory = []
        self.seen: set[torch.dtype] = set()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        said = self.net(batch[0])
        self.seen.add(said.dtype)
        loss = nn.functional.mse_loss(said, batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.trajectory.append(weights(self))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        if self.schedule is None:
            return optimizer
        told = {"scheduler": self.schedule(optimizer), "interval": self.interval, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": told}


def trainer(**settings: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "logger": False,
        "max_epochs": EPOCHS,
        "precision": "64-true",
    }
    return lightning.Trainer(**(quiet | settings))


def fitted(module: Regression, **settings: Any) -> Trajectory:
    trainer(**settings).fit(module, batches())
    return module.trajectory


def of(make: Make, **numbers: Any) -> Make:
    return lambda module: make(module.named_parameters(), **numbers)


@BOTH
def test_drop_ins_train_as_torchs_classes_do(name: str) -> None:
    ours, theirs, numbers = PAIRS[name]
    assert_near(fitted(Regression(of(ours, **numbers))), fitted(Regression(of(theirs, **numbers))))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},  # 7 batches: the last window of an epoch is short
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ],
    ids=str,
)
def test_the_trainer_clips_and_accumulates(settings: dict[str, Any]) -> None:
    ours, theirs, numbers = PAIRS["AdamW"]
    one = fitted(Regression(of(ours, **numbers)), **settings)
    assert_near(one, fitted(Regression(of(theirs, **numbers)), **settings))


SCHEDULES: dict[str, tuple[Schedule, str]] = {
    "steps": (lambda o: lr_scheduler.StepLR(o, 2, 0.3), "epoch"),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=BATCHES * EPOCHS), "step"),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0, threshold=0.5), "epoch"),
    "warmup, cosine": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.1, total_iters=5),
                lr_scheduler.CosineAnnealingLR(o, BATCHES * EPOCHS - 5),
            ],
            [5],
        ),
        "step",
    ),
}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_of_torch(schedule: str, name: str) -> None:
    ours, theirs, numbers = PAIRS[name]
    attach, interval = SCHEDULES[schedule]
    one, two = (Regression(of(make, **numbers), attach, interval) for make in (ours, theirs))
    assert_near(fitted(one), fitted(two))
    rates = [module.trainer.optimizers[0].param_groups[0]["lr"] for module in (one, two)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    assert rates[0] != numbers["lr"]


def chained(module: nn.Module) -> ds.Optimizer:
    rate = ds.cosine(0.02, steps=BATCHES * EPOCHS)
    return ds.Optimizer(module, ds.chain(ds.clip_value(0.01), ds.adamw(lr=rate, weight_decay=0.1)))


def test_a_chain_clips_and_schedules_by_itself() -> None:
    """Beside torch's AdamW, clipped by the Trainer and scheduled by torch."""
    theirs = Regression(
        of(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, BATCHES * EPOCHS),
    )
    settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    ours = Regression(chained)
    assert_near(fitted(ours), fitted(theirs, **settings))
    assert ours.trainer.optimizers[0].steps == BATCHES * EPOCHS


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_stochastic_weight_averaging(name: str) -> None:
    """Lightning's callback puts a scheduler of its own in place of ours in the middle of the run."""
    ours, theirs, numbers = PAIRS[name]
    one, two = (Regression(of(make, **numbers)) for make in (ours, theirs))
    for module in (one, two):
        fitted(module, callbacks=[StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1)])
    assert_near(one.trajectory, two.trajectory)
    assert_near([one.trajectory[0], weights(one)], [two.trajectory[0], weights(two)])


def test_a_compiled_network() -> None:
    """Compiled in the closure that Lightning hands to `step`, too."""
    ours, theirs, numbers = PAIRS["AdamW"]
    counter = CompileCounterWithBackend("aot_eager")
    one, two = Regression(of(ours, **numbers)), Regression(of(theirs, **numbers))
    one.net = torch.compile(one.net, backend=counter)
    assert_near(fitted(one), fitted(two))
    assert counter.frame_count == 1
    names = [group["param_names"] for group in one.trainer.optimizers[0].param_groups]
    assert names == [[name for name, _ in two.named_parameters()]]


class Duel(lightning.LightningModule):
    """Two optimizers by hand, as a GAN has them: only one network learns at a time."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.maker, self.critic = nn.Linear(4, 2), nn.Linear(2, 1)
        self.make = make
        self.trajectory: Trajectory = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * self.critic(self.maker(batch[0]).tanh()).square().mean())
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.trajectory.append(weights(self))

    def configure_optimizers(self) -> Any:
        return [self.make(self.maker.named_parameters()), self.make(self.critic.named_parameters())]


def test_two_optimizers_by_hand() -> None:
    one, two = Duel(lambda p: ds.Adam(p, lr=0.01)), Duel(lambda p: torch.optim.Adam(p, lr=0.01))
    for module in (one, two):
        trainer().fit(module, batches())
    assert_near(one.trajectory, two.trajectory)


def test_bf16_autocast() -> None:
    """The forward pass is in bfloat16, weights and state in float32."""
    one, two = (Regression(of(make, lr=0.01)).float() for make in (ds.AdamW, torch.optim.AdamW))
    for module in (one, two):
        trainer(precision="bf16-mixed").fit(module, batches(torch.float32))
    assert one.seen == two.seen == {torch.bfloat16}
    assert {weight.dtype for weight in one.trajectory[0].values()} == {torch.float32}
    # A last bit of float32 that differs may round to another bfloat16 in the next pass, 2^-8 away.
    assert_near(one.trajectory, two.trajectory, rtol=1e-4, atol=1e-4)


RESUMED: dict[str, Callable[[], Regression]] = {
    "SGD, StepLR": lambda: Regression(
        of(ds.SGD, lr=0.05, momentum=0.9), lambda o: lr_scheduler.StepLR(o, 10, 0.3)
    ),
    "AdamW, one cycle": lambda: Regression(
        of(ds.AdamW, lr=0.02), lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=BATCHES * EPOCHS)
    ),
    "a chain with a schedule": lambda: Regression(chained),
}


def interrupted(whole: Regression, resumed: Regression, folder: Path) -> None:
    """A run in one go, and another module that goes on from its checkpoint of half time."""
    for module, start in ((whole, None), (resumed, folder / "epoch=1.ckpt")):
        saved = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
        settings = {"callbacks": [saved], "enable_checkpointing": True, "gradient_clip_val": 0.1}
        trainer(**settings).fit(module, batches(), ckpt_path=start, weights_only=True)


@pytest.mark.parametrize("made", RESUMED.values(), ids=RESUMED)
def test_resumed_from_a_checkpoint_it_ends_with_the_same_bits(
    made: Callable[[], Regression], tmp_path: Path
) -> None:
    whole, resumed = made(), made()
    interrupted(whole, resumed, tmp_path)
    for one, two in zip(whole.trajectory[HALF:], resumed.trajectory, strict=True):
        assert_equal(one, two)
    (optimizer,) = resumed.trainer.optimizers
    assert isinstance(optimizer, ds.Optimizer)
    assert optimizer.steps == BATCHES * EPOCHS
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in resumed.named_parameters()]


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_of_torchs_optimizer_goes_on_with_ours(name: str, tmp_path: Path) -> None:
    ours, theirs, numbers = PAIRS[name]
    whole, resumed = (
        Regression(of(make, **numbers), lambda o: lr_scheduler.StepLR(o, 10, 0.3)) for make in (theirs, ours)
    )
    interrupted(whole, resumed, tmp_path)
    assert_near(resumed.trajectory, whole.trajectory[HALF:])


def test_without_names_a_resumed_run_is_told_that_order_counts(tmp_path: Path) -> None:
    whole, resumed = (Regression(lambda module: ds.AdamW(module.parameters(), lr=0.02)) for _ in range(2))
    with pytest.warns(UserWarning, match="matched by order"):
        interrupted(whole, resumed, tmp_path)
    assert_equal(whole.trajectory[-1], resumed.trajectory[-1])


def test_batches_of_ours_fill_every_epoch_and_resume_at_its_end(tmp_path: Path) -> None:
    """Lightning counts the batches of an epoch by itself, and never asks a loader for its end."""
    trajectories, data = [], batches().dataset
    for start in (None, tmp_path / "epoch=1.ckpt"):
        module = Regression(of(ds.AdamW, lr=0.02))
        loader = ds.Batches(DataLoader(data, batch_sampler=ds.Sampler(data, 8, seed=1)))
        saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        made = trainer(callbacks=[ds.keep_generators(), saved], enable_checkpointing=True)
        made.fit(module, loader, ckpt_path=start, weights_only=True)
        assert made.current_epoch == EPOCHS
        assert loader.epoch * BATCHES + loader.position == EPOCHS * BATCHES
        trajectories.append(module.trajectory)
    whole, resumed = trajectories
    assert len(whole) == BATCHES * EPOCHS
    for one, two in zip(whole[HALF:], resumed, strict=True):
        assert_equal(one, two)
