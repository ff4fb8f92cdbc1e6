"""Loaders of public data sets, on small files in their very format."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from downslope.errors import BadInput
from downslope.tasks import Task, accuracy, cross_entropy
from downslope.tasks.public import cifar10, mnist, text

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (30, 28, 28), np.uint8),
    "t10k": RNG.integers(0, 256, (7, 28, 28), np.uint8),
}
LABELS = {part: RNG.integers(0, 10, len(images), np.uint8) for part, images in IMAGES.items()}


def idx(array: np.ndarray) -> bytes:
    """As http://yann.lecun.com/exdb/mnist describes it: magic number, sizes most significant byte first."""
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, zipped: bool) -> None:
    for part in IMAGES:
        for name, array in (
            (f"{part}-images-idx3-ubyte", IMAGES[part]),
            (f"{part}-labels-idx1-ubyte", LABELS[part]),
        ):
            data = idx(array)
            (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(gzip.compress(data) if zipped else data)


def write_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """As the site says: the label's byte, then 1024 of red, of green, of blue, row by row."""
    labels, images = (
        RNG.integers(0, 10, (6, 4, 1), np.uint8),
        RNG.integers(0, 256, (6, 4, 3, 32, 32), np.uint8),
    )
    records = np.concatenate([labels, images.reshape(6, 4, -1)], axis=2)
    for place, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(records[place].tobytes())
    return images, labels[..., 0]


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_read_as_it_is_published(zipped: bool, tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped)
    parts = mnist(tmp_path, seed=1)
    inputs, targets = parts["test"]
    np.testing.assert_allclose(inputs.numpy()[:, 0], IMAGES["t10k"] / 255, rtol=1e-6)
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert targets.tolist() == LABELS["t10k"].tolist()
    assert [len(part[0]) for part in parts.values()] == [27, 3, 7]
    found = torch.cat([parts["train"][0], parts["valid"][0]]).numpy()[:, 0] * 255
    labels = torch.cat([parts["train"][1], parts["valid"][1]]).tolist()
    mine = {
        image.round().astype(np.uint8).tobytes(): label for image, label in zip(found, labels, strict=True)
    }
    theirs = zip(IMAGES["train"], LABELS["train"].tolist(), strict=True)
    assert mine == {image.tobytes(): label for image, label in theirs}
    assert not torch.equal(mnist(tmp_path, seed=2)["valid"][0], parts["valid"][0])
    assert torch.equal(mnist(tmp_path, seed=1)["valid"][0], parts["valid"][0])


def test_cifar_is_read_as_it_is_published(tmp_path: Path) -> None:
    images, labels = write_cifar(tmp_path)
    parts = cifar10(tmp_path)
    assert [part[0].shape for part in parts.values()] == [(18, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32)]
    np.testing.assert_allclose(parts["test"][0].numpy(), images[5] / 255, rtol=1e-6)
    assert parts["test"][1].tolist() == labels[5].tolist()
    assert sorted(torch.cat([parts["train"][1], parts["valid"][1]]).tolist()) == sorted(
        labels[:5].ravel().tolist()
    )


def test_a_text_is_read_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ä.txt"
    path.write_text("Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. " * 40, "utf-8")
    parts = text(path, context=8)
    data = path.read_bytes()
    for inputs, targets in parts.values():
        for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert bytes([*row, following[-1]]) in data
            assert row[1:] == following[:-1]


def test_what_is_loaded_makes_a_task(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    made = Task(**mnist(tmp_path), model=lambda: model, loss=cross_entropy, metric=accuracy)
    assert torch.isfinite(made.loss(made.model(), made.valid))


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
            "There is no .*t10k-labels.*get it from",
        ),
        (lambda folder: cut(folder / "train-images-idx3-ubyte", 1), "is not an idx file of 3 dimensions"),
        (lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(b""), "is not an idx file"),
        (
            lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(idx(IMAGES["train"])),
            "train-labels-idx1-ubyte is not an idx file of 1 dimensions",
        ),
        (lambda folder: (folder / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip"), "cannot be read"),
        (
            lambda folder: (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"0" * 99)[:-9]),
            "cannot be read",
        ),
        (
            lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS["train"])),
            "got 7 images and 30 labels",
        ),
        (
            lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS["t10k"] + 10)),
            "as many labels from 0 to 9, got 7 images and 7 labels from 1[0-9] to 1[0-9]",
        ),
    ],
)
def test_what_is_not_mnist_is_refused(harm: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=False)
    harm(tmp_path)
    with pytest.raises(BadInput, match=sentence):
        mnist(tmp_path)


def test_what_is_not_cifar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"There is no .*data_batch_1\.bin; get it from .*cifar-10-binary"):
        cifar10(tmp_path)
    write_cifar(tmp_path)
    cut(tmp_path / "test_batch.bin", 1)
    with pytest.raises(BadInput, match=r"has 12291 bytes, no multiple of 3073"):
        cifar10(tmp_path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="There is no"):
        text(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(BadInput, match="at least 3 of them"):
        text(tmp_path / "empty.txt")
    with pytest.raises(BadInput, match="cannot be read"):
        text(tmp_path)
