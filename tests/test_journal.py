"""The journal under what can happen to a file: cut, flipped, doubled, zeroed, killed, full, opened twice."""

import errno
import json
import math
import os
import random
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import line, started

from downslope import journal as room
from downslope.errors import BadInput
from downslope.journal import Event, Journal, read, repair

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner).filter(lambda d: d.keys() != {"float"}),
    max_leaves=10,
)


def written(path: Path, count: int = 6) -> bytes:
    """A journal of so many events."""
    with Journal.open(path) as journal:
        for i in range(count):
            journal.append("step", step=i, loss=[0.5, math.nan, -math.inf][i % 3], name='ü "}\n{"seq":9')
    return path.read_bytes()


def bare(events: list[Event]) -> list[tuple[Any, ...]]:
    return [(event["seq"], event["kind"], event["step"]) for event in events]


def first(count: int) -> list[tuple[Any, ...]]:
    return [(i, "step", i) for i in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), plain, max_size=5), st.text())
@settings(max_examples=100, deadline=None)  # the disk may be slow
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], kind: str
) -> None:
    fields = {key: value for key, value in fields.items() if key not in ("seq", "kind", "time", "sync")}
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    with Journal.open(path) as journal:
        assert [journal.append(kind, **fields), journal.append("end")] == [0, 1]
    event = read(path)[0]
    assert event.pop("time") >= 0
    # NaN is not equal to itself, so compare what prints.
    assert repr(event) == repr({"seq": 0, "kind": kind, **fields})


def test_a_line_is_checksum_and_json_that_any_tool_reads(path: Path) -> None:
    for text in written(path).decode().splitlines():
        event = json.loads(text[9:], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert list(event)[:3] == ["seq", "kind", "time"]
    assert event["loss"] == {"float": "-inf"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seq": 1}, "cannot be called 'seq'"),
        ({"time": 1}, "cannot be called 'time'"),
        ({"loss": b"0.5"}, "plain data"),
        ({"loss": {1, 2}}, "plain data"),
        ({"loss": {1: 2}}, "plain data"),
        ({"loss": {"float": 1}}, "plain data"),
        ({"loss": [Path("x")]}, "plain data"),
    ],
)
def test_what_would_not_come_back_is_refused_and_not_written(
    path: Path, fields: dict[str, Any], said: str
) -> None:
    with Journal.open(path) as journal:
        journal.append("step", step=0)
        with pytest.raises(BadInput, match=said):
            journal.append("step", **fields)
        assert journal.append("step", step=1) == 1
    assert bare(read(path)) == first(2)


def test_several_events_at_once_are_as_one_by_one_and_all_or_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [("step", {"step": step}) for step in range(3)]
    with Journal.open(path) as journal:
        assert journal.extend(events, sync=False) == 2
        assert journal.extend([]) == 2
        with pytest.raises(BadInput, match="plain data"):
            journal.extend([*events, ("step", {"loss": b"0.5"})])
        real = os.write

        def interrupted(file: int, data: bytes) -> int:
            real(file, bytes(data[:-5]))  # two whole lines and a part of the third
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.extend(events)
        assert journal.last == 2
        assert journal.append("step", step=3) == 3
    assert bare(read(path)) == first(4)


# Damage


