"""What named layers of a model put out, and the regressors that lead one width to another."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from downslope.errors import BadInput, nearest

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")
_CONVOLUTIONS = {4: nn.Conv2d, 5: nn.Conv3d}


def layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of these names in the bare model, without what `torch.compile` or DDP put before them.

    BadInput for a name that the model does not have.

    >>> wrapped = nn.Sequential()
    >>> wrapped.add_module("module", nn.Sequential(nn.Linear(2, 3)))
    >>> layers(wrapped, ["0"])
    {'0': Linear(in_features=2, out_features=3, bias=True)}
    """
    found = dict(model.named_modules(remove_duplicate=False))
    known = {_WRAPPERS.sub("", name).rstrip("."): module for name, module in found.items() if name} | found
    names = list(names)
    for name in names:
        if not name or name not in known:
            near = nearest(name, filter(None, known))
            raise BadInput(f"The model has no layer {name!r}.{near} model.named_modules() lists them.")
    return {name: known[name] for name in names}


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and DDP."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        model = inner
    return model


@contextmanager
def captured(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, by name, what each of these layers puts out inside; the hooks go when it ends.

    Of a tuple (LSTM, attention) the first part. BadInput if a layer runs twice or not at all. A compiled
    model runs uncompiled inside, since what was compiled earlier does not see new hooks; with no names it
    stays compiled.
    """
    found: dict[str, Tensor] = {}
    wanted = layers(model, names)
    with ExitStack() as stack:
        for name, layer in wanted.items():
            stack.callback(layer.register_forward_hook(_keeping(found, name)).remove)
        if wanted and "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield found
    for name in wanted:
        if name not in found:
            raise BadInput(f"The layer {name!r} did not run, so that there are no features of it.")


def _keeping(found: dict[str, Tensor], name: str) -> Any:
    def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor):
            raise BadInput(f"The layer {name!r} puts out {type(output).__name__}, not a tensor.")
        if name in found:
            raise BadInput(
                f"The layer {name!r} ran twice in one pass, so that its features are not one tensor."
            )
        found[name] = first

    return hook


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or its attribute `logits`; else BadInput."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise BadInput(f"A model must return its logits as a tensor, got {type(output).__name__}.")
    return found


def regressor(student: Tensor, teacher: Tensor) -> nn.Module | None:
    """A layer from features like `student` to those like `teacher`; None where they have one shape.

    Linear for [..., width], a convolution for maps [items, channels, *space], with a kernel that makes a
    student's larger space the teacher's (FitNets, arXiv:1412.6550, section 2.2). Weights are drawn from
    torch's global generator. BadInput for what neither can do.
    """
    own, theirs = list(student.shape), list(teacher.shape)
    if own == theirs:
        return None
    made: nn.Module | None = None
    if len(own) == len(theirs) and own[0] == theirs[0]:
        space = list(zip(own[2:], theirs[2:], strict=True))
        if len(own) in _CONVOLUTIONS and all(mine >= other for mine, other in space):
            kernel = tuple(mine - other + 1 for mine, other in space)
            made = _CONVOLUTIONS[len(own)](own[1], theirs[1], kernel)  # type: ignore[arg-type]
        elif len(own) in (2, 3) and own[:-1] == theirs[:-1]:
            made = nn.Linear(own[-1], theirs[-1])
    if made is None:
        raise BadInput(
            f"No linear layer or convolution leads features of shape {own} to {theirs}: "
            "give regressors={'layer': module}."
        )
    return made.to(student.device, student.dtype)
