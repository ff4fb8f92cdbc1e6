"""Loggers: a run's journal, sent to TensorBoard, MLflow or Weights & Biases.

They read the same events that reports read, while a run goes on or after it. Only what counts for good is
sent: what a later resume could take back, because no checkpoint stands behind it yet, waits. A note beside
what was sent says how far it came, so that sending again sends the rest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from downslope.errors import BadInput, nearest
from downslope.folder import write_file
from downslope.journal import Event, read
from downslope.train.history import history
from downslope.train.plan import Plan

NOTE = "downslope.json"
_POLL = 2.0


class Logger(Protocol):
    """A place for scalars by name and step, and for what a run is."""

    def about(self, facts: Mapping[str, str]) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def log(
    folder: str | os.PathLike[str],
    to: str = "tensorboard",
    out: str | os.PathLike[str] | None = None,
    follow: bool = False,
) -> int:
    """Send what the run in `folder` did to a logger, and return how many events were sent now.

    `to`: "tensorboard", "mlflow" or "wandb" (offline, to be sent on by `wandb sync`); each needs its package,
    pip install 'downslope[loggers]'. `out`: where to, by default `logs/TO/RUN`. `follow`: wait for more until
    the run ends. Raises BadInput for what is no run, an unknown logger, or a place that holds another run.
    """
    if to not in LOGGERS:
        raise BadInput(f"there is no logger {to!r}.{nearest(to, LOGGERS)} There are: {', '.join(LOGGERS)}.")
    source = Path(folder)
    plan = Plan.read(source)
    place = Path(out) if out is not None else Path("logs", to, source.resolve().name)
    sent, count = _sent(place, plan.sha), 0
    logger: Logger | None = None
    try:
        for events in _grown(source / "journal.jsonl", follow):
            new = [event for event in final(events) if event["seq"] >= sent]
            if new and logger is None:
                logger = LOGGERS[to](place, plan)
                logger.about({"task": plan.task, "seed": str(plan.seed), "recipe": plan.recipe})
            for event in new:
                if logger and (values := scalars(event)):
                    logger.scalars(values, event["step"])
                sent, count = event["seq"] + 1, count + 1
            write_file(place / NOTE, json.dumps({"plan": plan.sha, "sent": sent}).encode())
    finally:
        if logger:
            logger.close()
    return count


def final(events: Sequence[Event]) -> list[Event]:
    """The events that count and that no resume can take back: up to the last checkpoint, or the end.

    >>> events = [{"seq": 0, "kind": "step"}, {"seq": 1, "kind": "checkpoint"}, {"seq": 2, "kind": "step"}]
    >>> [event["seq"] for event in final(events)]
    [0, 1]
    """
    counting = history(events)
    stands = [i for i, event in enumerate(counting) if event["kind"] in ("checkpoint", "end", "failed")]
    return counting[: stands[-1] + 1] if stands else []


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event, by the names that they get.

    >>> scalars({"seq": 3, "kind": "valid", "step": 20, "loss": 0.5, "metric": 0.9, "seconds": 1.0})
    {'valid/loss': 0.5, 'valid/metric': 0.9}
    """
    kind = event["kind"]
    if kind == "step":
        players = {f"train/{name}": move for name, move in event.get("players", {}).items()}
        return {"train/loss": float(event["loss"])} | {
            f"{place}/{what}": float(move[what])
            for place, move in (players or {"train": event}).items()
            for what in ("loss", "lr")
            if move.get(what) is not None
        }
    if kind == "valid":
        return {f"valid/{name}": float(event[name]) for name in ("loss", "metric")}
    if kind == "skip":
        return {"train/skipped": float(event["count"])}
    if kind == "strategy":
        return {f"{event['by']}/{event['did']}": 1.0}
    if kind == "end" and event["test"]:
        return {f"test/{name}": float(event["test"][name]) for name in ("loss", "metric")}
    return {}


def _grown(path: Path, follow: bool) -> Iterator[list[Event]]:
    """The journal as it is; again, while it grows, until the run has ended."""
    while True:
        events = read(path) if path.exists() else []
        yield events
        if not follow or any(event["kind"] == "end" for event in events):
            return
        time.sleep(_POLL)


def _sent(place: Path, plan: str) -> int:
    """How many events of the journal a place has already; BadInput if it is another run's."""
    note = place / NOTE
    if not note.exists():
        if place.is_dir() and any(place.iterdir()):
            raise BadInput(f"{place} holds something else: give another folder.")
        place.mkdir(parents=True, exist_ok=True)
        return 0
    known = json.loads(note.read_bytes())
    if known["plan"] != plan:
        raise BadInput(f"{place} holds another run's log: give another folder.")
    return int(known["sent"])


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise BadInput(
            f"This logger needs {name.partition('.')[0]}: pip install 'downslope[loggers]'."
        ) from None


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, place: Path, plan: Plan) -> None:
        _package("tensorboard")
        self.writer = _package("torch.utils.tensorboard").SummaryWriter(str(place))

    def about(self, facts: Mapping[str, str]) -> None:
        """As text."""
        for name, text in facts.items():
            self.writer.add_text(name, f"```\n{text}\n```" if "\n" in text else text)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class MLflow:
    """The server that MLFLOW_TRACKING_URI names, or files for `mlflow ui --backend-store-uri`."""

    def __init__(self, place: Path, plan: Plan) -> None:
        # MLflow warns of files as a store for servers; of one run they are as good, and need no database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        server = os.environ.get("MLFLOW_TRACKING_URI", (place / "mlruns").resolve().as_uri())
        self.client = _package("mlflow.tracking").MlflowClient(server)
        found = self.client.get_experiment_by_name(plan.task)
        self.experiment = found.experiment_id if found else self.client.create_experiment(plan.task)
        runs = self.client.search_runs([self.experiment], f"tags.plan = '{plan.sha}'")
        made = runs[0] if runs else self.client.create_run(self.experiment, tags={"plan": plan.sha})
        self.run = made.info.run_id

    def about(self, facts: Mapping[str, str]) -> None:
        """As parameters, the recipe as a tag."""
        for name, text in facts.items():
            keep = self.client.set_tag if "\n" in text else self.client.log_param
            keep(self.run, name, text)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As metrics."""
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        """Mark the run as done for now."""
        self.client.set_terminated(self.run)


class WandB:
    """A run of Weights & Biases, kept offline until `wandb sync`."""

    def __init__(self, place: Path, plan: Plan) -> None:
        wandb = _package("wandb")
        settings = wandb.Settings(mode="offline", silent=True, console="off")
        self.run = wandb.init(
            project="downslope", name=plan.task, id=plan.sha[:16], dir=str(place), settings=settings
        )

    def about(self, facts: Mapping[str, str]) -> None:
        """As its configuration."""
        self.run.config.update(dict(facts))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As history. A step has one row: validations join the update that they follow."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


LOGGERS: dict[str, Callable[[Path, Plan], Logger]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
