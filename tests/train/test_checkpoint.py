"""Checkpoints: whole or not there, and no byte of them may change unseen."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from downslope.errors import BadInput
from downslope.train import checkpoint
from downslope.train.checkpoint import Damaged

FILES = {"model.safetensors": checkpoint.pack({"w": torch.arange(3.0)}), "state.json": b'{"step": 7}\n'}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / "step-7", checkpoint.write(tmp_path / "step-7", FILES, step=7)


def test_what_was_written_is_read_back(saved: tuple[Path, str]) -> None:
    folder, sha = saved
    manifest = checkpoint.verify(folder, sha)
    assert manifest["step"] == 7
    assert set(manifest["files"]) == set(FILES)
    assert checkpoint.tensors(folder, "model.safetensors")["w"].tolist() == [0, 1, 2]
    assert checkpoint.parse(folder, "state.json") == {"step": 7}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-7"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


def test_the_same_files_have_the_same_sha(tmp_path: Path, saved: tuple[Path, str]) -> None:
    assert checkpoint.write(tmp_path / "again", FILES, step=7) == saved[1]


@pytest.mark.parametrize("name", [*FILES, checkpoint.MANIFEST])
def test_a_flipped_bit_in_any_byte_is_found_and_its_file_named(name: str, saved: tuple[Path, str]) -> None:
    folder, sha = saved
    good = (folder / name).read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        (folder / name).write_bytes(bad)
        with pytest.raises(Damaged, match=name.replace(".", r"\.")):
            checkpoint.verify(folder, sha)
    (folder / name).write_bytes(good)
    checkpoint.verify(folder, sha)


@pytest.mark.parametrize("name", [*FILES, checkpoint.MANIFEST])
def test_every_truncation_is_found_and_its_file_named(name: str, saved: tuple[Path, str]) -> None:
    folder, sha = saved
    good = (folder / name).read_bytes()
    for size in range(len(good)):
        (folder / name).write_bytes(good[:size])
        with pytest.raises(Damaged, match=name.replace(".", r"\.")):
            checkpoint.verify(folder, sha)
    (folder / name).write_bytes(good + b"\n")
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        checkpoint.verify(folder, sha)


@pytest.mark.parametrize("name", [*FILES, checkpoint.MANIFEST])
@pytest.mark.parametrize("instead", ["nothing", "link", "pipe", "folder"])
def test_a_file_that_is_no_file_is_found(name: str, instead: str, saved: tuple[Path, str]) -> None:
    folder, sha = saved
    path = folder / name
    path.rename(folder.parent / "elsewhere")
    if instead == "link":
        path.symlink_to(folder.parent / "elsewhere")
    elif instead == "pipe":
        os.mkfifo(path)
    elif instead == "folder":
        path.mkdir()
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        checkpoint.verify(folder, sha)


def test_a_manifest_that_fits_the_files_but_not_the_journal_is_found(
    tmp_path: Path, saved: tuple[Path, str]
) -> None:
    folder, sha = saved
    other = checkpoint.write(tmp_path / "other", {**FILES, "state.json": b"{}"}, step=7)
    (folder / "state.json").write_bytes(b"{}")
    (folder / checkpoint.MANIFEST).write_bytes((tmp_path / "other" / checkpoint.MANIFEST).read_bytes())
    checkpoint.verify(folder, other)
    with pytest.raises(Damaged, match="not what the journal says"):
        checkpoint.verify(folder, sha)


@pytest.mark.parametrize(
    "manifest",
    [
        {"schema": checkpoint.SCHEMA},
        {"schema": checkpoint.SCHEMA, "files": []},
        {"schema": checkpoint.SCHEMA, "files": {"../../secret": {"size": 1, "sha256": "0" * 64}}},
        {"schema": checkpoint.SCHEMA, "files": {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}},
        {"schema": checkpoint.SCHEMA, "files": {"a": {"size": "1", "sha256": "0" * 64}}},
        {"schema": checkpoint.SCHEMA, "files": {"a": {"size": 1, "sha256": "short"}}},
        [],
        "text",
    ],
)
def test_a_manifest_that_is_none_is_damage(manifest: Any, saved: tuple[Path, str]) -> None:
    folder, _ = saved
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"manifest\.json is no manifest"):
        checkpoint.verify(folder)


def test_a_newer_schema_is_refused_and_not_called_damage(saved: tuple[Path, str]) -> None:
    folder, _ = saved
    (folder / checkpoint.MANIFEST).write_text('{"schema": 99, "files": {}}')
    with pytest.raises(BadInput, match=f"schema 99; this version reads {checkpoint.SCHEMA}") as caught:
        checkpoint.verify(folder)
    assert not isinstance(caught.value, Damaged)


def test_a_checkpoint_is_never_written_over(saved: tuple[Path, str]) -> None:
    folder, sha = saved
    with pytest.raises(BadInput, match="it is there already"):
        checkpoint.write(folder, {})
    checkpoint.verify(folder, sha)


def test_removing_leaves_nothing_and_twice_is_once(saved: tuple[Path, str]) -> None:
    folder, _ = saved
    checkpoint.remove(folder)
    checkpoint.remove(folder)
    assert list(folder.parent.iterdir()) == []


def test_tensors_of_every_kind_keep_their_bits(tmp_path: Path) -> None:
    storage = torch.randn(6)
    tensors = {
        "transposed": torch.randn(3, 4).T,
        "view a": storage[:4],
        "view b": storage[2:],
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "bfloat16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "expanded": torch.randn(1, 3).expand(4, 3),
    }
    checkpoint.write(tmp_path / "c", {"t.safetensors": checkpoint.pack(tensors)})
    back = checkpoint.tensors(tmp_path / "c", "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert back[name].shape == tensor.shape, name
        raw = (side.detach().contiguous().reshape(-1).view(torch.uint8) for side in (back[name], tensor))
        assert torch.equal(*raw), name


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_in_json_keep_every_bit(number: float) -> None:
    assert json.loads(checkpoint.dump({"x": number}))["x"].hex() == number.hex()


def test_what_is_no_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.dump({"x": float("nan")})


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_the_library_reads_what_is_packed(
    kinds: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    mine = b"".join(map(bytes, checkpoint.pack(tensors)))
    back = safetensors.torch.load(mine)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_a_dtype_that_no_file_holds_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"w is torch\.complex128, which a safetensors file cannot hold"):
        checkpoint.pack({"w": torch.zeros(2, dtype=torch.complex128)})
