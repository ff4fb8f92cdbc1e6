"""What the keys of each strategy's table mean, and the tool that does the same in a loop of one's own."""

from collections.abc import Mapping

_SHARED = {
    "blocks": "globs of module names, low to high, that are a layer each; left out: as the model shows them",
    "classes": "how many there are; left out: as many as the training targets name",
    "smoothing": "share of the targets that is spread over all classes",
}

MEANINGS: Mapping[str, Mapping[str, str]] = {
    "rates": {
        "decay": "each layer's rate is this times that of the layer above it",
        "of": "multipliers of the rate by globs of parameter names or roles",
    },
    "freeze": {
        "until": 'the duration after which what a glob or role names is trained, or "never"',
        "every": "from the top down, the duration between two layers",
    },
    "start": {
        "method": "what linear, convolution, recurrent and attention weights are drawn by",
        "lsuv": "scale each layer's weight until its outputs, on the first batch, have variance 1",
        "zero_residual": "the last layer of every residual branch starts at 0",
    },
    "normalisation": {
        "to": "ghost, group or frozen",
        "size": "items of a ghost batch; left out: 32",
        "groups": "most groups of channels, for group; left out: 16 channels a group",
    },
    "dropout": {"rate": "share of the activations that is left out, or a schedule of it"},
    "depth": {
        "branches": "residual branches by module name, from low to high",
        "rate": "how often the last branch is left out, or a schedule of it; those below it less, in a line",
    },
    "mix": {
        "mixup": "alpha of the Beta from which the share of an item's own part is drawn; 0: no mixup",
        "cutmix": "alpha of the Beta from which a box's area is drawn; 0: no CutMix",
        "probability": "how often a batch is mixed",
        "cutmix_share": "of the mixed batches, where both are on, those with CutMix",
        "per_item": "every item draws for itself",
    },
    "smoothing": {"share": "share of the targets that is spread over all classes"},
    "micro": {"items": "items of a piece of the batch, at most"},
    "spikes": {
        "deviations": "of the last losses, by which one is above their median that is a spike",
        "window": "updates whose losses are remembered; half of them are seen before any is a spike",
        "calm": "updates without a spike after which the ladder begins again, and the rate is whole",
        "ladder": "what is done: skip, cut, back",
        "cut": "what the rate is multiplied by",
        "keep": "updates between two states that are kept to go back to",
        "most": "how often the training may go back before it is given up",
    },
    "growth": {
        "times": "batches that an update takes, from 1, or a schedule of them, rounded to the nearest"
    },
    "average": {
        "kind": "ema, swa, tail or polynomial_average",
        "decay": "of an ema: what stays of the average at each sample",
        "warmup": "of an ema: none, ratio, power or debiased",
        "gamma": 'of warmup = "power"',
        "power": 'of warmup = "power"',
        "fraction": "of a tail: the share of the training that is averaged",
        "eta": "of a polynomial average: the last 1/(eta + 1) of the training is what counts",
        "start": "the first update that is sampled",
        "every": "updates from one sample to the next",
        "buffers": "BatchNorm's statistics in evaluations: recompute, copy or average",
    },
    "teacher": {
        "run": "the folder of a finished run, or several",
        "weights": "of several teachers",
        "average": "what of several teachers is averaged: probabilities or logits",
        "method": "a method of ds.distill, or weights by method",
        "temperature": "what logits are divided by, or a schedule of it",
        "alpha": "the teacher's share of the loss, or a schedule of it",
        "beta": "of decoupled distillation: the weight of the other classes",
        "layers": "pairs of module names, the student's and the teacher's, for methods on features",
        "rate": "learning rate of the regressors between layers of unequal width",
        "batchnorm": "whose statistics the teacher uses: eval (those that run) or train (the batch's)",
        "cache": "how many classes of its answer to each sample are kept, which then is asked for once",
        "ignore_index": "target of positions that do not count",
    },
    "switch": {
        "at": 'when: a duration, "plateau" or "swats"',
        "to": "parts as in [[chain]]",
        "match": "how the first new update is matched: size, swats or none",
        "rewarm": "a rise to the new rate",
        "guard": "how long the old weights and state are kept, to come back to",
        "rise": "deviations of the mean loss from which they come back",
        "patience": 'validations without a better loss, of at = "plateau"',
        "tolerance": 'how close the projected rate must settle, of at = "swats"',
    },
    "escape": {
        "every": "from one test to the next, and so between two moves at least",
        "batches": "how many of the training's first batches are what is tested",
        "gradient": "norm of it, in the loss's unit per unit of weight, up to which curvature is asked for",
        "curvature": "a least eigenvalue below minus this is a saddle's, in units per weight squared",
        "products": "of the Hessian with a vector, at most, for the least eigenvalue",
        "by": "direction (of the least eigenvalue, downhill) or ball (a vector drawn from it)",
        "radius": "the longest move, in units of the weight, over all weights together",
    },
    "restart": {
        "at": 'from one start to the next: a duration, or "plateau"',
        "starts": "how many at most, the first one included",
        "by": "fresh (first weights drawn anew) or ball (the best so far, moved)",
        "radius": "of the ball, in units of the weight, over all weights together",
        "patience": 'validations in a row that are no improvement, of at = "plateau"',
        "min_delta": "by how much a validation must be better than the best of its start to count",
        "on": "loss or metric, by which the best is chosen",
    },
    "stop": {
        "patience": "validations in a row that are no improvement, after which it is over",
        "min_delta": "by how much a validation must be better than the best to count",
        "relative": "min_delta is a share of the best",
        "on": "loss or metric",
        "restore": "end with the weights of the best validation",
        "warmup": "a duration in which nothing counts against the training",
    },
}

TOOLS: Mapping[str, str] = {
    "rates": "ds.layer_decay, ds.discriminative, ds.param_groups",
    "freeze": "ds.freeze, ds.gradual_unfreeze",
    "start": "ds.initialise, ds.lsuv, ds.zero_residual",
    "normalisation": "ds.norm.to_ghost, ds.norm.to_group, ds.norm.freeze",
    "dropout": "ds.set_dropout",
    "depth": "ds.stochastic_depth",
    "mix": "ds.Mix, ds.mixup, ds.cutmix",
    "smoothing": "ds.smoothed_cross_entropy, ds.soft_targets",
    "micro": "(loss * items / whole).backward() for each piece",
    "growth": "ds.strategies.Pace",
    "average": "ds.Average",
    "teacher": "ds.distill",
    "escape": "ds.curvature.saddle, ds.curvature.escape, ds.curvature.perturb",
    "restart": "ds.EarlyStopping, ds.curvature.perturb",
    "stop": "ds.EarlyStopping",
}
"""What does the same without a recipe, by strategy."""


def meaning(strategy: str, key: str) -> str:
    """What a key of a strategy's table means; empty if nobody has said it.

    >>> meaning("stop", "on")
    'loss or metric'
    """
    return MEANINGS.get(strategy, {}).get(key) or _SHARED.get(key, "")
