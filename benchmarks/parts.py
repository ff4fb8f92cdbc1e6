"""Where the time of a step goes: in its compiled passes and outside of them (Python, torch, the look at each
gradient), beside a stream of the bytes that the trace says it moves.

    OMP_NUM_THREADS=1 python benchmarks/parts.py adamw adan ftrl              # 400 tensors of 1 024 numbers
    OMP_NUM_THREADS=1 python benchmarks/parts.py adafactor "agc > sgd" --large --repetitions 5

Step and stream take turns. Given are medians in milliseconds, and for every pass the bytes a number that it
reads and writes. On a machine that others use too, one thread is less disturbed than two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import floor
import torch
from step import gpt2, ours, shares, small, stepped

from downslope.kernels import cpu


class Passes:
    """Stands in for what runs a compiled pass, and keeps how long each took."""

    def __init__(self) -> None:
        self.run, self.seconds = cpu.spread, []  # type: ignore[var-annotated]

    def __call__(self, *given: Any) -> None:
        start = time.perf_counter()
        self.run(*given)
        self.seconds.append(time.perf_counter() - start)


def row(name: str, large: bool, repetitions: int) -> str:
    """A row of the table in Markdown."""
    shapes, passes = gpt2() if large else small(), Passes()
    program = shares(name, shapes)
    step = stepped(ours(name), shapes, [torch.randn(shape) for shape in shapes], "cpu")
    stream, burst = floor.stream(program, "cpu"), 1 if large else 9
    cpu.spread, steps, inside, streams = passes, [], [], []  # type: ignore[assignment,var-annotated]
    try:
        for repetition in range(repetitions + 2):
            for part in range(2 * burst):
                passes.seconds, start = [], time.perf_counter()
                (step if part < burst else stream)()
                took = time.perf_counter() - start
                if repetition > 1 and part < burst:
                    steps.append(took)
                    inside.append(passes.seconds)
                elif repetition > 1:
                    streams.append(took)
    finally:
        cpu.spread = passes.run
    median = lambda values: statistics.median(values) * 1e3  # noqa: E731
    each = [median(values) for values in zip(*inside, strict=True)]
    outside = median([total - sum(parts) for total, parts in zip(steps, inside, strict=True)])
    moved = [4 * (len(stage.arrays) + len(stage.stores)) for stage in program[0][0].stages]
    told = " + ".join(f"{ms:.3g} ({size})" for ms, size in zip(each, moved, strict=True))
    whole = program[0][0].bytes_moved
    return f"| {name} | {median(steps):.3g} | {told} | {outside:.3g} | {whole} | {median(streams):.3g} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rules", nargs="+", metavar="RULE")
    parser.add_argument("--large", action="store_true", help="85 million numbers, the shapes of GPT-2 small")
    parser.add_argument("--repetitions", type=int, default=60)
    asked = parser.parse_args()
    print(
        "| rule | step | passes (bytes a number) | outside | bytes a number | stream |\n" + "|---" * 6 + "|"
    )
    for name in asked.rules:
        print(row(name, asked.large, asked.repetitions), flush=True)


if __name__ == "__main__":
    main()
