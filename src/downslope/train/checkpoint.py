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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from downslope.errors import BadInput
from downslope.folder import Chunk, Pieces, check_name, disk, new_folder, read_file, write_new
from downslope.parallel import ALONE, Ranks

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
T = TypeVar("T")


class Damaged(BadInput):
    """A checkpoint that is not, byte for byte, what was saved; the sentence names the file."""


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> list[Chunk]:
    """The tensors as a safetensors file, in pieces that are the tensors' own memory where that is contiguous
    and on the CPU: the library would copy all of it twice. `about` are texts for its header. BadInput for a
    dtype that the format has not.
    """
    header: dict[str, Mapping[str, Any]] = {} if about is None else {"__metadata__": about}
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


def write(folder: Folder, files: Mapping[str, Pieces], ranks: Ranks = ALONE, **about: Any) -> str:
    """Save `files` as a checkpoint and return the SHA-256 of its manifest, which goes into the journal; of
    several ranks each gives its own files.

    `about` (plain JSON data, such as step=120) is written into the manifest. BadInput, on every rank, if the
    folder is there already, or the disk refuses on any: then nothing is left there.
    """
    draft = Draft(folder, ranks)
    return draft.finish(lambda: draft.write(files), **about)


class Draft:
    """A checkpoint that is being written beside its place. Every rank makes one and calls `finish`; `write`
    talks to nobody, and may run in a thread.
    """

    def __init__(self, folder: Folder, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks, self._place = Path(folder), ranks, ExitStack()
        name = ranks.told(lambda: self._place.enter_context(new_folder(self.folder)).name)
        self.beside = self.folder.with_name(name)

    def write(self, files: Mapping[str, Pieces]) -> dict[str, Any]:
        """Write files, durably, and return their entries in the manifest."""
        entries: dict[str, Any] = {}
        with disk(f"write {self.folder}"):
            for name, data in files.items():
                hashed = _Hashed(data)
                write_new(self.beside / check_name(name), hashed)
                entries[name] = {"size": hashed.size, "sha256": hashed.found.hexdigest()}
        return entries

    def finish(self, written: Callable[[], dict[str, Any]], **about: Any) -> str:
        """Put it in its place once every rank has `written` its files, and return its SHA-256."""
        with self._place:
            every = self.ranks.each(written)
            entries = {name: entry for mine in every for name, entry in mine.items()}
            manifest = dump({"schema": SCHEMA, **about, "files": entries})
            self.ranks.told(lambda: self._close(manifest))
        return _sha(manifest)

    def _close(self, manifest: bytes) -> None:
        with disk(f"write {self.folder}"):
            write_new(self.beside / MANIFEST, manifest)
            self._place.close()


class _Hashed:
    """The pieces of a file, measured and hashed as they are written."""

    def __init__(self, data: Pieces) -> None:
        self.data, self.size, self.found = data, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Chunk]:
        for piece in [self.data] if isinstance(self.data, bytes) else self.data:
            self.size += len(piece)
            self.found.update(piece)
            yield piece


def verify(folder: Folder, sha: str | None = None, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its manifest. Several ranks share the reading: each file is
    read by one, and what that finds is raised by all.

    `sha` is what `write` returned; without it the manifest is taken at its word. Raises Damaged, naming the
    file that is not as it was saved.
    """
    folder = Path(folder)

    def look() -> dict[str, Any]:
        manifest = _manifest(folder, sha)
        files = manifest["files"]
        by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
        check(folder, files, by_size[ranks.rank :: ranks.world])
        return manifest

    return agreed(look, ranks)


def agreed(look: Callable[[], T], ranks: Ranks) -> T:
    """What this rank finds in a checkpoint, if none finds damage; else Damaged, on every rank."""
    found: list[T] = []

    def wrong() -> str:
        try:
            found.append(look())
        except Damaged as error:
            return str(error)
        return ""

    if sentence := next(filter(None, ranks.each(wrong)), ""):
        raise Damaged(sentence)
    return found[0]


def check(folder: Path, entries: Mapping[str, Any], names: Collection[str]) -> None:
    """Read every byte of the named files. Damaged if one is not what its entry in the manifest says."""
    for name in names:
        entry = entries[name]
        try:
            size, found = _hash(folder / name)
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read: {error.strerror or error}") from None
        if size != entry["size"]:
            raise _damaged(folder, f"{name} has {size} bytes, not {entry['size']}")
        if found != entry["sha256"]:
            raise _damaged(folder, f"the SHA-256 of {name} is not that of its manifest")


def tensors(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a file that was verified, backed by the file: they take memory only when changed."""
    with _opened(folder, name) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict


def about(folder: Folder, name: str) -> dict[str, str]:
    """The texts that were packed with the tensors of a file."""
    with _opened(folder, name) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(folder: Folder, name: str) -> Iterator[Any]:
    try:
        with safe_open(Path(folder, name), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, f"{name} cannot be read: {error}") from None


def parse(folder: Folder, name: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint that was verified."""
    try:
        found = json.loads(read_file(Path(folder, name), _LARGEST_JSON))
    except (BadInput, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(folder, f"{name} is not a JSON object")
    return found


@contextmanager
def sound(folder: Folder, name: str) -> Iterator[None]:
    """Within it, what a file holds is made use of: what is not there, or of another kind, is Damaged."""
    try:
        yield
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{name}: {error!r}") from None


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


def _manifest(folder: Path, sha: str | None) -> dict[str, Any]:
    try:
        raw = read_file(folder / MANIFEST, _LARGEST_JSON)
    except BadInput as error:
        raise Damaged(f"the checkpoint {folder} is damaged: {error}") from None
    if sha is not None and _sha(raw) != sha:
        raise _damaged(folder, f"{MANIFEST} is not what the journal says it is")
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
        raise _damaged(folder, f"{MANIFEST} is no manifest")
    return manifest


def _damaged(folder: Folder, what: str) -> Damaged:
    return Damaged(f"the checkpoint {folder} is damaged: {what}.")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a regular file, without holding it in memory."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(file, "rb") as stream:
        return os.fstat(file).st_size, hashlib.file_digest(stream, "sha256").hexdigest()
