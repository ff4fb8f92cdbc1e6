"""The journal: append-only JSON lines, the only thing that those who write a run and those who read it share.

A line is the CRC-32 of its JSON, a space, the JSON and a newline; the JSON begins with the sequence number.
An event whose append has returned is on disk and survives kill -9 at any instant (with `sync=False` it
survives that, but not a power failure before the next sync). What a crash tore off at the end is dropped at
the next open. Damage before that is never passed over: it is refused by its offset, and `repair` keeps what
precedes it and a copy of the whole.
"""

import json
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

from downslope.errors import BadInput, redact
from downslope.folder import Lock, disk, read_file, sync_folder, write_all, write_file

Event: TypeAlias = dict[str, Any]
"""One line: "seq" (from 0, without gaps), "kind", "time", and the fields it was appended with."""

_OWN = ("seq", "kind", "time")
_QUOTING = ("reason", "trace")  # fields in which an error may quote the user's passwords
_START = re.compile(rb'(?=[0-9a-f]{8} \{"seq":\d)')
_LINE = re.compile(rb'([0-9a-f]{8}) (\{"seq":(\d{1,15}),[^\n]*)\n')


class Journal:
    """A journal open for appending, by one process at a time. A context manager.

    "time" is seconds on a monotonic clock since the journal began, not counting when nobody had it open;
    order is by "seq" alone. `dropped` counts the bytes of a torn tail that opening cut off. BadInput if
    another process has it open, if it is damaged, if the disk refuses.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Journal.open(Path(folder, "journal.jsonl")) as journal:
    ...         _ = journal.append("step", loss=0.5)
    ...         journal.append("step", loss=float("nan"))
    ...     [event["loss"] for event in read(Path(folder, "journal.jsonl"))]
    1
    [0.5, nan]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = Lock(_lock_of(self.path), f"the journal {path}")
        try:
            self._file: int | None
            self._file, events, size, self.dropped = _open(self.path)
            self._inode = os.fstat(self._file).st_ino
        except BaseException:
            self._lock.close()
            raise
        self._end = (len(events), size)  # one attribute, so that an interrupt never sees half of it
        self._since: float = events[-1]["time"] if events else 0.0
        self._opened = time.monotonic()
        self._process = os.getpid()
        self._failed = ""  # why, if no more can be appended
        self._turn = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The journal at `path`, made if it is not there, ready for the next event."""
        return cls(path)

    @property
    def last(self) -> int:
        """The "seq" of the last event; -1 if there is none."""
        return self._end[0] - 1

    def append(self, kind: str, /, sync: bool = True, **fields: Any) -> int:
        """Write one event and return its "seq"; on disk when this returns, unless `sync` is False.

        Fields are plain JSON data; NaN and infinities survive; in "reason" and "trace" what looks like a
        secret is hidden. BadInput if one is not, if another process has written the journal, or if the disk
        refuses: then the event is not in the journal, and the journal must be opened again.
        """
        return self.extend([(kind, fields)], sync)

    def extend(self, events: Iterable[tuple[str, Mapping[str, Any]]], sync: bool = True) -> int:
        """Write several events, pairs of kind and fields, in one go, and return the "seq" of the last; as
        `append` does one. BadInput leaves none of them.
        """
        with self._turn:
            file = self._ready()
            seq, size = self._end
            now = self._since + time.monotonic() - self._opened
            lines = [
                _line({"seq": at, "kind": kind, "time": now, **_safe(fields)})
                for at, (kind, fields) in enumerate(events, seq)
            ]
            text = b"".join(lines)
            try:
                with self._giving_up(f"append to {self.path}"):
                    write_all(file, text)
                    if sync:
                        os.fsync(file)
                self._end = (seq + len(lines), size + len(text))
            except (
                BaseException
            ):  # an interrupt too must not leave half a line, or a line that was never counted
                with suppress(OSError):
                    os.ftruncate(file, self._end[1])
                raise
            return self.last

    def check(self) -> None:
        """BadInput unless this process alone has written the journal since it opened it.

        A lock can be lost: its file was deleted, the file system has none. Whoever then wrote here is the
        owner, and this one must leave everything as it is. Ask before writing what an event will vouch for.
        """
        with self._turn:
            self._ready()

    def sync(self) -> None:
        """Force to disk what was appended with `sync=False`. BadInput if the disk refuses."""
        with self._turn, self._giving_up(f"write {self.path}"):
            os.fsync(self._ready())

    def close(self) -> None:
        """Force everything to disk and let another process write; twice is once."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if not self._failed and os.getpid() == self._process:
                with disk(f"write {self.path}"):
                    os.fsync(file)
        finally:
            os.close(file)
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ready(self) -> int:
        if self._file is None or self._failed:
            raise BadInput(f"the journal {self.path} is closed{self._failed}.")
        if os.getpid() != self._process:
            raise BadInput(
                f"the journal {self.path} was opened by process {self._process}, which alone may write."
            )
        with disk(f"append to {self.path}"):
            found = os.stat(self.path)
        if (found.st_ino, found.st_size) != (self._inode, self._end[1]):
            self._failed = " since another process wrote it"
            raise BadInput(f"another process has written the journal {self.path}: this one stops.")
        return self._file

    @contextmanager
    def _giving_up(self, doing: str) -> Iterator[None]:
        """After the disk refused, nobody knows what it holds (fsync forgets its errors): no more appends."""
        try:
            with disk(doing):
                yield
        except BadInput as error:
            if isinstance(error.__cause__, OSError):
                self._failed = " since the disk refused"
            raise


def read(path: str | os.PathLike[str]) -> list[Event]:
    """Every event of a journal, also while it is being written; an end that is torn is left out.

    BadInput if there is no journal, or if it is damaged before its end.
    """
    return _scan(read_file(path), path)[0]


def repair(path: str | os.PathLike[str]) -> Path:
    """Cut a damaged journal to its longest valid beginning; gives the path of the copy kept of the whole.

    What followed the damage is lost to the journal: whoever resumes from it does that work again.
    """
    path = Path(path)
    lock = Lock(_lock_of(path), f"the journal {path}")
    try:
        data = read_file(path)
        copy = path.with_name(f"{path.name}.damaged-{zlib.crc32(data):08x}")
        write_file(copy, data)
        write_file(path, data[: _prefix(data)[1]])
    finally:
        lock.close()
    return copy


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _open(path: Path) -> tuple[int, list[Event], int, int]:
    """The open file, its events, their size, and how much of a torn tail was cut off behind them."""
    with disk(f"open {path}"):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try:
            sync_folder(path.parent)  # a new file is durable only with its name
            data = read_file(path)
            events, size = _scan(data, path)
            if size < len(data):
                os.ftruncate(file, size)
                os.fsync(file)
        except BaseException:
            os.close(file)
            raise
    return file, events, size, len(data) - size


def _safe(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of an event, without what looks like a secret in those that quote."""
    if taken := [name for name in _OWN if name in fields]:
        raise BadInput(f"a field of an event cannot be called {taken[0]!r}: the journal writes that itself.")
    told = {name: redact(fields[name]) for name in _QUOTING if isinstance(fields.get(name), str)}
    return {**fields, **told} if told else fields


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _line(event: Event) -> bytes:
    text = _encode(_written(event)).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


