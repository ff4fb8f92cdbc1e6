"""Where a task comes from, as plain data: how workers and resumed runs find it again."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from downslope.errors import BadInput

_OWN = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Entry:
    """The address of a task, a built-in name or an absolute `file.py:function`; the seed of its split.

    `sha256` is the file's; empty for a built-in task.

    >>> Entry.from_data(Entry("digits-cnn", seed=0).data())
    Entry(address='digits-cnn', seed=0, sha256='')
    """

    address: str
    seed: int = 0
    sha256: str = ""

    @property
    def own(self) -> tuple[str, str] | None:
        """(file, function) of the user's own task; None for a built-in one."""
        match = _OWN.fullmatch(self.address)
        return (match["file"], match["function"]) if match else None

    def data(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: object) -> "Entry":
        """The entry that `data` was made from; BadInput for anything else."""
        types = {"address": str, "seed": int, "sha256": str}
        if not isinstance(data, dict) or {key: type(value) for key, value in data.items()} != types:
            raise BadInput(f"A task entry has address, seed and sha256, got {data!r:.80}.")
        return cls(**data)
