"""What generated kernels are compiled with: flags, a pointer, an order-free sum, and a cache in the user's
own folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import stat
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import llvmlite.binding
import llvmlite.ir as ir
import numba
from numba import carray, cfunc, njit  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.core import types as numba_types
from numba.extending import intrinsic

# A rule with three slots touches five arrays, too many for LLVM to prove apart and vectorise by default.
llvmlite.binding.set_option("downslope", "-runtime-memory-check-threshold=128")


def jit(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile at once, without the GIL. Division by zero is no error, and no flag assumes away NaN or
    infinity.
    """
    made = njit(signature, nogil=True, error_model="numpy", cache=_caching)
    return cast("Callable[[Callable[..., Any]], Any]", made)


def entry(function: Callable[..., Any]) -> Any:
    """Make a C function `void start(void *job)` of a function, for threads that know nothing of Python."""
    return cfunc("void(voidptr)", cache=_caching)(function)


@njit(fastmath={"reassoc"}, inline="never")
def accumulate(total, term):  # type: ignore[no-untyped-def]
    """total + term, in any order: only this addition may be reordered, which lets LLVM keep several sums at
    once.
    """
    return total + term


@njit(fastmath={"contract"}, inline="never")
def fused(a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once where the processor can: the square of a tiny gradient is then never a denormal
    number of its own, which would cost a hundred times as much.
    """
    return a * b + c


@njit(inline="never")
def unroll(out, address, begin, length, span, run):  # type: ignore[no-untyped-def]
    """Fill `out` with what elements `begin` and on of a weight read of an array of lines: the element at
    `flat` reads the entry at `flat // span * run + flat % run`.
    """
    values, done = carray(pointer(address), (1,), out.dtype), 0  # type: ignore[call-arg]
    while done < length:  # type: ignore[unreachable]
        flat = begin + done
        start = flat // span * run + flat % run
        if run == 1:
            count, step = min(span - flat % span, length - done), 0
        else:
            count, step = min(run - flat % run, length - done), 1
        if step == 0:
            out[done : done + count] = values[start]
        else:
            for j in range(count):
                out[done + j] = values[start + j]
        done += count


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer that carray takes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba_types.voidptr(numba_types.int64), generate


@intrinsic
def claim(typing_context, address, count):  # type: ignore[no-untyped-def]
    """Add `count` to the number at `address`, in one step that no thread can split; what it was before."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number = builder.inttoptr(arguments[0], arguments[1].type.as_pointer())
        return builder.atomic_rmw("add", number, arguments[1], "monotonic")

    return numba_types.int64(numba_types.uintp, numba_types.int64), generate


@intrinsic
def mark(typing_context, address, bits):  # type: ignore[no-untyped-def]
    """Set `bits` in the number at `address`, in one step that no thread can split; what it was before."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number = builder.inttoptr(arguments[0], arguments[1].type.as_pointer())
        return builder.atomic_rmw("or", number, arguments[1], "monotonic")

    return numba_types.int64(numba_types.uintp, numba_types.int64), generate


@intrinsic
def call(typing_context, function, first, second):  # type: ignore[no-untyped-def]
    """Call the C function at an address with two words; the word that it returns."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = arguments[0].type
        kind = ir.FunctionType(word, [word, word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return numba_types.int64(numba_types.int64, numba_types.int64, numba_types.int64), generate


_caching = False


def cache_folder() -> Path | None:
    """The folder of compiled kernels: `$DOWNSLOPE_CACHE`, else `downslope/kernels` in the user's cache; None
    if it is not safe.

    Numba's cache is read back as code, so the folder must belong to this user and be writable to nobody else.
    Without one, kernels live in memory and are compiled anew in every process.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DOWNSLOPE_CACHE") or Path(root) / "downslope" / "kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.lstat()
    except OSError:
        return None
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    alone = sys.platform == "win32" or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if stat.S_ISDIR(found.st_mode) and mine and alone and os.access(folder, os.W_OK) else None


@cache
def _origin() -> str:
    """What makes machine code of a kernel's text: the words that it takes in, Numba and Python. Numba sees
    only a change of the text itself.
    """
    from downslope.kernels import half
    from downslope.rules import noise

    words = [inspect.getsource(module) for module in (sys.modules[__name__], half, noise)]
    return "\n".join([*words, numba.__version__, sys.version])


@cache
def load(text: str) -> Any:
    """The generated module of this text, from the cache if it was compiled before on this machine."""
    global _caching
    name = f"kernel_{hashlib.sha256((text + _origin()).encode()).hexdigest()[:24]}"
    folder = cache_folder()
    if folder is not None:
        _caching = True
        try:
            return _from_file(name, text, folder / f"{name}.py")
        except (
            Exception
        ):  # a full disk, a damaged cache: no reason not to train. A real fault shows again below
            sys.modules.pop(name, None)
        finally:
            _caching = False
    return _from_memory(name, text)


def _from_file(name: str, text: str, path: Path) -> types.ModuleType:
    if not path.exists() or path.read_text() != text:
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(text)
        draft.replace(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # numba looks the module up by name when it reads its cache back
    spec.loader.exec_module(module)
    return module


def _from_memory(name: str, text: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(text, f"<{name}>", "exec"), module.__dict__)  # noqa: S102 - the source was written just above
    return module
