"""Trainings by Lightning's and Hugging Face's trainers, as a fresh process finds them: right ones, and each
with one fault.
"""

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import downslope as ds

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
Steps = Callable[[nn.Module], Any]


class Net(LightningModule):
    """BatchNorm, dropout, noise, and a loss that depends on Lightning's own counters."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        self.layers = nn.Sequential(*layers)
        self.seen = 0

    def training_step(self, batch: Any, place: int) -> Tensor:
        x, y = batch
        error = (self.layers(x + 0.1 * torch.randn(())) - y).square().mean()
        return error * (1 + 0.01 * self.global_step + self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Counting(Net):
    """Fault: the loss depends on a counter that no checkpoint holds."""

    def training_step(self, batch: Any, place: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, place) / self.seen


class Ours(Net):
    """A chain of ours, with a schedule of its own."""

    def configure_optimizers(self) -> Any:
        return ds.Optimizer(self, ds.chain(ds.clip_norm(1.0), ds.lion(lr=ds.cosine(0.01, steps=40))))


def _data() -> TensorDataset:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(7))
    return TensorDataset(x, x.sum(1, keepdim=True))


def _batches() -> ds.Batches:
    return ds.Batches(DataLoader(_data(), batch_sampler=ds.Sampler(60, 16, seed=3)))


def _lightning(net: type[Net], loader: Any, callbacks: list[Any], steps: int = 40) -> Any:
    torch.manual_seed(0)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, **quiet)
    return trainer, net(), loader


def lightning() -> Any:
    return _lightning(Net, _batches(), [ds.keep_generators()])


def lightning_ours() -> Any:
    return _lightning(Ours, _batches(), [ds.keep_generators()])


def lightning_short() -> Any:
    """Fault: it ends too early."""
    return _lightning(Net, _batches(), [ds.keep_generators()], steps=4)


def lightning_forgotten() -> Any:
    """Fault: Lightning's checkpoints leave the generators out."""
    return _lightning(Net, _batches(), [])


def lightning_counter() -> Any:
    return _lightning(Counting, _batches(), [ds.keep_generators()])


class Told(Callback):
    """It scales the rate by a counter of its own."""

    def __init__(self) -> None:
        self.told = 0

    def on_train_batch_start(self, trainer: Any, module: Any, *given: Any) -> None:
        self.told += 1
        trainer.optimizers[0].param_groups[0]["lr"] /= self.told


def lightning_callback() -> Any:
    """Fault: a callback counts, and the counter is in no checkpoint."""
    return _lightning(Net, _batches(), [ds.keep_generators(), Told()])


def lightning_shuffled() -> Any:
    """Fault: a loader that shuffles, and does not know its place."""
    return _lightning(Net, DataLoader(_data(), 16, shuffle=True), [ds.keep_generators()])


def lightning_raising() -> Any:
    """Fault: its loss raises."""

    class Raising(Net):
        def training_step(self, batch: Any, place: int) -> Tensor:
            raise ValueError("no loss today")

    return _lightning(Raising, _batches(), [])


class Sentences(torch.utils.data.Dataset[Any]):
    """Twenty-four rows of tokens, of which every one follows from the one before."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = (place + 3 * torch.arange(12)) % 20
        return {"input_ids": row, "labels": row}


class Noisy(Sentences):
    """Fault: noise from a generator of its own, which goes on from the start."""

    def __init__(self) -> None:
        self.draws = np.random.default_rng(0)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = super().__getitem__(place)["input_ids"]
        return {"input_ids": row, "labels": (row + int(self.draws.integers(20))) % 20}


def _hugging_face(data: Sentences, **settings: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    size = {"n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, loss_type="ForCausalLM", **size, **ends))
    plain = {"max_steps": 40, "per_device_train_batch_size": 8, "save_strategy": "no", "use_cpu": True}
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "report_to": "none"}
    folder = tempfile.mkdtemp()
    return Trainer(
        model,
        TrainingArguments(output_dir=folder, dataloader_pin_memory=False, **plain, **quiet, **settings),
        train_dataset=data,
    )


def hugging_face() -> Any:
    return _hugging_face(Sentences())


def hugging_face_accumulating() -> Any:
    return _hugging_face(Sentences(), gradient_accumulation_steps=2)


def hugging_face_restless() -> Any:
    """Fault: after a stop it begins its pass over the data anew."""
    return _hugging_face(Sentences(), ignore_data_skip=True)


def hugging_face_bare() -> Any:
    """Fault: its checkpoints hold nothing but the model."""
    return _hugging_face(Sentences(), save_only_model=True)


def hugging_face_noisy() -> Any:
    return _hugging_face(Noisy())
