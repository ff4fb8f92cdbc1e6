"""Durable files: every instant at which a write can die, full disks, hostile names and links, one writer."""

import errno
import fcntl
import os
import platform
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import line, started

from downslope.errors import BadInput
from downslope.folder import Lock, RunFolder, check_name, read_file, write_file, write_folder

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
"""What changes a disk, or has to do with when it is changed."""


class Death(BaseException):
    """Stands for kill -9: nothing after it reaches the disk."""


class Disk:
    """The system's calls, dying before or after the n-th one; a write may be torn on the way."""

    def __init__(
        self, patch: pytest.MonkeyPatch, *, die_at: int, after: bool = False, torn: float = 0.0
    ) -> None:
        self.calls: list[str] = []
        self._dead = False
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name), die_at, after, torn))

    def _wrapped(self, name: str, real: Callable[..., Any], die_at: int, after: bool, torn: float) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._dead:
                raise Death
            self.calls.append(name)
            mine = len(self.calls) == die_at + 1
            if mine and not after:
                self._dead = True
                if name == "write":
                    real(args[0], bytes(args[1])[: int(len(args[1]) * torn)])
                raise Death
            result = real(*args, **kwargs)
            if mine:
                self._dead = True
                raise Death
            return result

        return call


def deaths(save: Callable[[], None]) -> Iterator[str]:
    """Run `save` once for every instant at which it can die; yields the name of that instant after each."""
    ways = [{"torn": torn} for torn in (0.0, 0.5, 0.999)] + [{"after": True}]
    for way in ways:
        for die_at in range(1000):
            with pytest.MonkeyPatch.context() as patch:
                disk = Disk(patch, die_at=die_at, **way)  # type: ignore[arg-type]
                try:
                    save()
                except Death:
                    pass
                else:
                    break
            yield f"{way}, call {die_at} ({disk.calls[-1]})"


def test_a_file_is_old_or_new_at_every_instant_of_its_writing(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    seen = set()
    path.write_bytes(b"old")
    instants = 0
    for instant in deaths(lambda: write_file(path, b"new " * 100)):
        seen.add(path.read_bytes())
        assert path.read_bytes() in (b"old", b"new " * 100), instant
        path.write_bytes(b"old")
        instants += 1
    assert seen == {b"old", b"new " * 100}
    assert instants >= 20


def test_a_folder_is_whole_or_not_there_at_every_instant_of_its_writing(tmp_path: Path) -> None:
    files = {"model.safetensors": b"m" * 300, "manifest.json": b"{}"}
    steps = count()
    seen = set()
    for instant in deaths(lambda: write_folder(tmp_path / f"step-{next(steps)}", files.items())):
        whole = [folder for folder in tmp_path.iterdir() if not folder.name.startswith(".")]
        for folder in whole:
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == files, instant
        seen.add(len(whole))
    assert {0, 1, 2} <= seen


def test_everything_is_on_disk_before_it_is_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, die_at=-2)
    write_file(tmp_path / "a", b"1")
    assert disk.calls == ["open", "write", "fsync", "rename", "open", "fsync"]
    disk.calls.clear()
    write_folder(tmp_path / "b", {"x": b"1", "y": b"2"}.items())
    assert disk.calls == [
        *["mkdir", "open", "write", "fsync", "open", "write", "fsync"],
        *["open", "fsync", "rename", "open", "fsync"],
    ]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_is_one_sentence_and_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    path = tmp_path / "result.json"
    write_file(path, b"old")

    real = getattr(os, call)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if call == "open" and not args[1] & os.O_CREAT:  # looking is still allowed
            return real(*args, **kwargs)
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(BadInput) as caught:
            write_file(path, b"new")
        with pytest.raises(BadInput):
            write_folder(tmp_path / "folder", {"x": b"new"}.items())
    assert str(caught.value) == f"cannot write {path}: {os.strerror(error)}."
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert path.read_bytes() == b"old"


