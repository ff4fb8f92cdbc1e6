"""The laws of the house: floors, sizes, docstrings, names, what no file may hold."""

import ast
import doctest
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
FILES = sorted((SRC / "downslope").rglob("*.py"))
NAMES = [str(path.relative_to(SRC / "downslope")) for path in FILES]

FLOORS = {
    "errors": 0, "folder": 0, "journal": 0, "rules": 0, "schedule": 0, "toml": 0, "version": 0,
    "augment": 1, "curvature": 1, "distill": 1, "init": 1, "inspection": 1, "kernels": 1, "norm": 1,
    "admission": 2, "average": 2, "dropin": 2, "following": 2, "foreign": 2, "groups": 2, "machine": 2,
    "optimizer": 2, "state": 2,
    "recipe": 3, "strategies": 3,
    "parallel": 4, "tasks": 4,
    "train": 5,
    "race": 7,
    "description": 8, "logger": 8, "report": 8,
    "": 9, "__main__": 9, "cli": 9,  # "" is the package's own __init__: no room looks back through it
}  # fmt: skip
CATALOGUES = {
    f"downslope.rules.{name}" for name in ("adaptive", "classic", "free", "matrix", "signs")
}  # long by nature
BANNED_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "np.load", "numpy.load", "os.system"}
MAY_CALL = {"kernels/compiled.py": {"exec"}}  # the source it has just written
BANNED_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|base|managers?)($|_|\.)", re.IGNORECASE)
MACHINE_PATHS = re.compile(r"/(?:work|root|home|opt|mnt)/|/tmp/(?!\w*\.\.)\w")
WINDOW = 5  # consecutive equal lines of code from which a repetition counts


def module(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def room(name: str) -> str:
    return [*name.split("."), ""][1]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of this package that a module imports: at its head, inside functions, for its types."""
    path, found = MODULES[name], set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            head = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            source = (head + (node.module or "")).rstrip(".")
            parts = {f"{source}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else source for part in parts}
    return frozenset(found & MODULES.keys())


@cache
def code_lines(path: Path) -> dict[int, str]:
    """Line number -> text, of the lines that are neither empty nor comment nor docstring."""
    text = path.read_text("utf-8")
    lines: dict[int, str] = {}
    skip = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    docs = {
        line
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    source = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skip:
            for number in range(token.start[0], token.end[0] + 1):
                if number not in docs and source[number - 1].strip():
                    lines[number] = source[number - 1].strip()
    return lines


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def public(path: Path) -> list[tuple[str, ast.AST]]:
    """Name and node of the public functions and classes of a module, and of their public methods."""
    found: list[tuple[str, ast.AST]] = []
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef) and "Protocol" not in {
                ast.unparse(item) for item in node.bases
            }:
                found += [
                    (f"{node.name}.{item.name}", item)
                    for item in node.body
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
                ]
    return found


def overloaded(node: ast.AST) -> bool:
    return any(
        ast.unparse(item).endswith(("overload", ".setter")) for item in getattr(node, "decorator_list", [])
    )


def test_every_module_stands_on_a_floor() -> None:
    assert {room(name) for name in MODULES} <= FLOORS.keys()


@pytest.mark.parametrize("name", MODULES)
def test_no_room_imports_from_a_floor_above(name: str) -> None:
    mine = FLOORS[room(name)]
    above = {other for other in imports(name) if room(other) != room(name) and FLOORS[room(other)] > mine}
    assert not above, f"{name} stands on floor {mine} and imports upwards: {sorted(above)}"


@pytest.mark.parametrize("of", ["modules", "rooms"])
def test_nothing_imports_in_a_circle(of: str) -> None:
    edges: dict[str, set[str]] = {}
    for name in MODULES:
        here, there = (
            (room(name), {room(other) for other in imports(name)}) if of == "rooms" else (name, imports(name))
        )
        edges.setdefault(here, set()).update(set(there) - {here})
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        for name in leaves:
            del edges[name]
    assert not edges, f"in or above a circle: {sorted(edges)}"


def test_the_mathematics_needs_no_torch() -> None:
    heads = {
        alias.name if isinstance(node, ast.Import) else node.module or ""
        for name, path in MODULES.items()
        if room(name) in {"rules", "schedule", "journal", "errors"}
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {head.split(".")[0] for head in heads} & {"torch", "numba"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = code_lines(path)
    if module(path) not in CATALOGUES:
        assert len(lines) <= 400
    for function in functions(path):
        size = sum(1 for number in range(function.lineno, (function.end_lineno or 0) + 1) if number in lines)
        assert size <= 40, f"{function.name} has {size} lines of code"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_public_things_say_what_they_are_in_twelve_lines(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "the module has no docstring"
    for name, node in public(path):
        if overloaded(node):
            continue
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        assert text, f"{name} has no docstring"
        prose = "".join(part for part in doctest.DocTestParser().parse(text) if isinstance(part, str))
        assert len(prose.split("\n\n\n")[0].strip().splitlines()) <= 12, f"{name} says too much"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_names_say_what_a_thing_is_not_that_it_helps(path: Path) -> None:
    names = [part.removesuffix(".py") for part in path.relative_to(SRC).parts]
    names += [node.name for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [name for name in names if BANNED_NAMES.search(name)]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_unpickles_or_runs_text(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & BANNED_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in BANNED_MODULES
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            allowed = MAY_CALL.get(str(path.relative_to(SRC / "downslope")), set())
            assert called not in BANNED_CALLS - allowed, f"line {node.lineno} calls {called}"


def test_every_import_is_declared_as_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[^\w-]", item)[0] for item in project["dependencies"]}
    declared |= {
        "downslope",
        "sklearn",
        "llvmlite",
        "markupsafe",
        "triton",
        "transformers",
    }  # extra `tasks`; below numba and jinja2; with torch where there is a GPU; who brings such a trainer
    imported = {
        name.split(".")[0]
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert imported - sys.stdlib_module_names <= declared
    assert declared - imported <= {"llvmlite", "markupsafe"}, "a dependency that nothing imports"


def test_few_lines_are_repeated() -> None:
    windows: dict[tuple[str, ...], list[tuple[Path, int]]] = {}
    for path in FILES:
        lines = list(code_lines(path).values())
        for start in range(len(lines) - WINDOW + 1):
            windows.setdefault(tuple(lines[start : start + WINDOW]), []).append((path, start))
    repeated = {
        (path, start + offset)
        for places in windows.values()
        if len(places) > 1
        for path, start in places
        for offset in range(WINDOW)
    }
    total = sum(len(code_lines(path)) for path in FILES)
    worst = Counter(path.name for path, _ in repeated).most_common(3)
    assert len(repeated) <= 0.05 * total, f"{len(repeated)} of {total} lines are repeated, most in {worst}"


def texts() -> list[Path]:
    folders = ["src", "tests", "docs", "benchmarks", ".ci"]
    loose = [path for path in ROOT.iterdir() if path.is_file()]
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".html", ".css", ".js", ""}
    return [path for path in loose + inside if path.suffix in kinds and "__pycache__" not in path.parts]


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_names_a_place_on_one_machine(path: Path) -> None:
    found = MACHINE_PATHS.search(path.read_text("utf-8"))
    assert not found, found


def test_the_package_says_that_it_is_typed() -> None:
    assert (SRC / "downslope" / "py.typed").exists()
