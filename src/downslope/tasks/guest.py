"""The border to code that is not ours: loading it, and telling whose fault it was."""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from sysconfig import get_path
from traceback import walk_tb
from types import CodeType, ModuleType

from downslope.errors import BadInput, DownslopeError, UserCodeError, nearest
from downslope.tasks.definition import Task
from downslope.tasks.entry import Entry

_PACKAGE = str(Path(__file__).resolve().parents[1])
_HIDDEN = (_PACKAGE, "<frozen importlib", contextmanager.__code__.co_filename)
_LIBRARIES = (*_HIDDEN, "<", *{get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_loaded: dict[str, tuple[Path, str]] = {}
"""Which file, with which SHA-256, stands behind a module name that was registered here."""


class guest:  # reads as what it is, a context: `with guest("the loss"):`
    """Runs the user's code: whatever it raises, `sys.exit` included, becomes the cause of a UserCodeError.

    What our own code refuses inside, such as a wrong argument, stays what it is, with the user's line. It may
    be entered again and again.

    >>> with guest("the loss"):
    ...     1 / 0
    Traceback (most recent call last):
    downslope.errors.UserCodeError: the loss raised ZeroDivisionError: division by zero
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserCodeError) or not isinstance(error, Exception | SystemExit):
            return
        if isinstance(error, DownslopeError) and _ours(error):
            return
        said = str(error).strip().split("\n")[0]
        raise UserCodeError(
            f"{self.what} raised {type(error).__name__}{': ' + said if said else ''}"
        ) from error


def _ours(error: DownslopeError) -> bool:
    """Whether our own code raised it; if the user's code had called that, its sentence begins with where."""
    path = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    if not path[-1][0].startswith(_PACKAGE):
        return False
    theirs = [f"{Path(file).name}:{line}: " for file, line in path if not file.startswith(_LIBRARIES)]
    if theirs and not str(error).startswith(theirs[-1]):  # the border inside this one has said it
        error.args = (f"{theirs[-1]}{error}",)
    return True


def frames(error: BaseException) -> str:
    """The traceback of what the user's code raised, as Python prints it, without this package's frames."""
    cause = error.__cause__ if isinstance(error, UserCodeError) and error.__cause__ else error
    if (
        cause.__traceback__ is None
    ):  # never raised here: it brings the traceback of another process as its text
        return f"{str(cause).rstrip()}\n"
    report = traceback.TracebackException.from_exception(cause)
    part: traceback.TracebackException | None = report
    while part is not None:
        theirs = [frame for frame in part.stack if not frame.filename.startswith(_HIDDEN)]
        part.stack = traceback.StackSummary.from_list(theirs)
        part = part.__cause__ or part.__context__
    return "".join(report.format())


def load(address: str, seed: int = 0, sha256: str = "") -> Task:
    """The task that `path/to/file.py:function` returns; the function gets `seed` if it has such a parameter.

    The file's folder joins `sys.path` and the module is registered under the file's own name, so that spawned
    workers find its classes. Raises BadInput for a wrong address or a result that is no Task, UserCodeError
    for what the code raises. Of a file whose SHA-256 is not `sha256`, if that is given, nothing is run.
    """
    made, entry = made_by(address, seed, sha256)
    file, function = entry.own or ("", "")
    if not isinstance(made, Task):
        raise BadInput(
            f"{Path(file).name}:{function} must return a downslope.Task, got {type(made).__name__}."
        )
    return replace(made, name=made.name or function, entry=entry)


def made_by(address: str, seed: int = 0, sha256: str = "") -> tuple[object, Entry]:
    """What `path/to/file.py:function` returns, whatever that is, and the entry of it; see `load`."""
    own = Entry(address).own
    if own is None:
        raise BadInput(f"A task of your own is written path/to/file.py:function, got {address!r}.")
    module, path, sha256 = _module(own[0], sha256)
    function = _function(module, own[1], path)
    with guest(f"The task function {own[1]!r} of {path.name}"):
        seeded = "seed" in inspect.signature(function).parameters
        made = function(seed=seed) if seeded else function()
    return made, Entry(f"{path}:{own[1]}", seed, sha256)


class _Bytes(SourceFileLoader):
    """Runs the very bytes that were hashed; a cached .pyc could be older than the file."""

    source: bytes = b""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.source, self.path)
        return code


def _module(file: str, expected: str) -> tuple[ModuleType, Path, str]:
    path = Path(file).expanduser().resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise BadInput(f"The task file {file} cannot be read: {error.strerror}.") from None
    name, sha256 = path.stem, hashlib.sha256(source).hexdigest()
    if expected not in ("", sha256):
        raise BadInput(f"The task file {file} has changed since this run began; resume it with the old file.")
    if not name.isidentifier():
        raise BadInput(
            f"A task file must be named like a Python module, letters, digits and _, got {path.name!r}."
        )
    if _loaded.get(name) == (path, sha256):
        return sys.modules[name], path, sha256
    imported = getattr(sys.modules.get(name), "__file__", None)
    taken = name in sys.modules and name not in _loaded and (not imported or Path(imported).resolve() != path)
    if taken or name in sys.stdlib_module_names:
        raise BadInput(f"The task file {path.name} is named like the module {name!r}; give it another name.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    loader = _Bytes(name, str(path))
    loader.source = source
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with guest(f"The task file {path.name}"):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        _loaded.pop(name, None)
        raise
    _loaded[name] = (path, sha256)
    return module, path, sha256


def _function(module: ModuleType, name: str, path: Path) -> Callable[..., object]:
    found: Callable[..., object] | None = getattr(module, name, None)
    if callable(found):
        return found
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    if found is not None:
        raise BadInput(f"{name!r} of {path.name} is not a function but a {type(found).__name__}.")
    raise BadInput(
        f"{path.name} has no function {name!r}.{nearest(name, own)} It has: {', '.join(own) or 'none'}."
    )