def test_a_write_that_takes_few_bytes_at_a_time_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data[:3])))
    write_file(tmp_path / "a", bytes(range(256)))
    assert (tmp_path / "a").read_bytes() == bytes(range(256))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs rights that this user does not have")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_there(small_disk: Path) -> None:
    with RunFolder(small_disk) as run:
        run.write("result.json", b"old")
        with pytest.raises(BadInput, match=r"cannot write .*result.json: No space left on device\."):
            run.write("result.json", b"x" * 1_000_000)
        with pytest.raises(BadInput, match="No space left on device"):
            write_folder(small_disk / "ckpt", {"a": b"1", "b": b"x" * 1_000_000}.items())
        assert (small_disk / "result.json").read_bytes() == b"old"
        assert sorted(path.name for path in small_disk.iterdir()) == ["result.json", "run.lock"]


# Names, links, modes


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", fullmatch=True))
def test_plain_names_are_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a\n", "a b", "-rf", "_x", "a" * 81, "ä", "a\0", "a:b"],
)
def test_hostile_names_are_refused_and_make_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="cannot be a name") as caught:
        check_name(name)
    assert "\n" not in str(caught.value)
    with RunFolder(tmp_path / "run") as run, pytest.raises(BadInput):
        run.write(name, b"x")
    with pytest.raises(BadInput):
        write_folder(tmp_path / "folder", {name: b"x"}.items())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run", "run.lock"]


def test_a_link_where_a_file_should_be_is_not_followed(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_bytes(b"gold")
    for name in ("result.json", "run.lock"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / name).symlink_to(treasure)
        if name == "run.lock":
            with pytest.raises(BadInput, match="symbolic link"):
                RunFolder(run)
        else:
            with pytest.raises(BadInput, match="symbolic link"):
                read_file(run / name)
            write_file(run / name, b"ours")
            assert not (run / name).is_symlink()
    assert treasure.read_bytes() == b"gold"


def test_only_regular_files_of_a_decent_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="it is not a regular file"):
        read_file(tmp_path / "pipe")  # and does not wait for a writer
    with pytest.raises(BadInput, match="it is not a regular file"):
        read_file(tmp_path)
    with pytest.raises(BadInput, match="cannot read .*nothing: No such file or directory"):
        read_file(tmp_path / "nothing")
    (tmp_path / "big").write_bytes(b"x" * 11)
    with pytest.raises(BadInput, match="it has 11 bytes, at most 10 are allowed"):
        read_file(tmp_path / "big", limit=10)
    assert read_file(tmp_path / "big", limit=11) == b"x" * 11


def test_what_we_make_is_for_its_owner_alone(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "run") as run:
        run.write("result.json", b"x")
        write_folder(run.path / "ckpt", {"state.json": b"x"}.items())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [run.path, *run.path.rglob("*")]}
    assert modes == {
        "run": 0o700,
        "result.json": 0o600,
        "run.lock": 0o600,
        "ckpt": 0o700,
        "state.json": 0o600,
    }


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "", "/", ".", "a" * 300, "nothing/a", "a\nb/c"])
def test_paths_that_name_no_file_are_one_sentence(path: str) -> None:
    for use in (
        read_file,
        lambda p: write_file(p, b""),
        lambda p: write_folder(p, {}.items()),
        lambda p: Lock(p, f"{p}"),
    ):
        with pytest.raises(BadInput, match=r"^cannot (read|write|lock) ") as caught:
            use(path)
        assert "\n" not in str(caught.value)


# Run folders


def test_a_folder_below_a_plain_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match=r"cannot write the folder .*file/run: Not a directory\."):
        RunFolder(tmp_path / "file" / "run")
    with pytest.raises(BadInput, match=r"cannot write the folder .*file: File exists\."):
        RunFolder(tmp_path / "file")


