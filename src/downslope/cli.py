"""The command line: thin; the one place where the verbs meet.

Results go to stdout, all else to stderr. Exit codes: 0 done, 1 the user's own code failed, 2 bad input,
130 stopped by Ctrl-C.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NoReturn

import typer

from downslope.description import catalogue, columns, describe, indented
from downslope.errors import BadInput, DownslopeError, UserCodeError, nearest
from downslope.logger import log as send
from downslope.parallel import PATIENCE, leave, place, supervise, verdict
from downslope.race import Standings
from downslope.race import race as run_race
from downslope.recipe import Recipe
from downslope.report import report as write_report
from downslope.tasks import Task, frames, size, task
from downslope.train import Arithmetic, Branch, Run, measures, verify_resume
from downslope.train import branch as change_plan
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
Nproc = Annotated[
    int | None, typer.Option(help="Processes on this machine that share every batch. Default: this one.")
]
Shard = Annotated[
    bool,
    typer.Option("--shard", help="Weights lie in parts on the processes (FSDP2), not whole on each (DDP)."),
]
Precision = Annotated[
    str | None, typer.Option(help="bf16 or fp16: autocast, weights stay float32. Default: float32.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model by torch.compile.")]
Patience = Annotated[
    float, typer.Option(help="Seconds without progress after which processes are started anew.")
]


def main() -> NoReturn:
    """Runs the command that `sys.argv` names, and exits with its code."""
    if _world() == 1:
        sys.exit(run(sys.argv[1:]))
    try:
        code = run(sys.argv[1:])
    except SystemExit as error:  # a signal was granted
        code = error.code if isinstance(error.code, int) else 1
    leave(code)


def run(arguments: list[str]) -> int:
    """The exit code of one command. A fault is one line on stderr, below the traceback of the user's code."""
    try:
        code = app(arguments, prog_name="downslope", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserCodeError as error:
        return _failed(str(error), error.exit_code, frames(error))
    except DownslopeError as error:
        return _failed(str(error), error.exit_code)
    except typer.TyperException as error:
        return _failed(error.format_message(), error.exit_code)
    except BrokenPipeError:
        # The flush at exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    batch_size: Annotated[int | None, typer.Option(help="Items per update, if not the recipe's.")] = None,
    scale_rate: Annotated[
        bool, typer.Option("--scale-rate", help="Move the rate with --batch-size, by the rule's kind.")
    ] = False,
    seed: Seed = 0,
    precision: Precision = None,
    compile: Compile = False,
    nproc: Nproc = None,
    shard: Shard = False,
    patience: Patience = PATIENCE,
    as_json: Json = False,
) -> int:
    """Train a task by one recipe."""
    given, how = Recipe.load(recipe) if recipe else None, Arithmetic(precision, compile)
    if scale_rate and batch_size is None:
        raise BadInput("--scale-rate moves the rate with the batch: give --batch-size.")
    with _aside():
        found = task(name, seed)
        chosen = given or found.recipe
        if batch_size is not None:
            chosen = _with_batch(chosen, batch_size, size(found.train), scale_rate)
        folder = out or Path("runs", f"{found.name}-{chosen.hash[:8]}-{seed}")
        if nproc is None:
            with _stoppable(_again(folder, shard)):
                done = run_training(
                    found, chosen, out=folder, seed=seed, shard=shard, patience=patience, **how.data()
                )
    if nproc is None:
        return _trained(done, as_json)
    arguments = ["train", name, "--seed", str(seed), "--out", str(folder)]
    arguments += ["--recipe", str(recipe)] if recipe else []
    arguments += ["--batch-size", str(batch_size)] if batch_size is not None else []
    arguments += ["--scale-rate"] * scale_rate
    arguments += [*(["--precision", precision] if precision else []), *["--compile"] * compile]
    return _supervised(nproc, arguments, folder, shard, patience, as_json)


