"""Every strategy once, with settings that differ in what they do; the laws run over them.

A strategy that needs a finished run finds one in the folder that it is given: "teacher", of
`problem.residual`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import downslope as ds
from downslope import strategies as st
from downslope.schedule import linear, multistep, wsd
from downslope.strategies import Strategy

RISING = wsd(0.3, steps="100 %", warmup="50 %")

ROWS: Mapping[str, Sequence[Callable[[Path], Strategy]]] = {
    "rates": [
        lambda _: st.rates(decay=0.5),
        lambda _: st.rates(of={"head.*": 2.0, "*": 0.5}),
        lambda _: st.rates(decay=0.9, blocks=("blocks.*",), of={"bias": 2.0}),
    ],
    "freeze": [
        lambda _: st.freeze(every="5 steps"),
        lambda _: st.freeze(until={"stem.*": "50 %", "norm": "never"}),
        lambda _: st.freeze(every=3, blocks=("stem", "blocks", "head")),
    ],
    "start": [
        lambda _: st.start(method="kaiming_normal"),
        lambda _: st.start(lsuv=True),
        lambda _: st.start(method="orthogonal", lsuv=True, zero_residual=True),
    ],
    "normalisation": [
        lambda _: st.normalisation(to="ghost", size=8),
        lambda _: st.normalisation(to="group", groups=4),
        lambda _: st.normalisation(to="frozen"),
    ],
    "dropout": [
        lambda _: st.dropout(rate=0.2),
        lambda _: st.dropout(rate=RISING),
    ],
    "depth": [
        lambda _: st.depth(branches=("blocks.0.branch", "blocks.1.branch")),
        lambda _: st.depth(branches=("blocks.1.branch",), rate=linear(0.5, "100 %")),
    ],
    "mix": [
        lambda _: st.mix(mixup=0.4, cutmix=1.0, per_item=True),
        lambda _: st.mix(cutmix=1.0, mixup=0, probability=0.5, smoothing=0.1, classes=10),
    ],
    "smoothing": [
        lambda _: st.smoothing(),
        lambda _: st.smoothing(share=0.3, classes=10),
    ],
    "micro": [
        lambda _: st.micro(items=6),
        lambda _: st.micro(items=1000),
    ],
    "spikes": [
        lambda _: st.spikes(deviations=0.4, window=8, calm=3, keep=4, most=50),
        lambda _: st.spikes(deviations=0.4, window=8, ladder=("skip", "cut")),
    ],
    "growth": [
        lambda _: st.growth(times=2.5),
        lambda _: st.growth(times=linear(1, "100 %", end=4)),
        lambda _: st.growth(times=multistep(1, at=("0.5 epochs", "320 samples"), factor=2)),
    ],
    "switch": [
        lambda _: st.switch(
            at="50 %", to=ds.momentum(lr=linear(0.1, "100 %"), momentum=0), rewarm=3, guard="9 steps"
        ),
        lambda _: st.switch(
            at=9, to=ds.chain(ds.l2(1), ds.adam(lr=1, betas=(0, 0.5))), match="none", guard=4
        ),
        lambda _: st.switch(at="swats", to=[{"part": "sgd"}], tolerance=1),
        lambda _: st.switch(at="plateau", to=ds.lion(), patience=1, rise=1),
    ],
    "average": [
        lambda _: st.average(decay=0.9, warmup="ratio"),
        lambda _: st.average(kind="swa", start="50 %", every="2 steps", buffers="average"),
        lambda _: st.average(kind="tail", fraction=0.75, buffers="copy"),
        lambda _: st.average(kind="polynomial_average", eta=4),
    ],
    "teacher": [
        lambda runs: st.teacher(run=str(runs / "teacher"), temperature=2),
        lambda runs: st.teacher(
            run=str(runs / "teacher"), method="hints", layers=(("stem", "stem"),), alpha=0.3
        ),
        lambda runs: st.teacher(run=str(runs / "teacher"), temperature=2, cache=2),
    ],
    "escape": [
        lambda _: st.escape(every=3, batches=2, gradient=1e6, curvature=1e-6, products=9),
        lambda _: st.escape(every="25 %", gradient=1e6, curvature=1e-6, products=5, by="ball", radius=0.5),
    ],
    "restart": [
        lambda _: st.restart(at="30 %", starts=3),
        lambda _: st.restart(patience=1, min_delta=1.0, by="ball", radius=0.5),
        lambda _: st.restart(patience=1, min_delta=0.2, on="metric", starts=2),
    ],
    "stop": [
        lambda _: st.stop(patience=3),
        lambda _: st.stop(patience=1, on="metric", min_delta=0.05, relative=True, restore=False, warmup=9),
    ],
}
