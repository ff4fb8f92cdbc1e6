"""How a training shows itself: a bar on a terminal, plain lines elsewhere, nothing if told so. On stderr."""

from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from downslope.train.training import Evaluation


class Show:
    """The progress of one training of `steps` updates. A context manager; `metric` is the metric's name."""

    def __init__(self, name: str, steps: int, metric: str, quiet: bool) -> None:
        self.name, self.steps, self.metric, self.quiet = name, steps, metric, quiet
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._loss = self._valid = ""
        self._players: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self.quiet:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
            )
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=self._console)
            self._task = self._bar.add_task(self.name, total=self.steps, said="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line, whatever is shown besides."""
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, step: int, loss: float, players: Mapping[str, float]) -> None:
        """The training stands at `step`, its last loss was this: the sum of what several players had last."""
        self._players |= players
        each = ", ".join(f"{name} {own:.4g}" for name, own in self._players.items())
        self._loss = f"loss {each or f'{loss:.4g}'}"
        self._draw(step)

    def valid(self, step: int, seen: Evaluation) -> None:
        """An evaluation after `step` updates."""
        self._valid = f"valid loss {seen.loss:.4g}, {self.metric} {seen.metric:.4g}"
        self._draw(step)
        if self._bar is None:
            self.say(f"{self.name}: step {step} of {self.steps}, {self._loss}, {self._valid}")

    def _draw(self, step: int) -> None:
        if self._bar is not None:
            said = ", ".join(filter(None, (self._loss, self._valid)))
            self._bar.update(self._task, completed=step, said=said)