_ALIKE = frozenset({bool, int, str, type(None)})


def _written(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become {"float": "nan"}. What would not come back is refused."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    if isinstance(value, dict) and value.keys() != {"float"} and all(isinstance(key, str) for key in value):
        return {key: item if type(item) in _ALIKE else _written(item) for key, item in value.items()}
    raise BadInput(
        f"a journal holds plain data (text, numbers, lists, tables with text keys), got {value!r}."
    )


def _read(table: dict[str, Any]) -> Any:
    return float(table["float"]) if table.keys() == {"float"} else table


def _event(line: re.Match[bytes]) -> Event | None:
    if int(line[1], 16) != zlib.crc32(line[2]):
        return None
    try:
        event: Event = json.loads(line[2], object_hook=_read)
    except (ValueError, TypeError, RecursionError):  # a true checksum of what we never wrote
        return None
    return event if isinstance(event.get("kind"), str) and isinstance(event.get("time"), float) else None


def _prefix(data: bytes) -> tuple[list[Event], int]:
    """The events of the longest valid beginning, and its length in bytes."""
    events: list[Event] = []
    end = 0
    while (line := _LINE.match(data, end)) and int(line[3]) == len(events) and (event := _event(line)):
        events.append(event)
        end = line.end()
    return events, end


def _scan(data: bytes, path: object) -> tuple[list[Event], int]:
    """The longest valid beginning, if nothing after it is an event that was written later."""
    events, end = _prefix(data)
    # Wherever a line could begin, not only after a newline: the newline itself may be what is damaged.
    for start in _START.finditer(data, end):
        line = _LINE.match(data, start.start())
        if line and int(line[3]) >= len(events) and _event(line):
            lost, later = len(events), int(line[3])
            raise BadInput(
                f"{path} is damaged at byte {end}: event {lost} is not readable, event {later} behind it is."
            )
    return events, end