def test_a_folder_open_to_everybody_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(BadInput, match="everybody may write there"):
        RunFolder(tmp_path / "run")


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BadInput, match="it belongs to another user"):
        RunFolder(tmp_path)


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    keep = [".git", ".a.tmp", "b.0123456789abcdef.tmp", ".c.0123456789abcdeg.tmp", "result.json"]
    for folder in (tmp_path, tmp_path / "ckpt"):
        folder.mkdir(exist_ok=True)
        for name in [*keep, ".result.json.0123456789abcdef.tmp"]:
            (folder / name).write_text("x")
        (folder / ".step-1.0123456789abcdef.tmp").mkdir()
        (folder / ".step-1.0123456789abcdef.tmp" / "model.safetensors").write_text("x")
    (tmp_path / ".link.0123456789abcdef.tmp").symlink_to(tmp_path / "ckpt")
    with RunFolder(tmp_path):
        assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {*keep}
        assert {path.name for path in tmp_path.iterdir()} == {
            *keep,
            "ckpt",
            "run.lock",
            ".link.0123456789abcdef.tmp",
        }


HOLD = """
import sys, time
from downslope.folder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_an_owner_whose_lock_file_is_gone_or_new_writes_nothing_more(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as stale:
        stale.write("result.json", b"1")
        (tmp_path / "run.lock").unlink()
        with pytest.raises(BadInput, match="is no longer this process's to write"):
            stale.write("result.json", b"2")
        with RunFolder(tmp_path), pytest.raises(BadInput, match="is no longer this process's to write"):
            stale.write("result.json", b"2")
    assert (tmp_path / "result.json").read_bytes() == b"1"


FORK = """
import os, sys, time
from downslope.folder import RunFolder
with RunFolder(sys.argv[1]):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_by_the_name_of_the_first_until_it_is_killed(tmp_path: Path) -> None:
    with started(HOLD, tmp_path / "run") as process:
        assert line(process) == "held"
        for awake in (True, False):
            if not awake:
                process.send_signal(signal.SIGSTOP)  # a sleeping owner is an owner
            with pytest.raises(BadInput, match=f"is being written by process {process.pid} on "):
                RunFolder(tmp_path / "run")
        process.kill()
        process.wait()
        with RunFolder(tmp_path / "run") as run:
            assert (run.path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("before", ["", f"process 999999999 on {platform.node()}\n"])
def test_who_has_just_got_the_right_is_named_and_not_who_had_it(tmp_path: Path, before: str) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(before)
        file.flush()
        with pytest.raises(BadInput, match="this is being written by another process"):
            Lock(path, "this")
        writing = Timer(0.02, lambda: path.write_text(f"process {os.getpid()} on {platform.node()}\n"))
        writing.start()
        with pytest.raises(BadInput, match=f"this is being written by process {os.getpid()} on"):
            Lock(path, "this")
        writing.join()


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    with started(FORK, tmp_path / "run") as process:
        child = int(line(process))
        try:
            with pytest.raises(BadInput, match="is being written by"):
                RunFolder(tmp_path / "run")
            process.kill()
            process.wait()
            os.kill(child, 0)  # still there
            RunFolder(tmp_path / "run").close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_of_many_that_start_at_once_one_writes(tmp_path: Path) -> None:
    with ExitStack() as stack:
        gate = Lock(tmp_path / "gate", "the gate")
        program = f"import fcntl\nfcntl.flock(open({str(tmp_path / 'gate')!r}), fcntl.LOCK_SH)\n{HOLD}"
        processes = [stack.enter_context(started(program, tmp_path / "run")) for _ in range(6)]
        gate.close()
        losers: list[Any] = []
        while len(losers) < 5:
            losers = [process for process in processes if process.poll() is not None]
            time.sleep(0.01)
        (winner,) = set(processes) - set(losers)
        assert line(winner) == "held"
        assert all(f"process {winner.pid} on" in process.communicate()[1] for process in losers)


def test_a_lock_is_given_back_once_and_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        lock = Lock(tmp_path / "lock", "this")
        with pytest.raises(BadInput, match=f"this is being written by process {os.getpid()}"):
            Lock(tmp_path / "lock", "this")
        lock.close()
        lock.close()
