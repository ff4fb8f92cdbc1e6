"""Times the public `optimizer.step()` against torch's for-loop, foreach and fused paths of the same rule.

    python benchmarks/step.py                 # all tables, every rule, 40 repetitions
    python benchmarks/step.py --rules adamw --repetitions 60 --json

Every repetition runs every contender, in an order that rotates, so that a drifting machine drifts for all;
ratios are taken repetition by repetition. Given are medians, and the 95 % interval of the median ratio by
order statistics. A ratio below 1 means that downslope is faster than the best path of torch. The thread count
is torch's.

Of the small tensors a repetition is the median of `--burst` steps in a row: the first find the caches full
of what the other contenders did, and `--burst 1` times just that.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import downslope as ds

Make = Callable[[list[Tensor]], Any]


def gpt2() -> list[tuple[int, ...]]:
    """The shapes of GPT-2 small's twelve blocks and last norm: 85 million numbers in 146 tensors."""
    block: list[tuple[int, ...]] = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return block * 12 + [(768,), (768,)]


def small() -> list[tuple[int, ...]]:
    """400 tensors of 1 024 numbers: what remains is the overhead of a step."""
    return [(1024,)] * 400


def torch_paths(kind: Any, fused: bool, **numbers: Any) -> dict[str, Make]:
    """The implementations that torch has of one rule."""
    paths: dict[str, Make] = {
        "for-loop": lambda ps: kind(ps, foreach=False, **numbers),
        "foreach": lambda ps: kind(ps, foreach=True, **numbers),
    }
    if fused:
        paths["fused"] = lambda ps: kind(ps, fused=True, **numbers)
    return paths


def clipped(make: Make) -> Make:
    """torch's way of clipping by the global norm: a pass of its own before the step."""

    def build(parameters: list[Tensor]) -> Any:
        optimizer = make(parameters)

        class Clipped:
            def step(self) -> None:
                torch.nn.utils.clip_grad_norm_(parameters, 1e9)
                optimizer.step()

        return Clipped()

    return build


OPTIM = torch.optim
RULES: dict[str, tuple[Make, dict[str, Make]]] = {
    "sgd": (lambda ps: ds.SGD(ps, lr=1e-3), torch_paths(OPTIM.SGD, True, lr=1e-3)),
    "momentum": (lambda ps: ds.Momentum(ps, lr=1e-3), torch_paths(OPTIM.SGD, True, lr=1e-3, momentum=0.9)),
    "nesterov": (
        lambda ps: ds.Nesterov(ps, lr=1e-3),
        torch_paths(OPTIM.SGD, True, lr=1e-3, momentum=0.9, nesterov=True),
    ),
    "adagrad": (lambda ps: ds.Adagrad(ps, lr=1e-3), torch_paths(OPTIM.Adagrad, True, lr=1e-3)),
    "rmsprop": (lambda ps: ds.RMSprop(ps, lr=1e-3), torch_paths(OPTIM.RMSprop, False, lr=1e-3)),
    "adam": (lambda ps: ds.Adam(ps, lr=1e-3), torch_paths(OPTIM.Adam, True, lr=1e-3)),
    "adamw": (lambda ps: ds.AdamW(ps, lr=1e-3), torch_paths(OPTIM.AdamW, True, lr=1e-3)),
    "clip > adamw": (
        lambda ps: ds.Optimizer(ps, ds.chain(ds.clip_norm(1e9), ds.adamw(lr=1e-3))),
        {name: clipped(make) for name, make in torch_paths(OPTIM.AdamW, True, lr=1e-3).items()},
    ),
    "lion": (lambda ps: ds.Lion(ps, lr=1e-3), {}),
}


def stepped(make: Make, shapes: list[tuple[int, ...]], gradients: list[Tensor]) -> Callable[[], None]:
    """A function that makes one step over parameters of these shapes."""
    parameters = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = make(parameters)  # type: ignore[arg-type]
    return lambda: optimizer.step()


