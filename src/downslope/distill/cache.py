"""A teacher's answers, kept: the k likeliest classes of each position, and the mass of all others."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from downslope.errors import BadInput


@dataclass(frozen=True)
class TopK:
    """Log-probabilities `values` of classes `indices`, both [..., k]; log mass `tail` [...] of the rest.

    In nats, and those at `temperature` and at no other: the tail cannot be tempered afterwards. 8 bytes a
    class kept in float32, 6 in float16. With k = vocabulary nothing is lost. Not for k so small that the tail
    is most of the mass: a student then learns next to nothing about it.

    >>> cache = TopK.of(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), k=2)
    >>> cache.indices.tolist(), round(float(cache.tail.exp()), 3)
    ([[0, 1]], 0.119)
    """

    values: Tensor
    indices: Tensor
    tail: Tensor
    temperature: float
    vocabulary: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, logits: Tensor, k: int, *, temperature: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Self:
        """From logits [..., classes]; BadInput if k is not from 1 to the number of classes."""
        vocabulary = logits.shape[-1]
        if not 1 <= k <= vocabulary:
            raise BadInput(f"k must be from 1 to the {vocabulary} classes there are, got {k}.")
        logs = torch.log_softmax(logits.double() / checked_temperature(temperature), dim=-1)
        values, indices = logs.topk(k)
        tail = logs.scatter(-1, indices, -torch.inf).logsumexp(-1)
        return cls(values.to(dtype), indices.int(), tail.to(dtype), float(temperature), vocabulary)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Batches of a cache, one after the other along the first dimension; BadInput if they do not fit."""
        if len({(part.temperature, part.vocabulary, part.values.shape[1:]) for part in parts}) != 1:
            raise BadInput(
                "Parts of a cache must have one temperature, vocabulary and shape beyond the items."
            )
        values, indices, tail = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices", "tail")
        )
        return cls(values, indices, tail, parts[0].temperature, parts[0].vocabulary)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """The rows of these items, in this order, on the device of `rows`."""
        here = rows.to(self.values.device) if isinstance(rows, Tensor) else rows
        device = rows.device if isinstance(rows, Tensor) else self.values.device
        values, indices, tail = (
            tensor[here].to(device, non_blocking=True) for tensor in (self.values, self.indices, self.tail)
        )
        return type(self)(values, indices, tail, self.temperature, self.vocabulary)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file; whoever reads meanwhile sees the old file or the new one."""
        beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
        about = {"temperature": repr(self.temperature), "vocabulary": str(self.vocabulary)}
        tensors = {name: getattr(self, name).cpu().contiguous() for name in ("values", "indices", "tail")}
        try:
            save_file(tensors, beside, metadata=about)
            os.replace(beside, path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise BadInput(f"cannot write {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The cache in a file that `save` wrote; BadInput for any other, or a damaged one."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                values, indices, tail = (file.get_tensor(name) for name in ("values", "indices", "tail"))
            temperature, vocabulary = float(about["temperature"]), int(about["vocabulary"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadInput(f"{path} is not a cache of a teacher's answers: {error}.") from error
        fits = values.shape == indices.shape and values.shape[:-1] == tail.shape
        if not fits or (indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < vocabulary):
            raise BadInput(f"{path} is not a cache of a teacher's answers: its shapes or classes do not fit.")
        return cls(values, indices, tail, checked_temperature(temperature), vocabulary)


class Places:
    """Which row of a cache an input has, found by its bits, in whatever batch, order or piece it comes.

    `keys` are the `hashes` of the inputs whose answers are the rows; equal inputs have the first one's row.
    Inputs on a GPU are fetched from there to be hashed. BadInput for an input that is none of them. Not for
    augmentation, which makes new inputs all the time.

    >>> places = Places(hashes(torch.eye(3)))
    >>> places(torch.eye(3)[[2, 0]])
    tensor([2, 0])
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._rows: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            self._rows.setdefault(key, row)

    def __call__(self, inputs: Any) -> Tensor:
        """The row of each of these items, on their device."""
        try:
            found = [self._rows[key] for key in hashes(inputs)]
        except KeyError:
            raise BadInput(
                "the teacher's kept answers hold none for an input of this batch: inputs must be the same in "
                "every pass, without augmentation."
            ) from None
        return torch.tensor(found, device=next(_tensors(inputs)).device)


def remember(
    answer: Callable[[Any], Tensor], inputs: Iterable[Any], k: int, *, temperature: float = 1.0
) -> tuple[TopK, Places]:
    """The answers (logits [items, ..., classes]) to all inputs, given in batches, and where each is kept.

    >>> teacher = torch.nn.Linear(3, 9)
    >>> cache, places = remember(teacher, torch.eye(3).split(2), k=4)
    >>> cache[places(torch.eye(3)[1:])].values.shape
    torch.Size([2, 4])
    """
    kept, keys = [], list[bytes]()
    for batch in inputs:
        keys += hashes(batch)
        kept.append(TopK.of(answer(batch), k, temperature=temperature))
    return TopK.join(kept), Places(keys)


def hashes(inputs: Any) -> list[bytes]:
    """128 bits of BLAKE2b of the bits of each item; BadInput for what is no tensors."""
    parts = [
        tensor.detach().cpu().reshape(len(tensor), -1).contiguous().view(torch.uint8).numpy()
        for tensor in _tensors(inputs)
    ]
    items = zip(*parts, strict=True)
    return [blake2b(b"".join(row.tobytes() for row in item), digest_size=16).digest() for item in items]


def _tensors(inputs: Any) -> Iterator[Tensor]:
    """The tensors in what a model takes."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, dict | tuple | list):
        for one in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _tensors(one)
    else:
        raise BadInput(f"answers are kept for inputs that are made of tensors, got {type(inputs).__name__}.")


def checked_temperature(temperature: float) -> float:
    """The temperature, a finite number above 0; else BadInput."""
    if not 0 < temperature < float("inf"):
        raise BadInput(f"temperature must be a finite number above 0, got {temperature}.")
    return temperature
