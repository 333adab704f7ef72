"""Matrix products of `stages.model.linear` beside torch's own, at the shapes of the lab model and of SmolLM2-135M.

Forward as a decoding step runs it, and forward with both gradients as training does; the two take turns in one process
and a figure is the ratio of their medians. Where `stages.model.linear` leaves the choice to torch it is about 1.

    python benchmarks/linear.py [--rows 16 64 256 1664] [--threads 1] [--turns 9] [--json FILE]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.model.linear import matmul_t

# Inputs and outputs of the models' linear layers.
SHAPES = [(128, 128), (128, 256), (256, 128), (576, 576), (576, 1536), (1536, 576)]
SECONDS_PER_TURN = 0.02


def compare(rows: int, inputs: int, outputs: int, train: bool, turns: int) -> float:
    """How many times as fast `matmul_t` is as `torch.nn.functional.linear`."""
    left_MK = torch.randn(rows, inputs, requires_grad=train)
    right_NK = torch.randn(outputs, inputs, requires_grad=train)
    upstream_MN = torch.randn(rows, outputs)

    def work(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        if train:
            torch.autograd.grad(multiply(left_MK, right_NK), (left_MK, right_NK), upstream_MN)
        else:
            with torch.inference_mode():
                multiply(left_MK, right_NK)

    sides = {"torch": functional.linear, "ours": matmul_t}
    repeats = max(1, round(SECONDS_PER_TURN / seconds(lambda: work(functional.linear), 3)))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, multiply in sides.items():
            taken[name].append(seconds(lambda multiply=multiply: work(multiply), repeats))
    return statistics.median(taken["torch"]) / statistics.median(taken["ours"])


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Mean time of one call."""
    work()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - started) / repeats


def main() -> None:
    """Compare all shapes; the last line has the mean ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 1664])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    for train in (False, True):
        for rows in arguments.rows:
            ratios = [compare(rows, *shape, train, arguments.turns) for shape in SHAPES]
            results.append({"rows": rows, "gradients": train, "ratios": ratios})
            each = "  ".join(f"{k}x{n} {ratio:.2f}" for (k, n), ratio in zip(SHAPES, ratios, strict=True))
            print(f"{'with gradients' if train else 'forward':14s} {rows:5d} rows: {each}", flush=True)
    if arguments.json:
        processor = {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
        facts = {"torch": torch.__version__, "threads": arguments.threads, **processor, "results": results}
        arguments.json.write_text(json.dumps(facts, indent=1))
    forward, trained = (
        statistics.geometric_mean([ratio for r in results if r["gradients"] is train for ratio in r["ratios"]])
        for train in (False, True)
    )
    print(f"forward {forward:.2f}x torch, with gradients {trained:.2f}x")


if __name__ == "__main__":
    main()