def trained(make: Make, shapes: list[tuple[int, ...]], _: list[Tensor]) -> Callable[[], None]:
    """A function that runs backward through a real network of about these shapes, and steps."""
    if len(shapes) == 400:  # 32 x 32 weights, 400 layers deep
        layers: list[nn.Module] = [nn.Linear(32, 32, bias=False) for _ in shapes]
        net, x = nn.Sequential(*layers), torch.randn(8, 32)
    else:
        block = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True, dropout=0.0)
        net, x = (
            nn.Sequential(nn.TransformerEncoder(block, 12, enable_nested_tensor=False)),
            torch.randn(1, 16, 768),
        )
    y = torch.randn_like(x)  # a target that is out of reach, or gradients would fade into denormal numbers
    optimizer = make(list(net.parameters()))

    def both() -> None:
        for parameter in net.parameters():
            parameter.grad = None
        (net(x) - y).square().mean().backward()
        optimizer.step()

    return both


def measure(
    contenders: dict[str, Callable[[], None]], repetitions: int, burst: int
) -> dict[str, list[float]]:
    """Seconds of every repetition of every contender, interleaved: the median of each burst."""
    for run in contenders.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            times = []
            for _ in range(burst):
                start = time.perf_counter()
                contenders[name]()
                times.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(times))
    return seconds


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by order statistics."""
    ordered, n = sorted(values), len(values)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def compare(
    rule: str, shapes: list[tuple[int, ...]], build: Any, repetitions: int, burst: int
) -> dict[str, Any]:
    """One row: milliseconds of every contender, and the ratio to torch's best."""
    ours, theirs = RULES[rule]
    gradients = [torch.randn(shape) for shape in shapes]
    contenders = {
        name: build(make, shapes, gradients) for name, make in {"downslope": ours, **theirs}.items()
    }
    seconds = measure(contenders, repetitions, burst)
    row: dict[str, Any] = {"rule": rule, "ms": {k: statistics.median(v) * 1e3 for k, v in seconds.items()}}
    if theirs:
        best = min(theirs, key=lambda name: statistics.median(seconds[name]))
        ratios = [a / b for a, b in zip(seconds["downslope"], seconds[best], strict=True)]
        row |= {"best": best, "ratio": interval(ratios)}
    return row


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as Markdown."""
    names = ["downslope", "for-loop", "foreach", "fused"]
    print(f"\n{title}\n\n| rule | {' | '.join(names)} | ratio to torch's best (95 %) |")
    print("|---" * (len(names) + 2) + "|")
    for row in rows:
        times = " | ".join(f"{row['ms'][name]:.3g}" if name in row["ms"] else "–" for name in names)
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(*row["ratio"]) if "ratio" in row else "–"
        print(f"| {row['rule']} | {times} | {ratio} |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES), metavar="RULE")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--burst", type=int, default=9, help="steps in a row, small tensors only")
    parser.add_argument("--tables", nargs="*", default=["large", "small", "backward"], metavar="TABLE")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    asked = parser.parse_args()
    both = [rule for rule in ("adamw", "momentum") if rule in asked.rules]
    plan: dict[str, tuple[str, Any, Any, list[str], int]] = {
        "large": ("a step, shapes of GPT-2 small (85 M numbers)", gpt2(), stepped, asked.rules, 1),
        "small": ("a step, 400 tensors of 1 024 numbers", small(), stepped, asked.rules, asked.burst),
        "backward": ("forward, backward and step, GPT-2 small's blocks, 16 tokens", gpt2(), trained, both, 1),
        "backward-small": ("forward, backward and step, 400 layers of 32 x 32", small(), trained, both, 1),
    }
    chosen = [name for name in plan if name.removesuffix("-small") in asked.tables or name in asked.tables]
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in chosen:
        title, shapes, build, rules, burst = plan[name]
        found[name] = [compare(rule, shapes, build, asked.repetitions, burst) for rule in rules]
        if not asked.json:
            table(f"Milliseconds of {title}", found[name])
    if asked.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