@app.command()
def resume(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="Go on by another plan, as a run of its own in this folder.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help='Whole length: 2000, "30 epochs", "2e6 tokens".')] = None,
    rate: Annotated[float | None, typer.Option(help="Peak of the learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Items per update.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Other numbers for the same rules, in TOML.")] = None,
    at: Annotated[int | None, typer.Option(help="Begin at this checkpoint. Default: the newest.")] = None,
    then: Annotated[
        str | None,
        typer.Option(
            help="Schedules keep (as begun), rewarm (up again, then over what is left) or decay (to 0)."
        ),
    ] = None,
    warmup: Annotated[str | None, typer.Option(help="Length of the way up. Default: as before.")] = None,
    shape: Annotated[str | None, typer.Option(help="Way down: linear, cosine or sqrt.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print and draw the change only.")] = False,
    allow_code_change: Annotated[
        bool, typer.Option("--allow-code-change", help="Go on though the task's file is another.")
    ] = False,
    nproc: Nproc = None,
    shard: Shard = False,
    patience: Patience = PATIENCE,
    as_json: Json = False,
) -> int:
    """Go on with a run that was stopped; it ends as if it had never been. With --out, by another plan."""
    asked = {"steps": _length(steps), "rate": rate, "batch_size": batch_size, "recipe": recipe, "at": at}
    asked |= {"then": then, "warmup": _length(warmup), "shape": shape}
    change = _branched(folder, out, dry_run, allow_code_change, asked)
    if dry_run and change is not None:
        _answer(as_json, change.data(), lambda: str(change))
        return 0
    folder = out or folder
    if nproc is not None:
        arguments = ["resume", str(folder), *["--allow-code-change"] * allow_code_change]
        return _supervised(nproc, arguments, folder, shard, patience, as_json)
    with _aside(), _stoppable(_again(folder, shard)):
        done = go_on(folder, allow_code_change=allow_code_change, shard=shard, patience=patience)
    return _trained(done, as_json, {} if change is None else {"branch": change.data()})


@app.command()
def verify(
    name: Annotated[
        str,
        typer.Argument(
            metavar="TASK|LOOP", help="A task, or path/to/file.py:function of a loop of your own."
        ),
    ],
    recipe: Annotated[Path | None, typer.Option(help="A recipe in TOML. Default: the task's own.")] = None,
    steps: Annotated[int, typer.Option(help="Updates; half of them before the stop.")] = 20,
    seed: Seed = 0,
    precision: Precision = None,
    compile: Compile = False,
    nproc: Nproc = None,
    shard: Shard = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a fresh process may take.")] = 600,
    as_json: Json = False,
) -> int:
    """Prove that a training goes on from a checkpoint bit for bit, or say what is lost. Exit code 1 if so."""
    asked = Recipe.load(recipe) if recipe is not None else None
    how = Arithmetic(precision, compile).data()
    proof = verify_resume(name, asked, steps, seed, timeout, nproc=nproc or 1, shard=shard, **how)
    _answer(as_json, proof.data(), lambda: str(proof))
    return 0 if proof else 1


@app.command()
def report(folder: Folder, as_json: Json = False) -> None:
    """Draw a run or a race, finished or not, as one page that opens anywhere."""
    page = write_report(folder)
    _answer(as_json, {"report": str(page)}, lambda: str(page))


@app.command()
def log(
    folder: Folder,
    to: Annotated[str, typer.Option(help="tensorboard, mlflow or wandb (offline).")] = "tensorboard",
    out: Annotated[Path | None, typer.Option(help="Folder. Default: logs/TO/RUN.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more until the run ends.")] = False,
    as_json: Json = False,
) -> None:
    """Send what a run did to a logger; again, and only what is new is sent."""
    count = send(folder, to, out, follow)
    _answer(as_json, {"sent": count}, lambda: f"{count} events sent to {to}.")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="RULE|LINK|SCHEDULE|STRATEGY|TOOL|TASK")],
    as_json: Json = False,
) -> None:
    """What a rule, link, schedule, strategy, tool or built-in task is: formula, source, numbers."""
    found = describe(name)
    _answer(as_json, found.data, lambda: found.text.rstrip())


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="[tasks|rules|links|schedules|strategies|tools]")] = "",
    as_json: Json = False,
) -> None:
    """What there is: tasks, rules, links, schedules, strategies, tools."""
    every = catalogue()
    if what and what not in every:
        raise BadInput(f"There is no list {what!r}.{nearest(what, every)} There are: {', '.join(every)}.")
    chosen = {what: every[what]} if what else every
    _answer(as_json, chosen, lambda: "\n\n".join(f"{kind}\n{columns(rows)}" for kind, rows in chosen.items()))


