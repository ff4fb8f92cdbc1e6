"""Strategies: what a recipe chooses beyond the update rule, each a table of its own."""

from downslope.strategies.average import average
from downslope.strategies.data import micro, mix, smoothing
from downslope.strategies.escape import escape
from downslope.strategies.growth import growth
from downslope.strategies.layers import depth, dropout, freeze, normalisation, rates, start
from downslope.strategies.live import Company, begin
from downslope.strategies.pace import Pace, Rates
from downslope.strategies.restart import restart
from downslope.strategies.spikes import spikes
from downslope.strategies.stop import stop
from downslope.strategies.strategy import Batch, Live, Loss, Setting, Strategy
from downslope.strategies.switch import switch
from downslope.strategies.teacher import teacher

STRATEGIES: dict[str, type[Strategy]] = {
    made.__name__: made
    for made in (
        rates,
        freeze,
        start,
        normalisation,
        dropout,
        depth,
        mix,
        smoothing,
        micro,
        spikes,
        growth,
        switch,
        average,
        teacher,
        escape,
        restart,
        stop,
    )
}
"""Every strategy by the name of its table; in this order they shape a model and see a batch."""

__all__ = [
    "STRATEGIES",
    "Batch",
    "Company",
    "Live",
    "Loss",
    "Pace",
    "Rates",
    "Setting",
    "Strategy",
    "average",
    "begin",
    "depth",
    "dropout",
    "escape",
    "freeze",
    "growth",
    "micro",
    "mix",
    "normalisation",
    "rates",
    "restart",
    "smoothing",
    "spikes",
    "start",
    "stop",
    "switch",
    "teacher",
]
