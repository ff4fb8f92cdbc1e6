"""How a training computes: in half precision where that is safe (autocast), and compiled or not.

Weights, gradients and what rules keep of them stay float32. Both choices decide about bits, so that they
belong to what a run is, as its recipe and its seed do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from downslope.errors import BadInput, DownslopeError, nearest
from downslope.optimizer import Optimizer
from downslope.recipe import Recipe
from downslope.rules import Chain, Route

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrix products and the like are computed in, by name."""

COMPILES = 32
"""How many forms of a model may be compiled (shapes, modes, rates, frozen layers) until it is given up."""

FLOOR = 1.0
"""A loss scale from which on down an overflow is no longer the scaler's own doing."""

Function = Callable[[nn.Module, Any], Any]

_HOOKED = "it listens to the model by hooks that are new in every update, each of which would compile it anew"
_UNCOMPILED = {
    "teacher": _HOOKED,
    "escape": "it takes second derivatives, which compiled code does not have",
}


@dataclass(frozen=True)
class Arithmetic:
    """`precision`: None for float32 throughout, "bf16" or "fp16" (with a gradient scaler); `compile`: whether
    the model is compiled by torch.compile. BadInput for anything else.

    >>> str(Arithmetic()), str(Arithmetic("bf16", compile=True))
    ('float32', 'bf16, compiled')
    """

    precision: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise BadInput(
                f"precision is {' or '.join(PRECISIONS)}, or left out for float32, got {self.precision!r}."
                f"{nearest(str(self.precision), PRECISIONS)}"
            )
        if type(self.compile) is not bool:
            raise BadInput(f"compile must be true or false, got {self.compile!r}.")

    def __str__(self) -> str:
        return f"{self.precision or 'float32'}{', compiled' * self.compile}"

    def data(self) -> dict[str, Any]:
        """What is not as usual, as plain data."""
        found = {"precision": self.precision, "compile": self.compile}
        return {name: value for name, value in found.items() if value}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Arithmetic:
        """That of `data()`, which may have more in it."""
        return cls(data.get("precision"), data.get("compile", False))

    def check(self, model: nn.Module, recipe: Recipe) -> None:
        """BadInput, with the reason, for what of a model or a recipe does not go with it."""
        device = next(model.parameters()).device.type
        if self.precision is not None:
            if not any(parameter.dtype is torch.float32 for parameter in model.parameters()):
                found = next(model.parameters()).dtype
                raise BadInput(
                    f"precision = {self.precision!r} is for models with float32 weights, and this one's are "
                    f"{str(found).removeprefix('torch.')}, which autocast leaves as they are: leave it out."
                )
            if not torch.amp.is_autocast_available(device):
                raise BadInput(f"torch has no autocast on {device}: leave out precision.")
        if self.precision == "fp16" and (switch := recipe.strategies.get("switch")):
            _check_switch(switch)
        if self.precision == "fp16" and getattr(recipe.strategies.get("teacher"), "layers", None):
            raise BadInput(
                "[teacher] steps regressors between layers by themselves, and gradients carry a scale under "
                "fp16: take bf16, or leave out layers."
            )
        if self.compile:
            for name, why in _UNCOMPILED.items():
                if name in recipe.strategies:
                    raise BadInput(f"[{name}] does not go with compile: {why}.")
            _check_compiler(device)

    def cast(self, function: Function, device: torch.device) -> Function:
        """A loss or metric as it is computed: its forward pass alone is under autocast. The number that comes
        of it is float32, of which a sum over pieces and ranks loses less.
        """
        if self.precision is None:
            return function
        kind, dtype = device.type, PRECISIONS[self.precision]

        def cast(model: nn.Module, batch: Any) -> Any:
            with torch.autocast(kind, dtype):
                value = function(model, batch)
            half = isinstance(value, Tensor) and value.dtype in PRECISIONS.values()
            return value.float() if half else value

        return cast

    def scaler(self, optimizer: Optimizer, device: torch.device) -> torch.amp.GradScaler | None:
        """What keeps the gradients of fp16 from vanishing: they are those of a loss times a scale. BadInput
        for a rule that compares them with losses.
        """
        if self.precision != "fp16":
            return None
        if name := _searching(optimizer.chain):
            raise BadInput(
                f"{name} compares losses with the slope along its step, and gradients carry a "
                "scale under fp16: take bf16."
            )
        return torch.amp.GradScaler(device.type)

    def plain(self, function: Function) -> Function:
        """A loss as strategies look at it, never compiled: they may watch layers by hooks, or differentiate
        twice.
        """
        if not self.compile:
            return function

        def plain(model: nn.Module, batch: Any) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return function(model, batch)

        return plain

    def begin(self, model: nn.Module, players: Iterable[str]) -> None:
        """Compile the model, or the parts of several players, in place: parameters keep their names."""
        for module in map(model.get_submodule, players) if self.compile else ():
            module._compiled_call_impl = _Compiled(module)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within it compiled code is the same in every process: a form by itself for each shape, mode and
        rate, whatever came before. BadInput for a model that cannot be compiled.
        """
        if not self.compile:
            yield
            return
        settings: dict[str, Any] = {"recompile_limit": COMPILES, "fail_on_recompile_limit_hit": True}
        settings["skip_nnmodule_hook_guards"] = False
        with torch._dynamo.config.patch(settings):
            try:
                yield
            except DownslopeError as error:
                if said := _refusal(error):
                    raise BadInput(said) from error
                raise

    def check_called(self, model: nn.Module) -> None:
        """After an update: BadInput if nothing was compiled, as the loss called nothing that could be."""
        held = [module._compiled_call_impl for module in model.modules()]
        if self.compile and not any(isinstance(one, _Compiled) and one.called for one in held):
            raise BadInput(
                "the loss takes methods or parts of the model and never calls it, so that nothing is "
                "compiled: leave out compile, or call the model."
            )


PLAIN = Arithmetic()
"""float32, as the model stands."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model, as it was before anything of it was compiled."""
    for module in model.modules():
        if isinstance(module._compiled_call_impl, _Compiled):
            module._compiled_call_impl = None
    return model


