"""Public data sets from files that somebody has downloaded: MNIST and its kin, CIFAR-10, any text.

Nothing here reaches for a network. Each loader gives the parts of a task: `ds.Task(**mnist("data"), …)`.
"""

import gzip
import os
import zlib
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from downslope.errors import BadInput
from downslope.tasks.split import Parts
from downslope.tasks.text import windows

_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist or github.com/zalandoresearch/fashion-mnist"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, unpacked"
_RECORD = 1 + 3 * 32 * 32  # a label, then red, green and blue

Folder: TypeAlias = str | os.PathLike[str]
Pictures: TypeAlias = tuple[Tensor, Tensor]  # images and labels


def mnist(folder: Folder, seed: int = 0) -> Parts:
    """MNIST, Fashion-MNIST or KMNIST from its four idx files, gzipped or not: digits, clothes or characters.

    Inputs float32 [items, 1, 28, 28] from 0 to 1, targets int64 [items] from 0 to 9. A tenth of the train
    files, drawn by `seed`, is for validation. BadInput for a file that is missing or not in this format.
    """
    train, test = (
        (_idx(folder, f"{part}-images-idx3-ubyte"), _idx(folder, f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    )
    return _parts(train, test, seed)


def cifar10(folder: Folder, seed: int = 0) -> Parts:
    """CIFAR-10 from the six files of its binary version; the Python version is pickled, and not read.

    Inputs float32 [items, 3, 32, 32] from 0 to 1, 0.7 GB of them; targets int64 [items] from 0 to 9. A tenth
    of the train files, drawn by `seed`, is for validation. BadInput for a file missing or not in this format.
    """
    train = [_records(folder, f"data_batch_{number}.bin") for number in range(1, 6)]
    images, labels = (torch.cat(column) for column in zip(*train, strict=True))
    return _parts((images, labels), _records(folder, "test_batch.bin"), seed)


def text(path: Folder, context: int = 64, seed: int = 0) -> Parts:
    """Any text file by its bytes: (bytes, next bytes), both int64 [items, context] from 0 to 255.

    Runs of 16 neighbouring items are shared out by `seed`: 90 % for training, 5 % each for validation and
    test. Takes 16 bytes of memory a byte of text. BadInput for a text of less than 48 contexts.
    """
    data = _read(Path(path), "such as https://www.gutenberg.org")
    return windows(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).long(), context, seed)


def _parts(train: Pictures, test: Pictures, seed: int) -> Parts:
    """What was read, as a task's parts: a tenth of `train` is for validation."""
    for images, labels in (train, test):
        if len(images) != len(labels) or int(labels.max()) > 9:
            raise BadInput(
                f"Pictures come with as many labels from 0 to 9, got {len(images)} images and {len(labels)} "
                f"labels from {int(labels.min())} to {int(labels.max())}."
            )
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    valid, rest = order.tensor_split([max(len(order) // 10, 1)])

    def part(pictures: Pictures, items: Tensor | slice) -> Pictures:
        images, labels = pictures
        return images[items].float() / 255, labels[items].long()

    return Parts(train=part(train, rest), valid=part(train, valid), test=part(test, slice(None)))


def _idx(folder: Folder, name: str) -> Tensor:
    """The data of an idx file, behind two zeros, the type 8, the number of dimensions, and the dimensions."""
    zipped = Path(folder, f"{name}.gz")
    path = zipped if zipped.exists() else Path(folder, name)
    data = _read(path, _MNIST)
    dimensions = int(name.split("idx")[1][0])
    shape = np.frombuffer(data, ">u4", dimensions, 4) if len(data) >= 4 + 4 * dimensions else [0]
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + int(np.prod(shape, dtype=np.int64)):
        raise BadInput(
            f"{path} is not an idx file of {dimensions} dimensions of bytes; get it from {_MNIST}."
        )
    found = torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())
    return found[:, None] if dimensions == 3 else found


def _records(folder: Folder, name: str) -> Pictures:
    """(images, labels), bytes, in a file of CIFAR-10's binary version."""
    path = Path(folder, name)
    data = np.frombuffer(_read(path, _CIFAR), np.uint8)
    if not len(data) or len(data) % _RECORD:
        raise BadInput(f"{path} has {len(data)} bytes, no multiple of {_RECORD}; get it from {_CIFAR}.")
    records = torch.from_numpy(data.reshape(-1, _RECORD).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _read(path: Path, source: str) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        raise BadInput(f"There is no {path}; get it from {source}.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {error}; get it from {source}.") from None
