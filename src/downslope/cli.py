"""The command line: thin; the one place where the verbs meet.

Results go to stdout, all else to stderr. Exit codes: 0 done, 1 the user's own code failed, 2 bad input,
130 stopped by Ctrl-C.
"""

import inspect
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from downslope.errors import BadInput, DownslopeError, UserCodeError, nearest
from downslope.race import Standings
from downslope.race import race as run_race
from downslope.recipe import Recipe
from downslope.report import report as write_report
from downslope.rules import Rule, links, rules
from downslope.rules.glossary import term
from downslope.schedule import KINDS, Schedule
from downslope.tasks import Task, frames, size, task, tasks
from downslope.train import Run, steps_per_epoch
from downslope.train import resume as go_on
from downslope.train import train as run_training

app = typer.Typer(
    name="downslope",
    help="Finds, runs and proves the optimisation strategy of a PyTorch model.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="A built-in name (downslope list tasks) or path/to/file.py:function."
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run or a race.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Seed = Annotated[
    int, typer.Option(help="Of the split of the data, the initial weights and the order of samples.")
]


def main() -> NoReturn:
    """Runs the command that `sys.argv` names, and exits with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one command. A fault is one line on stderr, below the traceback of the user's code."""
    try:
        code = app(arguments, prog_name="downslope", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserCodeError as error:
        typer.echo(frames(error), err=True, nl=False)
        return _failed(str(error), error.exit_code)
    except DownslopeError as error:
        return _failed(str(error), error.exit_code)
    except typer.TyperException as error:
        return _failed(error.format_message(), error.exit_code)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the flush at exit must not raise again
        return 1
    except OSError as error:
        return _failed(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from downslope.version import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def race(
    name: TaskName,
    out: Annotated[Path | None, typer.Option(help="Folder of the race. Default: runs/TASK.")] = None,
    budget: Annotated[
        str, typer.Option(help="Of the search: full trainings (20x), steps (5000 steps) or time (10m).")
    ] = "20x",
    seeds: Annotated[int, typer.Option(help="Fresh seeds on which the finalists are repeated.")] = 5,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    recipe: Annotated[
        list[Path] | None, typer.Option(help="A recipe of your own that races too; may be repeated.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Race these rules only; may be repeated.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find the best recipe for a task. The same command again goes on where it was stopped."""
    own = {path.stem: path for path in recipe or []}
    if len(own) < len(recipe or []):
        raise BadInput("Two recipes have one file name; the standings could not tell them apart.")
    with _aside():
        found = task(name, seed)
        folder = out or Path("runs", found.name)
        with _stoppable(shlex.join(["downslope", *sys.argv[1:]])):
            standings = run_race(
                found,
                budget=budget,
                seeds=seeds,
                out=folder,
                workers=workers,
                seed=seed,
                recipes=own,
                rules=rule,
            )
            page = write_report(folder)
    _answer(
        as_json,
        {**standings.data(), "folder": str(folder), "report": str(page)},
        lambda: _won(standings, found, folder, page),
    )


@app.command()
def train(
    name: TaskName,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in TOML. Default: the task's own.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/TASK-RECIPE-SEED.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a task by one recipe."""
    given = Recipe.load(recipe) if recipe else None
    with _aside():
        found = task(name, seed)
        chosen = given or found.recipe
        folder = out or Path("runs", f"{found.name}-{chosen.hash[:8]}-{seed}")
        with _stoppable(f"downslope resume {shlex.quote(str(folder))}"):
            done = run_training(found, chosen, out=folder, seed=seed)
    _trained(done, as_json)


@app.command()
def resume(
    folder: Folder,
    allow_code_change: Annotated[
        bool, typer.Option("--allow-code-change", help="Go on though the task's file is another.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped; it ends as if it had never been."""
    with _aside(), _stoppable(f"downslope resume {shlex.quote(str(folder))}"):
        done = go_on(folder, allow_code_change=allow_code_change)
    _trained(done, as_json)


@app.command()
def report(folder: Folder, as_json: Json = False) -> None:
    """Draw a run or a race, finished or not, as one page that opens anywhere."""
    page = write_report(folder)
    _answer(as_json, {"report": str(page)}, lambda: str(page))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="RULE|LINK|SCHEDULE|TASK")],
    as_json: Json = False,
) -> None:
    """What a rule, link or schedule is: formula, source, numbers."""
    known: dict[str, Any] = {**KINDS, **links(), **rules()}
    if name not in known:
        raise BadInput(
            f"There is no rule, link or schedule {name!r}.{nearest(name, known)} See: downslope list."
        )
    if name in KINDS:
        _answer(as_json, _schedule_data(name), lambda: _schedule_page(name))
    else:
        _answer(as_json, _rule_data(known[name]), lambda: _rule_page(known[name]))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="[tasks|rules|links|schedules]")] = "",
    as_json: Json = False,
) -> None:
    """What there is: tasks, rules, links, schedules."""
    every: dict[str, Mapping[str, Any]] = {
        "tasks": tasks(),
        "rules": rules(),
        "links": links(),
        "schedules": KINDS,
    }
    if what and what not in every:
        raise BadInput(f"There is no list {what!r}.{nearest(what, every)} There are: {', '.join(every)}.")
    chosen = {
        kind: {name: _summary(item) for name, item in every[kind].items()}
        for kind in every
        if what in ("", kind)
    }
    _answer(
        as_json, chosen, lambda: "\n\n".join(f"{kind}\n{_columns(rows)}" for kind, rows in chosen.items())
    )


def _failed(message: str, code: int) -> int:
    typer.echo(f"downslope: {' '.join(message.split())}", err=True)
    return code


def _answer(as_json: bool, data: Any, text: Callable[[], str]) -> None:
    typer.echo(
        json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) if as_json else text()
    )


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def _aside() -> Iterator[None]:
    """Whatever prints meanwhile, the user's code and child processes too, prints on stderr."""
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(out, 1)
        os.close(out)


@contextmanager
def _stoppable(again: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. To go on: {again}", err=True)
        raise typer.Exit(130) from None


def _won(standings: Standings, found: Task, folder: Path, page: Path) -> str:
    recipe = folder / "winner.toml"
    epoch = steps_per_epoch(size(found.train), standings.winner.batch_size)
    return f"""{standings}

The winning recipe, {recipe}:

{_indented(standings.winner.text())}

In a training loop of your own:

    import downslope as ds

    recipe = ds.Recipe.load({str(recipe)!r})
    optimizer = recipe.build(model, steps_per_epoch={epoch})  # batches of {standings.winner.batch_size}

The page with the curves: {page}"""


def _trained(done: Run, as_json: bool) -> None:
    _answer(as_json, done.data(), lambda: str(done))


def _summary(item: Any) -> str:
    return _prose(item.body if isinstance(item, Rule) else item).split("\n\n")[0].replace("\n", " ")


def _prose(item: Any) -> str:
    """The docstring without its doctest."""
    return (inspect.getdoc(item) or "").split(">>>")[0].strip()


def _columns(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())


def _rule_data(rule: Rule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "kind": "rule" if rule.kind == "rule" else "link",
        "doc": _prose(rule.body),
        "formula": rule.formula.splitlines(),
        "source": rule.source,
        "numbers": {
            number: {"default": value, "meaning": term(number).meaning}
            for number, value in rule.numbers.items()
        },
        "rates": list(rule.rates),
    }


def _rule_page(rule: Rule) -> str:
    data = _rule_data(rule)
    numbers = {
        f"{number} = {entry['default']}": entry["meaning"] for number, entry in data["numbers"].items()
    }
    rates = (
        f"\n\nLearning rates worth trying: {', '.join(f'{rate:g}' for rate in rule.rates)}"
        if rule.rates
        else ""
    )
    return f"""{rule.name}

{_indented(rule.formula)}

{data["doc"]}

Source: {rule.source}

{_columns(numbers)}{rates}"""


def _task_data(found: Task) -> dict[str, Any]:
    parts = {"train": found.train, "valid": found.valid, "test": found.test}
    return {
        "name": found.name,
        "kind": "task",
        "doc": _prose(tasks()[found.name]),
        "metric": found.metric_name,
        "higher_is_better": found.higher_is_better,
        "target": found.target,
        "reference": found.reference,
        "samples": {part: data and size(data) for part, data in parts.items()},
        "recipe": found.recipe.data(),
    }


def _task_page(found: Task) -> str:
    data = _task_data(found)
    better = "higher" if found.higher_is_better else "lower"
    return f"""{found.name}: {data["doc"]}

  samples    {", ".join(f"{part} {count}" for part, count in data["samples"].items())}
  metric     {found.metric_name}, {better} is better; target {found.target}
  reference  {found.reference}

{_indented(found.recipe.text())}"""


def _example(name: str) -> Schedule:
    """The schedule over 100 steps at peak 1, every other number at its default where it has one."""
    given: dict[str, Any] = {"peak": 1.0, "steps": 100, "every": 25, "start": 60, "cooldown": 20}
    signature = inspect.signature(KINDS[name]).parameters
    chosen = {key: value for key, value in given.items() if key in signature}
    if "trunk" in signature:
        chosen["trunk"] = KINDS["constant"](1.0)
    return KINDS[name](**chosen)


def _schedule_data(name: str) -> dict[str, Any]:
    example = _example(name)
    parameters = inspect.signature(KINDS[name]).parameters.items()
    return {
        "name": name,
        "kind": "schedule",
        "doc": _prose(KINDS[name]),
        "numbers": {key: None if item.default is item.empty else item.default for key, item in parameters},
        "example": {"data": example.data(), "values": [[step, example(step)] for step in range(0, 101, 5)]},
    }


def _schedule_page(name: str) -> str:
    example = _example(name)
    parameters = inspect.signature(KINDS[name]).parameters.items()
    numbers = ", ".join(
        key if item.default is item.empty else f"{key} = {item.default!r}" for key, item in parameters
    )
    bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(example(step) * 8))] for step in range(0, 100, 2))
    return f"""{name}({numbers})

{_prose(KINDS[name])}

    {bars}
    {example!r}, steps 0 to 99

Durations are applied updates, or text: "500 steps", "3 epochs", "64000 samples", "10 %"."""