def _failed(message: str, code: int, before: str = "") -> int:
    said = f"{before}downslope: {' '.join(message.split())}"
    if _world() > 1:
        return verdict(said, code)
    typer.echo(said, err=True)
    return code


def _answer(as_json: bool, data: Any, text: Callable[[], str]) -> None:
    as_text = text if not as_json else lambda: json.dumps(_finite(data), indent=2, ensure_ascii=False)
    typer.echo(as_text())


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
        if place().rank == 0:
            typer.echo(f"\nStopped. To go on: {again}", err=True)
        raise typer.Exit(130) from None


def _won(standings: Standings, found: Task, folder: Path, page: Path) -> str:
    recipe = folder / "winner.toml"
    known = measures(found, standings.winner.batch_size)
    measured = ", ".join(f"{name}={number}" for name, number in known.items() if number is not None)
    return f"""{standings}

The winning recipe, {recipe}:

{indented(standings.winner.text())}

In a training loop of your own:

    import downslope as ds

    recipe = ds.Recipe.load({str(recipe)!r})
    optimizer = recipe.build(model, {measured})  # batches of {standings.winner.batch_size}

The page with the curves: {page}"""


def _with_batch(recipe: Recipe, batch_size: int, samples: int, scale_rate: bool) -> Recipe:
    """The recipe at that batch size; says what changes."""
    if batch_size > samples:
        raise BadInput(f"--batch-size is at most the {samples} samples of the train part, got {batch_size}.")
    made = recipe.with_batch(batch_size) if scale_rate else recipe.with_(batch_size=batch_size)
    if place().rank == 0:
        typer.echo(str(recipe.diff(made)), err=True)
    return made


def _world() -> int:
    """How many processes train together; 1 where the environment says nothing that makes sense."""
    try:
        return place().world
    except BadInput:
        return 1


def _trained(done: Run, as_json: bool, more: Mapping[str, Any] = MappingProxyType({})) -> int:
    if place().rank == 0:
        _answer(as_json, {**done.data(), **more}, lambda: str(done))
    return 0


def _length(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() else text


def _branched(
    folder: Path, out: Path | None, dry_run: bool, allow_code_change: bool, asked: Mapping[str, Any]
) -> Branch | None:
    """The branch that options ask for; None where a run is to go on as it was begun."""
    given = {name: value for name, value in asked.items() if value is not None}
    if out is None and not dry_run:
        if given:
            raise BadInput(
                f"--{next(iter(given)).replace('_', '-')} makes another run of it: give that a folder by "
                f"--out. {folder} itself goes on only as it was begun, so that it ends in the same bits."
            )
        return None
    if "recipe" in given:
        given["recipe"] = Recipe.load(given["recipe"])
    with _aside():
        where = None if dry_run else out
        return change_plan(folder, where, allow_code_change=allow_code_change, quiet=dry_run, **given)


def _again(folder: Path, shard: bool) -> str:
    """The command that goes on with a run, on as many processes as now."""
    world = place().world
    return (
        f"downslope resume {shlex.quote(str(folder))}{f' --nproc {world}' * (world > 1)}{' --shard' * shard}"
    )


def _supervised(
    nproc: int, arguments: list[str], folder: Path, shard: bool, patience: float, as_json: bool
) -> int:
    """The same command on several processes of this machine, which are started anew where one is lost."""
    if place().world > 1:
        raise BadInput("--nproc starts processes, and torchrun has done so already: leave it out.")
    arguments += [*["--shard"] * shard, "--patience", str(patience), *["--json"] * as_json]
    return supervise(
        arguments,
        nproc,
        progress=lambda: sorted(path.stat().st_mtime for path in folder.glob("ranks/*.stacks")),
        say=lambda text: typer.echo(text, err=True),
        patience=patience,
    )
