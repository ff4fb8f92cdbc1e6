"""Training: a Training owns everything that resumes; a run is a folder that survives kill -9 at any time."""

from downslope.train.batches import Batches, BatchLost
from downslope.train.branch import Branch, branch
from downslope.train.checkpoint import Damaged
from downslope.train.history import history, losses
from downslope.train.order import measures, order, steps_per_epoch
from downslope.train.player import Diverged, Move, Side
from downslope.train.precision import Arithmetic
from downslope.train.proof import Proof, verify_resume
from downslope.train.run import Run, resume, train
from downslope.train.sampler import Sampler
from downslope.train.seeded import Seeded
from downslope.train.state import Resumed, Snapshot, TrainState
from downslope.train.store import Checkpoints
from downslope.train.trainer import keep_generators
from downslope.train.training import Attempt, Evaluation, Training

__all__ = [
    "Arithmetic",
    "Attempt",
    "BatchLost",
    "Batches",
    "Branch",
    "Checkpoints",
    "Damaged",
    "Diverged",
    "Evaluation",
    "Move",
    "Proof",
    "Resumed",
    "Run",
    "Sampler",
    "Seeded",
    "Side",
    "Snapshot",
    "TrainState",
    "Training",
    "branch",
    "history",
    "keep_generators",
    "losses",
    "measures",
    "order",
    "resume",
    "steps_per_epoch",
    "train",
    "verify_resume",
]
