"""Knowledge distillation: losses on tensors, teachers and their cache, and `distill` of them all."""

from downslope.distill.cache import Places, TopK, remember
from downslope.distill.distillation import METHODS, Distillation, born_again, distill
from downslope.distill.feature import angle, attention, distance, hints, relational
from downslope.distill.layer import captured, regressor
from downslope.distill.logit import cross_entropy, decoupled, divergence, exits, logits, mutual
from downslope.distill.teacher import Teacher, Teachers, averaged

__all__ = [
    "METHODS",
    "Distillation",
    "Places",
    "Teacher",
    "Teachers",
    "TopK",
    "angle",
    "attention",
    "averaged",
    "born_again",
    "captured",
    "cross_entropy",
    "decoupled",
    "distance",
    "distill",
    "divergence",
    "exits",
    "hints",
    "logits",
    "mutual",
    "regressor",
    "relational",
    "remember",
]
