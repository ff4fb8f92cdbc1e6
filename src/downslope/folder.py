"""Files that are whole or not there, and folders with one writer.

A file is written beside its place, forced to disk, renamed into place, and the rename forced to disk: a
reader sees the old file or the new one, at whatever instant the power fails. Nothing follows a symbolic
link that stands where a file should be. Trouble with the disk is `BadInput`, one sentence with the system's
own word for it.
"""

import fcntl
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Self, TypeAlias
from weakref import WeakSet

from downslope.errors import BadInput

Chunk: TypeAlias = bytes | memoryview
Pieces: TypeAlias = bytes | Iterable[Chunk]
"""The content of a file: at once, or piece by piece as it is written."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_LITTER = re.compile(r"\.[A-Za-z0-9._-]+\.[0-9a-f]{16}\.tmp")  # what a killed writer leaves behind


def check_name(name: str) -> str:
    """The name, if it is one of a run, trial or file of ours: letters, digits, '.', '_', '-', at most 80.

    >>> check_name("adamw-3e-4")
    'adamw-3e-4'
    """
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{name[:100]!r} cannot be a name: it must begin with a letter or digit and hold at most 80 "
            "letters, digits, '.', '_' and '-'."
        )
    return name


@contextmanager
def disk(doing: str) -> Iterator[None]:
    """Whatever the system refuses inside becomes BadInput: "cannot `doing`: No space left on device."."""
    try:
        yield
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"cannot {doing}: {error.strerror or error}.") from error
    except ValueError as error:  # a path with a NUL in it, or with half a character
        raise BadInput(f"cannot {doing}: {error}.") from error


def read_file(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The bytes of a regular file, at most `limit`. BadInput for a link, a pipe, a folder, or no file."""
    with disk(f"read {path}"):
        # Without O_NONBLOCK, opening a pipe would wait for a writer that never comes.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(file)
            if not stat.S_ISREG(about.st_mode):
                raise BadInput(f"cannot read {path}: it is not a regular file.")
            if limit is not None and about.st_size > limit:
                raise BadInput(
                    f"cannot read {path}: it has {about.st_size} bytes, at most {limit} are allowed."
                )
            with os.fdopen(file, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(file)


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path`, durably and whole or not at all, with mode 0600. BadInput if the disk refuses.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_file(Path(folder, "result.json"), b"{}")
    ...     read_file(Path(folder, "result.json"))
    b'{}'
    """
    path = Path(path)
    beside = _beside(path)
    with disk(f"write {path}"):
        try:
            write_new(beside, data)
            os.rename(beside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise
        sync_folder(path.parent)


def write_folder(path: str | os.PathLike[str], files: Iterable[tuple[str, Pieces]]) -> None:
    """Make the folder `path` with these files, each in pieces, durably and whole or not at all.

    Written one after another as they are asked for, so that what vouches for the rest comes last. BadInput if
    it is there already or the disk refuses.
    """
    with new_folder(path) as beside:
        for name, pieces in files:
            write_new(beside / check_name(name), pieces)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Within it, an empty folder to fill by `write_new`, which then becomes `path`, durably; if anything is
    raised, nothing is left of it. BadInput if `path` is there already or the disk refuses.
    """
    path = Path(path)
    beside = _beside(path)
    with disk(f"write {path}"):
        if os.path.lexists(path):
            raise BadInput(f"cannot write {path}: it is there already.")
        try:
            os.mkdir(beside, 0o700)
            yield beside
            sync_folder(beside)
            os.rename(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Force the names in a folder to disk: a new or renamed file is durable only after this."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_all(file: int, data: Chunk) -> None:
    """Write every byte to an open file, however few the system takes at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


class Lock:
    """The right to write, held by one process: a `flock` on a file that names its owner.

    The kernel frees it when the owner ends, kill -9 included; children that were forked do not keep it.
    BadInput at once if another holds it.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self._path, self._what = path, what
        with disk(f"lock {what}"):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._file: int | None = os.open(path, flags, 0o600)
            _locks.add(self)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self._file, 0)
                write_all(self._file, f"process {os.getpid()} on {platform.node()}\n".encode())
            except BlockingIOError:
                owner = _owner(self._file)
                self.close()
                raise BadInput(
                    f"{what} is being written by {owner or 'another process'}: one at a time."
                ) from None
            except BaseException:
                self.close()
                raise

    def check(self) -> None:
        """BadInput if the right is gone: the file that stands for it was removed, or is another by now."""
        try:
            mine = self._file is not None and os.path.samestat(os.fstat(self._file), os.lstat(self._path))
        except OSError:
            mine = False
        if not mine:
            raise BadInput(f"{self._what} is no longer this process's to write: {self._path} is gone or new.")

    def close(self) -> None:
        """Give the right back; twice is once."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def _owner(file: int) -> str:
    """Who says to hold a lock. Who has just got it has not yet put its name in the place of a dead one's."""
    for _ in range(100):
        name = os.pread(file, 200, 0).decode(errors="replace").strip()
        found = re.fullmatch(r"process (\d{1,9}) on (.*)", name)
        if found and (found[2] != platform.node() or _lives(int(found[1]))):
            return name
        time.sleep(0.001)
    return ""


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


_locks: WeakSet[Lock] = WeakSet()


def _close_locks() -> None:
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_locks)  # a copy of the file in a child would outlive a killed owner


class RunFolder:
    """A folder that this process alone writes, made if it is not there; mode 0700. A context manager.

    BadInput if it cannot be written, belongs to another user, is open to everybody, or is being written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder, "run")) as run:
    ...     run.write("result.json", b"{}")
    ...     sorted(path.name for path in run.path.iterdir())
    ['result.json', 'run.lock']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with disk(f"write the folder {path}"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = self.path.stat()
            me = os.geteuid()
            if me != 0 and about.st_uid != me:
                raise BadInput(f"cannot write the folder {path}: it belongs to another user.")
            if about.st_mode & stat.S_IWOTH and not about.st_mode & stat.S_ISVTX:
                raise BadInput(
                    f"cannot write the folder {path}: everybody may write there; `chmod o-w` it first."
                )
            self._lock = Lock(self.path / "run.lock", f"the folder {path}")
            for folder, folders, files in os.walk(self.path):
                for name in filter(_LITTER.fullmatch, folders):
                    shutil.rmtree(Path(folder, name), ignore_errors=True)
                for name in filter(_LITTER.fullmatch, files):
                    Path(folder, name).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Put a file into the folder, durably and whole or not at all. BadInput if it is another's by now."""
        self._lock.check()
        write_file(self.path / check_name(name), data)

    def close(self) -> None:
        """Let another process write."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _beside(path: Path) -> Path:
    if not path.name:
        raise BadInput(f"cannot write {path}: it names no file.")
    return path.with_name(f".{path.name}.{token_hex(8)}.tmp")


def write_new(path: Path, pieces: Pieces) -> None:
    """Write a file that is not there yet, and force it to disk; its name is durable only after `sync_folder`.
    OSError if the disk refuses.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            write_all(file, piece)
        os.fsync(file)
    finally:
        os.close(file)
