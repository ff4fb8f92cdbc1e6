"""Reading the journal of a training that was killed and went on: what counts, and what was done again."""

from collections.abc import Iterable

from downslope.journal import Event


def history(events: Iterable[Event]) -> list[Event]:
    """The events that count, each update once, as if the training had never been interrupted.

    A "resume" event takes back everything behind the event whose "seq" is its "after": the checkpoint that it
    goes on from, or the start. The resume events themselves are left out. A checkpoint written in the
    background is acknowledged behind events that it does not know: it stands at its own "after".

    >>> done = [{"seq": 0, "kind": "start"}, {"seq": 1, "kind": "step", "step": 0, "loss": 2.0}]
    >>> again = [{"seq": 2, "kind": "resume", "after": 0}, {"seq": 3, "kind": "step", "step": 0, "loss": 2.0}]
    >>> [event["seq"] for event in history(done + again)]
    [0, 3]
    """
    counting: list[Event] = []
    for event in events:
        if event["kind"] == "resume":
            counting = [one for one in counting if stands_at(one) <= event["after"]]
        else:
            counting.append(event)
    return counting


def stands_at(event: Event) -> int:
    """The "seq" of the last event behind what this one tells of: its own, but for a checkpoint."""
    found: int = event["after"] if event["kind"] == "checkpoint" and "after" in event else event["seq"]
    return found


def losses(events: Iterable[Event]) -> dict[int, float]:
    """The training loss by step (updates applied before it), each once, in order.

    >>> losses([{"seq": 0, "kind": "step", "step": 0, "loss": 2.0}])
    {0: 2.0}
    """
    return {event["step"]: event["loss"] for event in history(events) if event["kind"] == "step"}