def test_cut_at_every_byte_the_longest_valid_beginning_is_kept(path: Path) -> None:
    whole = written(path, 4)
    ends = [0] + [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        keep = sum(end <= cut for end in ends) - 1
        assert bare(read(path)) == first(keep), cut
        with Journal.open(path) as journal:
            assert journal.dropped == cut - ends[keep]
            assert journal.append("step", step=keep) == keep
        assert bare(read(path)) == first(keep + 1), cut


def test_every_flipped_byte_is_refused_by_its_offset_or_is_in_the_last_event(path: Path) -> None:
    whole = written(path, 4)
    starts = [0] + [i + 1 for i, byte in enumerate(whole[:-1]) if byte == ord("\n")]
    for place in range(len(whole)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            hit = sum(start <= place for start in starts) - 1
            if hit == 3:
                assert bare(read(path)) == first(3), (place, flip)
                continue
            for use in (read, Journal.open):
                with pytest.raises(
                    BadInput, match=f"is damaged at byte {starts[hit]}: event {hit} is not readable"
                ):
                    use(path)
            assert path.read_bytes() == damaged, "a damaged journal was changed"


def test_a_last_block_that_is_doubled_empty_or_noise_is_dropped(path: Path) -> None:
    whole = written(path)
    generator = random.Random(0)
    tails = [whole[-n:] for n in (1, 40, 100, 150, len(whole))]
    tails += [
        b"\0" * 512,
        b"\n",
        b"\n\n\n",
        b" ",
        b'00000000 {"seq":6,"kind":"x","time":0.0}\n',
        generator.randbytes(512),
    ]
    for tail in tails:
        path.write_bytes(whole + tail)
        assert bare(read(path)) == first(6), tail
        with Journal.open(path) as journal:
            assert journal.dropped == len(tail)
            journal.append("step", step=6)
        assert bare(read(path)) == first(7)


def test_a_lost_swapped_or_foreign_line_in_the_middle_is_refused(path: Path) -> None:
    lines = written(path).splitlines(keepends=True)
    foreign = [[*lines[:2], noise, *lines[2:]] for noise in (b"noise", b"noise\n", b"\n", lines[0])]
    for damaged in (lines[:2] + lines[3:], [*lines[:2], lines[3], lines[2], *lines[4:]], lines[1:], *foreign):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(BadInput, match="is damaged at byte"):
            read(path)


def test_a_true_checksum_of_what_we_never_wrote_is_damage_and_no_traceback(path: Path) -> None:
    texts = [b'{"seq":0,', b'{"seq":0,"kind":"x"}', b'{"seq":0,"kind":3,"time":0.0}']
    texts += [b'{"seq":0,"kind":"x","time":0.0,"loss":{"float":"x"}}', b'{"seq":0,"a":{"float":[]}}']
    for text in [*texts, b'{"seq":0,"a":' + b"[" * 90_000]:
        path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
        assert read(path) == []


def test_repair_keeps_the_valid_beginning_and_a_copy(path: Path) -> None:
    whole = bytearray(written(path))
    third = len(b"".join(bytes(whole).splitlines(keepends=True)[:2]))
    whole[third + 20] ^= 1
    path.write_bytes(whole)
    copy = repair(path)
    assert copy.read_bytes() == whole
    assert bare(read(path)) == first(2)
    with Journal.open(path) as journal:
        assert journal.append("step", step=2) == 2


# One writer


def test_a_second_writer_is_refused_by_the_name_of_the_first(path: Path) -> None:
    with Journal.open(path) as journal:
        journal.append("step", step=0)
        for use in (Journal.open, repair):
            begun = time.monotonic()
            with pytest.raises(
                BadInput, match=f"journal.jsonl is being written by process {os.getpid()} on "
            ):
                use(path)
            assert time.monotonic() - begun < 2  # not a timing: it must not wait for the first to end
        assert bare(read(path)) == first(1)  # readers are free
    Journal.open(path).close()


@pytest.mark.parametrize("how", ["appended", "replaced", "removed"])
def test_an_owner_that_lost_its_lock_writes_nothing_more(path: Path, how: str) -> None:
    with Journal.open(path) as stale:
        stale.append("step", step=0)
        path.with_name(path.name + ".lock").unlink()
        if how == "appended":
            with Journal.open(path) as owner:
                owner.append("step", step=1)
        else:
            path.rename(path.with_name("elsewhere"))
        if how == "replaced":
            written(path, 2)
        before = path.read_bytes() if path.exists() else None
        said = "cannot append" if how == "removed" else "another process has written the journal"
        for use in (stale.check, lambda: stale.append("step", step=1)):
            with pytest.raises(BadInput, match=f"{said}|closed since another process wrote it"):
                use()
        assert (path.read_bytes() if path.exists() else None) == before


def test_what_an_error_quotes_is_written_without_its_secrets(path: Path) -> None:
    with Journal.open(path) as journal:
        journal.append("failed", reason="PASSWORD=HUNTER2", trace="at https://ann:HUNTER2@host", note="a=b")
    (event,) = read(path)
    assert (event["reason"], event["note"]) == ("PASSWORD=[hidden]", "a=b")
    assert b"HUNTER2" not in path.read_bytes()


FORK = """
import os
from downslope.journal import Journal
journal = Journal.open(sys.argv[1])
journal.append("step", step=0)
if os.fork() == 0:
    try:
        journal.append("step", step=9)
    except ValueError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
journal.append("step", step=1)
journal.close()
"""


def test_a_forked_child_cannot_write(path: Path) -> None:
    with started(FORK, path) as process:
        assert f"was opened by process {process.pid}, which alone may write" in line(process)
        assert process.wait() == 0
    assert bare(read(path)) == first(2)


def test_a_closed_journal_says_so(path: Path) -> None:
    journal = Journal.open(path)
    journal.close()
    journal.close()
    with pytest.raises(BadInput, match=r"journal.jsonl is closed\."):
        journal.append("step")


# Killed


WRITER = """
from downslope.journal import Journal
with Journal.open(sys.argv[1]) as journal:
    sync = sys.argv[2] == "sync"
    while True:
        print(journal.append("step", sync=sync, step=journal._end[0], load="x" * 300), flush=True)
"""


def killed_writers(path: Path, sync: str, kills: int, seed: int = 0) -> None:
    generator = random.Random(seed)
    acknowledged = -1
    for _ in range(kills):
        with started(WRITER, path, sync) as process:
            line(process)
            time.sleep(generator.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[0].split("\n")
            acknowledged = max([acknowledged, *(int(word) for word in said[:-1] if word)])
        assert len(read(path)) > acknowledged
    assert bare(read(path)) == first(len(read(path)))
    assert acknowledged > kills


@pytest.mark.parametrize("sync", ["sync", "later"])
def test_kill_nine_loses_nothing_that_was_acknowledged(path: Path, sync: str) -> None:
    killed_writers(path, sync, kills=15)


@pytest.mark.faults
@pytest.mark.parametrize("sync", ["sync", "later"])
def test_kill_nine_many_times(path: Path, sync: str) -> None:
    for seed in range(25):  # anew, for a journal is read whole at every opening
        killed_writers(path.with_name(f"{seed}.jsonl"), sync, kills=20, seed=seed)


# A disk that refuses


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_after_the_disk_refused_the_event_is_not_there_and_the_journal_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    journal = Journal.open(path)
    journal.append("step", step=0)
    real = os.write

    def refuse(file: int, data: bytes = b"") -> int:
        if data:
            real(file, bytes(data[: len(data) // 2]))  # half a line reaches the disk
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(BadInput) as caught:
            journal.append("step", step=1)
    assert str(caught.value) == f"cannot append to {path}: {os.strerror(error)}."
    with pytest.raises(BadInput, match="is closed since the disk refused"):
        journal.append("step", step=1)
    journal.close()
    assert bare(read(path)) == first(1)
    with Journal.open(path) as again:
        assert again.dropped == 0
        assert again.append("step", step=1) == 1


def test_an_interrupt_in_the_middle_of_an_append_leaves_no_trace(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(path) as journal:
        journal.append("step", step=0)
        real = os.write

        def interrupted(file: int, data: bytes) -> int:
            real(file, bytes(data[:30]))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.append("step", step=1)
        assert journal.append("step", step=1) == 1
    assert bare(read(path)) == first(2)


def test_an_unsynced_event_is_on_disk_after_the_next_synced_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), real(file)))
    with Journal.open(path) as journal:
        synced.clear()
        journal.append("step", sync=False)
        assert synced == []
        journal.append("step")
        assert synced == [path.stat().st_size]
        journal.append("step", sync=False)
        journal.sync()
        assert synced[-1] == path.stat().st_size
        journal.append("step", sync=False)
    assert synced[-1] == path.stat().st_size


@pytest.mark.parametrize("where", ["file/journal.jsonl", "nothing/journal.jsonl"])
def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        BadInput, match=r"cannot lock the journal .*: (Not a directory|No such file or directory)\.$"
    ):
        Journal.open(tmp_path / where)


def test_a_link_or_pipe_instead_of_a_journal_is_refused(tmp_path: Path, path: Path) -> None:
    (tmp_path / "treasure").write_bytes(b"gold")
    path.symlink_to(tmp_path / "treasure")
    for use in (read, Journal.open, repair):
        with pytest.raises(BadInput, match="symbolic link"):
            use(path)
    path.unlink()
    os.mkfifo(path)
    for use in (read, Journal.open, repair):
        with pytest.raises(BadInput):
            use(path)
    assert (tmp_path / "treasure").read_bytes() == b"gold"


# Time


def test_time_goes_on_over_openings_and_never_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    with Journal.open(path) as journal:
        now[0] += 5
        journal.append("step")
    now[0] = 3.0  # another boot of the machine: its clock began anew
    with Journal.open(path) as journal:
        journal.append("step")
        now[0] += 2
        journal.append("step")
    assert [event["time"] for event in read(path)] == [5.0, 5.0, 7.0]


def test_the_wall_clock_has_no_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock was asked"))
    written(path)
