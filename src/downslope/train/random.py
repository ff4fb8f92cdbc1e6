"""The random generators of a process, python's, numpy's and torch's, as a value that can be put back."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downslope.errors import BadInput

LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one."""


@dataclass(frozen=True)
class Generators:
    """The state of every global generator: `random`, `numpy.random`, torch's on the CPU and each device.

    Generators that someone made himself, such as `numpy.random.default_rng()`, are not among them.

    >>> before = Generators.now()
    >>> first = torch.rand(()); before.restore(); bool(torch.rand(()) == first)
    True
    """

    python: tuple[Any, ...]
    numpy: Mapping[str, Any]
    torch: Tensor
    devices: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def now(cls) -> "Generators":
        """The state at this moment. Devices that were never used have none, and are not woken up."""
        devices: dict[str, Tensor] = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            states = torch.cuda.get_rng_state_all()
            devices |= {f"cuda:{i}": state for i, state in enumerate(states)}
        if torch.backends.mps.is_available():
            devices["mps"] = torch.mps.get_rng_state()
        numpy = np.random.get_state(legacy=False)
        return cls(random.getstate(), numpy, torch.get_rng_state(), devices)

    def restore(self) -> None:
        """Put every generator back; a device that is not on this machine has none to put back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # type: ignore[arg-type]
        torch.set_rng_state(self.torch)
        for name, state in self.devices.items():
            if name == "mps" and torch.backends.mps.is_available():
                torch.mps.set_rng_state(state)
            elif name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, name)

    def data(self) -> dict[str, Any]:
        """As JSON: whole numbers in hexadecimal, floats as they are (JSON keeps a float exactly)."""
        version, words, gauss = self.python
        key = self.numpy["state"]["key"]
        return {
            "python": {
                "version": version,
                "words": np.array(words, dtype="<u4").tobytes().hex(),
                "gauss": gauss,
            },
            "numpy": {
                "kind": self.numpy["bit_generator"],
                "key": key.astype("<u4").tobytes().hex(),
                "position": int(self.numpy["state"]["pos"]),
                "has_gauss": int(self.numpy["has_gauss"]),
                "gauss": float(self.numpy["gauss"]),
            },
            "torch": _hex(self.torch),
            "devices": {name: _hex(state) for name, state in self.devices.items()},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Generators":
        """What `data` was made from; BadInput for anything else."""
        try:
            python, numpy = data["python"], data["numpy"]
            words = np.frombuffer(bytes.fromhex(python["words"]), dtype="<u4").tolist()
            state = {
                "bit_generator": numpy["kind"],
                "state": {"key": _words(numpy["key"]), "pos": numpy["position"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }
            devices = {name: _bytes(text) for name, text in data["devices"].items()}
            return cls(
                (python["version"], tuple(words), python["gauss"]), state, _bytes(data["torch"]), devices
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"these are not the states of random generators: {error!r}.") from None


def seed_all(seed: int) -> None:
    """Seed every global generator. BadInput unless 0 <= seed < 2^32."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise BadInput(f"a seed is a whole number from 0 to {LARGEST_SEED}, got {seed!r}.")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _words(text: str) -> Any:
    return np.frombuffer(bytes.fromhex(text), dtype="<u4").astype(np.uint32)
