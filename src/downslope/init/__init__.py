"""Initialisation: weights by the size of their layer and the activation that follows, or by data (LSUV);
residual branches at zero; and a check that says which layer's variance is off.
"""

from downslope.init.activation import following, gain
from downslope.init.residual import Zeroed, zero_residual
from downslope.init.signal import Check, LayerSignal, Scaled, check, lsuv
from downslope.init.weight import METHODS, Initialised, Layer, initialise

__all__ = [
    "METHODS",
    "Check",
    "Initialised",
    "Layer",
    "LayerSignal",
    "Scaled",
    "Zeroed",
    "check",
    "following",
    "gain",
    "initialise",
    "lsuv",
    "zero_residual",
]