class _Compiled:
    """The call of a module, compiled when first used. torch's own `nn.Module.compile` leaves a module whose
    class is torch's, such as nn.Sequential, as it is, and says nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        def call(*inputs: Any, **keywords: Any) -> Any:
            return module._call_impl(*inputs, **keywords)  # type: ignore[no-untyped-call]

        # torch counts what it compiled by code object: this one is of this module alone.
        own = FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
        self.called = False
        # Draws are those of the model as it stands, and no form depends on the shapes seen before.
        self._compiled = torch.compile(own, dynamic=False, options={"fallback_random": True})

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        self.called = True
        return self._compiled(*inputs, **keywords)


def _searching(chain: Chain | Route) -> str:
    """The rule that shortens its step by comparing losses; empty if there is none."""
    chains = chain.chains.values() if isinstance(chain, Route) else (chain,)
    return next((part.name for one in chains if (part := one.search)), "")


def _check_switch(switch: Any) -> None:
    """BadInput for a switch that looks at gradients under fp16."""
    if switch.at == "swats" or switch.match != "none" or _searching(switch.to):
        raise BadInput(
            "[switch] looks at gradients, which carry a scale under fp16: take bf16, or at = a duration or "
            '"plateau" with match = "none".'
        )


def _check_compiler(device: str) -> None:
    """BadInput where torch.compile cannot work at all."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise BadInput(
                "compile needs a C++ compiler, and none was found: install g++ or clang++, name it in the "
                "environment as CXX, or leave out compile."
            ) from None


def _refusal(error: BaseException) -> str:
    """What torch.compile said, in one sentence, if it is the cause of an error; else nothing."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, TorchRuntimeError

    cause = error.__cause__
    if isinstance(cause, FailOnRecompileLimitHit):
        return (
            f"the model took more than {COMPILES} forms, each of which is compiled by itself: shapes, modes, "
            "layers that thaw, rates of dropout that follow a schedule; leave out compile, or change less."
        )
    if isinstance(cause, TorchRuntimeError):
        return ""  # the model's own, whoever calls it
    if isinstance(cause, TorchDynamoException):
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return f"the model cannot be compiled ({' '.join(lines[:2])[:300]}): leave out compile."
    return ""
