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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as packed
from torch import Tensor

from downslope.errors import BadInput
from downslope.folder import check_name, disk, read_file, write_folder

MANIFEST = "manifest.json"
SCHEMA = 2
_LARGEST_JSON = 64 * 2**20
_SHA = re.compile(r"[0-9a-f]{64}")

Folder: TypeAlias = str | os.PathLike[str]


class Damaged(BadInput):
    """A checkpoint that is not, byte for byte, what was saved; the sentence names the file."""


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file; each has memory of its own there, whatever it shared before."""
    # clone, because safetensors refuses views of one memory; contiguous, because it refuses strides.
    return packed({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def write(folder: Folder, files: Mapping[str, bytes], **about: Any) -> str:
    """Save `files` as a checkpoint and return the SHA-256 of its manifest, which goes into the journal.

    `about` (plain JSON data, such as step=120) is written into the manifest. BadInput if the folder is there
    already, or the disk refuses: then nothing is left there.
    """
    entries = {name: {"size": len(data), "sha256": _sha(data)} for name, data in files.items()}
    manifest = dump({"schema": SCHEMA, **about, "files": entries})
    write_folder(folder, {**files, MANIFEST: manifest})
    return _sha(manifest)


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
