"""The batches of a loader, counted as the training takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from downslope.errors import BadInput, DownslopeError
from downslope.train.course import course_of

_END = object()


class BatchLost(DownslopeError, RuntimeError):  # noqa: N818  as BadInput: it says what is the matter
    """A batch was not loaded: a sample raised, or a worker died. `epoch` and `batch` say which; both count
    from 0. The place is still before it, so that reading again begins with this batch.
    """

    def __init__(self, sentence: str, epoch: int = 0, batch: int = 0) -> None:
        super().__init__(sentence)
        self.epoch, self.batch = epoch, batch


class Batches:
    """The batches of your own loader, with the place of the training in them. Loop over this instead.

    What counts is what was delivered, whatever workers fetched ahead; so save at the end of the loop's body.
    Its state is plain data. A DataLoader whose `batch_sampler` is a `Sampler` resumes at any batch at no
    cost, one that has a state_dict of its own by that; any other at the start of the epoch, of which it
    warns. A loop that was left early goes on with the next batch; `epoch` moves on at the end of a pass, or
    where the next begins. A state that is loaded inside the loop takes effect with the next batch. Raises
    BatchLost. Not for: a loader that something else reads too, whose batches it would not count.

    >>> from torch.utils.data import DataLoader
    >>> from downslope.train.sampler import Sampler
    >>> batches = Batches(DataLoader(range(6), batch_sampler=Sampler(6, 2, shuffle=False)))
    >>> next(iter(batches)), batches.position, next(iter(batches)), batches.position
    (tensor([0, 1]), 1, tensor([2, 3]), 2)
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._course = course_of(loader)
        self._live: Iterator[Any] | None = None
        self._at = (0, 0)

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        return self._course.epoch

    @property
    def position(self) -> int:
        """Batches of this epoch that were delivered."""
        return self._course.position

    def __len__(self) -> int:
        """Batches in a whole epoch, where the loader knows it."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self._counted_out() and (batch := self._next()) is not _END:
            yield batch
        while (batch := self._next()) is not _END:
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place, as plain data."""
        return {"kind": self._course.kind, **self._course.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the place that was saved. BadInput if this loader has no such place."""
        then, now = _KEPT.get(str(state.get("kind"))), _KEPT[self._course.kind]
        if then != now:
            raise BadInput(f"the place was kept by {then or 'something else'} then, and is by {now} now.")
        self._live = None
        try:
            self._course.load(state)
        except BadInput:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"this is not the state of Batches: {error!r}.") from None

    def _counted_out(self) -> bool:
        """Whether a loop that counts by itself, as Lightning's does, took all and never asked for the end."""
        if self._live is None or not hasattr(self.loader, "__len__"):
            return False
        with suppress(TypeError):  # a DataLoader over an iterable dataset does not know
            return self.position >= len(self.loader)
        return False

    def _next(self) -> Any:
        course = self._course
        try:
            if self._live is None or self._at != (course.epoch, course.position):
                self._live = None  # its workers end before others begin
                self._live = course.begin()
            batch = next(self._live, _END)
        except Exception as error:
            told = self._told(error)
            self._give_up()
            raise told from error
        except BaseException:
            self._give_up()
            raise
        if batch is _END:
            self._live = None
            course.turn()
        else:
            course.advance()
        self._at = course.epoch, course.position
        return batch

    def _give_up(self) -> None:
        """Stop the workers at once: for one that died torch would raise again, at any time, in any line."""
        live, self._live = self._live, None
        self._course.lose()
        if getattr(self.loader, "_iterator", None) is not None:
            self.loader._iterator = None  # persistent workers that died would stay dead
        if live is not None and hasattr(live, "_shutdown_workers"):
            with suppress(RuntimeError):  # so does torch while it waits for the others
                live._shutdown_workers()

    def _told(self, error: Exception) -> DownslopeError:
        epoch, batch, why = self._course.epoch, self._course.position, _reason(error)
        if isinstance(error, BadInput):
            return BadInput(why)
        if _died(error, getattr(self.loader, "num_workers", 0)):
            why = f"a worker died, perhaps at a later batch, which workers fetch ahead ({why})"
        told = f"batch {batch} of epoch {epoch}{self._course.awaited()} was not loaded: {why}"
        return BatchLost(told, epoch, batch)


_KEPT = {
    "sampler": "a Sampler",
    "state": "the loader's own state",
    "epoch": "nothing but the epoch",
}


def _reason(error: Exception) -> str:
    """What went wrong in one line; an error of a worker brings its whole traceback as its text."""
    lines = str(error).replace("\\n", "\n").strip().split("\n")
    last = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    for name in ("BadInput", "UserCodeError"):
        last = last.removeprefix(f"downslope.errors.{name}: ")
    return last or type(error).__name__


def _died(error: Exception, workers: int) -> bool:
    """Whether a worker is gone, which the pipe to it may say first; what a worker raised comes as text."""
    text = str(error)
    gone = isinstance(error, ConnectionError | EOFError) or text.startswith("DataLoader worker")
    return workers > 0 and gone and not text.startswith("Caught ")
