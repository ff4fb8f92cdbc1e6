"""Training: TrainState owns everything that resumes; a run is a folder that survives kill -9 at any time."""

from downslope.train.checkpoint import Damaged
from downslope.train.order import order, steps_per_epoch
from downslope.train.state import Attempt, Diverged, Evaluation, TrainState

__all__ = ["Attempt", "Damaged", "Diverged", "Evaluation", "TrainState", "order", "steps_per_epoch"]
