"""Short texts that are equal if and only if the bits are (SHA-256)."""

import hashlib

import torch
from torch import Tensor


def digest(data: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's type, shape and bits, wherever it lies and however it is strided.

    >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(3, 2).T)
    True
    >>> fingerprint(torch.tensor(0.0)) == fingerprint(torch.tensor(-0.0))
    False
    """
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {list(plain.shape)} ".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
