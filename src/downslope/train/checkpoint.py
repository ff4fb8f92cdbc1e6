"""Checkpoints: a folder of files and a manifest with the SHA-256 of each, there whole or not at all.

No format for tensors notices a flipped bit, so every byte is verified against the manifest before a tensor
is made of it, and the manifest against the hash that the journal was given. Nothing here unpickles: tensors
lie in safetensors, all else in JSON. Hashing reads 1 to 2 GB/s.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from downslope.errors import BadInput
from downslope.folder import Chunk, Pieces, check_name, disk, read_file, write_folder

MANIFEST = "manifest.json"
SCHEMA = 2
_LARGEST_JSON = 64 * 2**20
_SHA = re.compile(r"[0-9a-f]{64}")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

Folder: TypeAlias = str | os.PathLike[str]


class Damaged(BadInput):
    """A checkpoint that is not, byte for byte, what was saved; the sentence names the file."""


def pack(tensors: Mapping[str, Tensor]) -> list[Chunk]:
    """The tensors as a safetensors file, in pieces that are the tensors' own memory where that is contiguous
    and on the CPU: the library would copy all of it twice. BadInput for a dtype that the format has not.
    """
    header: dict[str, dict[str, Any]] = {}
    pieces: list[Chunk] = []
    end = 0
    for name in sorted(tensors, key=lambda one: (-tensors[one].element_size(), one)):  # so all are aligned
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _DTYPES:
            raise BadInput(f"{name} is {tensor.dtype}, which a safetensors file cannot hold.")
        size = tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
        pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def write(folder: Folder, files: Mapping[str, Pieces], **about: Any) -> str:
    """Save `files` as a checkpoint and return the SHA-256 of its manifest, which goes into the journal.

    `about` (plain JSON data, such as step=120) is written into the manifest. BadInput if the folder is there
    already, or the disk refuses: then nothing is left there.
    """
    manifest = b""

    def every() -> Iterator[tuple[str, Pieces]]:
        nonlocal manifest
        written: dict[str, _Hashed] = {}
        for name, data in files.items():
            written[name] = _Hashed(data)
            yield name, written[name]
        entries = {name: {"size": one.size, "sha256": one.found.hexdigest()} for name, one in written.items()}
        manifest = dump({"schema": SCHEMA, **about, "files": entries})
        yield MANIFEST, manifest

    write_folder(folder, every())
    return _sha(manifest)


class _Hashed:
    """The pieces of a file, measured and hashed as they are written."""

    def __init__(self, data: Pieces) -> None:
        self.data, self.size, self.found = data, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Chunk]:
        for piece in [self.data] if isinstance(self.data, bytes) else self.data:
            self.size += len(piece)
            self.found.update(piece)
            yield piece


def verify(folder: Folder, sha: str | None = None) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its manifest.

    `sha` is what `write` returned; without it the manifest is taken at its word. Raises Damaged, naming the
    file that is not as it was saved.
    """
    folder = Path(folder)
    try:
        raw = read_file(folder / MANIFEST, _LARGEST_JSON)
    except BadInput as error:
        raise Damaged(f"the checkpoint {folder} is damaged: {error}") from None
    if sha is not None and _sha(raw) != sha:
        raise Damaged(f"the checkpoint {folder} is damaged: {MANIFEST} is not what the journal says it is.")
    manifest = _manifest(raw, folder)
    for name, entry in manifest["files"].items():
        try:
            size, found = _hash(folder / name)
        except OSError as error:
            raise Damaged(
                f"the checkpoint {folder} is damaged: {name} cannot be read: {error.strerror or error}."
            ) from None
        if size != entry["size"]:
            raise Damaged(
                f"the checkpoint {folder} is damaged: {name} has {size} bytes, not {entry['size']}."
            )
        if found != entry["sha256"]:
            raise Damaged(
                f"the checkpoint {folder} is damaged: the SHA-256 of {name} is not that of its manifest."
            )
    return manifest


def tensors(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a file that was verified, backed by the file: they take memory only when changed."""
    try:
        with safe_open(Path(folder, name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise Damaged(f"the checkpoint {folder} is damaged: {name} cannot be read: {error}.") from None


def parse(folder: Folder, name: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint that was verified."""
    try:
        found = json.loads(read_file(Path(folder, name), _LARGEST_JSON))
    except (BadInput, ValueError, RecursionError) as error:
        raise Damaged(f"the checkpoint {folder} is damaged: {name} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise Damaged(f"the checkpoint {folder} is damaged: {name} is not a JSON object.")
    return found


def dump(data: Mapping[str, Any]) -> bytes:
    """Plain data as JSON, the same bytes for the same data; floats keep every bit."""
    return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"


def remove(folder: Folder) -> None:
    """Remove a checkpoint: out of the way at once, so that a crash leaves litter and never half of one."""
    folder = Path(folder)
    gone = folder.with_name(f".{folder.name}.{os.urandom(8).hex()}.tmp")
    with disk(f"remove {folder}"), suppress(FileNotFoundError):
        os.rename(folder, gone)
        shutil.rmtree(gone)


def _manifest(raw: bytes, folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(raw)
        schema, files = manifest["schema"], manifest["files"]
        sound = all(
            check_name(name) and isinstance(entry["size"], int) and _SHA.fullmatch(entry["sha256"])
            for name, entry in files.items()
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, BadInput):
        sound, schema = False, SCHEMA
    if schema != SCHEMA:
        raise BadInput(f"the checkpoint {folder} has schema {schema!r}; this version reads {SCHEMA}.")
    if not sound:
        raise Damaged(f"the checkpoint {folder} is damaged: {MANIFEST} is no manifest.")
    return manifest


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a regular file, without holding it in memory."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(file, "rb") as stream:
        return os.fstat(file).st_size, hashlib.file_digest(stream, "sha256").hexdigest()
