"""Memory and time of the exact reverse KL in chunks, beside the naive one that holds all logits.

Both begin with the hidden states and heads of student and teacher and end with the gradients of the student's hidden
states and head. Ours: `chunked_token_loss` with `reverse_kl`, the teacher's logits formed in the same chunks. Naive:
the logits of both, `log_softmax`, `F.kl_div`, backward. On a GPU with Liger installed its fused JSD (at beta 1, the
reverse KL) is a third.

Each case runs in a new process in each turn; cases alternate. The peak is the most memory held in the computation
beyond the inputs (which include the weights) and beyond the head's gradient, which every case needs. On a CPU it is
the resident set's, on a GPU the CUDA allocator's. A small warm-up runs first.

    python benchmarks/exact_kl.py [--vocabulary 49152 151936] [--tokens 4096] [--turns 3] [--json FILE]

The naive form needs ~14 GiB at the larger vocabulary.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from stages.losses.chunked import chunked_token_loss
from stages.losses.divergences import reverse_kl
from stages.losses.log_probabilities import Losses

MIB = 2**20
WARM_UP_TOKENS = 64
# Student's hidden states and head, teacher's hidden states and head.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def chunked(inputs: Inputs, chunk_tokens: int) -> Tensor:
    """Chunked."""
    hidden_NH, head_VH, teacher_NH, teacher_VH = inputs
    weights_N = torch.full((len(hidden_NH),), 1 / len(hidden_NH), device=hidden_NH.device)

    def token_loss(logits_CV: Tensor, part: slice) -> Losses:
        return reverse_kl(logits_CV, teacher_NH[part] @ teacher_VH.T)

    return chunked_token_loss(hidden_NH, head_VH, weights_N, token_loss, chunk_tokens)[0]


def naive(inputs: Inputs, _: int) -> Tensor:
    """With all logits."""
    hidden_NH, head_VH, teacher_NH, teacher_VH = inputs
    teacher_NV = (teacher_NH @ teacher_VH.T).log_softmax(-1)
    student_NV = (hidden_NH @ head_VH.T).log_softmax(-1)
    return functional.kl_div(teacher_NV, student_NV, reduction="batchmean", log_target=True)


def liger(inputs: Inputs, _: int) -> Tensor:
    """Liger's fused linear JSD."""
    kernels = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    loss: Tensor = kernels.LigerFusedLinearJSD(jsd_beta=1.0)(*inputs)
    return loss


CASES: dict[str, Callable[[Inputs, int], Tensor]] = {"chunked": chunked, "naive": naive, "liger": liger}


def make_inputs(tokens: int, head_VH: Tensor, teacher_VH: Tensor) -> Inputs:
    """Random hidden states beside the heads."""
    hidden_NH, teacher_NH = torch.randn(2, tokens, head_VH.shape[1], device=head_VH.device)
    return hidden_NH.requires_grad_(), head_VH, teacher_NH, teacher_VH


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One turn of one case: seconds, peak bytes, the loss and the norms of both gradients."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, run = torch.device(arguments.device), CASES[arguments.case]
    (vocabulary,) = arguments.vocabulary
    head_VH, teacher_VH = (torch.randn(vocabulary, arguments.hidden, device=device).mul_(0.05) for _ in range(2))
    head_VH.requires_grad_()
    run(make_inputs(WARM_UP_TOKENS, head_VH, teacher_VH), arguments.chunk_tokens).backward()
    head_VH.grad = None
    inputs = make_inputs(arguments.tokens, head_VH, teacher_VH)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    start = time.perf_counter()
    loss = run(inputs, arguments.chunk_tokens)
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    # Linux gives the high-water mark in KiB.
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert head_VH.grad is not None
    assert inputs[0].grad is not None
    return {
        "seconds": seconds,
        "peak_bytes": peak - before - head_VH.grad.nbytes,
        "loss": loss.item(),
        "head_gradient": head_VH.grad.norm().item(),
        "hidden_gradient": inputs[0].grad.norm().item(),
    }


def in_a_process(arguments: argparse.Namespace, vocabulary: int, case: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    options = {
        "--vocabulary": vocabulary,
        "--case": case,
        **{f"--{k.replace('_', '-')}": getattr(arguments, k) for k in SHARED},
    }
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    turn: dict[str, float] = json.loads(output)
    return turn


def compare(arguments: argparse.Namespace, vocabulary: int, cases: list[str]) -> dict[str, Any]:
    """All turns of all cases at one vocabulary; one line per case.

    Raises:
        SystemExit: the cases disagree on the loss or a gradient.
    """
    turns: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(arguments.turns):
        for case in cases:
            turns[case].append(in_a_process(arguments, vocabulary, case))
    for name in ("loss", "head_gradient", "hidden_gradient"):
        found = [turn[name] for case in cases for turn in turns[case]]
        if max(found) - min(found) > 1e-3 * max(found):
            raise SystemExit(f"V {vocabulary}: the cases disagree on {name}: {found}")
    peaks = {case: statistics.median(turn["peak_bytes"] for turn in turns[case]) for case in cases}
    for case in cases:
        seconds = sorted(turn["seconds"] for turn in turns[case])
        print(
            f"V {vocabulary:7,} {case:8} {peaks[case] / MIB:9,.0f} MiB {statistics.median(seconds):7.2f} s "
            f"({seconds[0]:.2f}-{seconds[-1]:.2f})",
            flush=True,
        )
    ratios = {
        other: {
            "memory": peaks["chunked"] / peaks[other],
            "time": statistics.median(
                ours["seconds"] / theirs["seconds"] for ours, theirs in zip(turns["chunked"], turns[other], strict=True)
            ),
        }
        for other in cases
        if other != "chunked"
    }
    return {"vocabulary": vocabulary, "turns": turns, "ratios": ratios}


def processor() -> str:
    """The CPU's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} x {len(names)}"


SHARED = ("tokens", "hidden", "chunk_tokens", "threads", "device")


def main() -> None:
    """Measure one case, or compare all and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", choices=CASES, help="measure this one alone, in this process, at one vocabulary")
    parser.add_argument("--json", type=Path, help="file for all turns")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments)))
        return
    cases = ["chunked", "naive"]
    if arguments.device.startswith("cuda") and importlib.util.find_spec("liger_kernel"):
        cases.append("liger")
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else processor()
    settings = {name: getattr(arguments, name) for name in SHARED}
    print(f"torch {torch.__version__}, {device}, float32: {settings}")
    results = [compare(arguments, vocabulary, cases) for vocabulary in arguments.vocabulary]
    if arguments.json:
        report = {"torch": torch.__version__, "device_name": device, **settings, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1))
    for other in cases[:0:-1]:
        parts = [
            f"V {r['vocabulary']:,}: memory {r['ratios'][other]['memory']:.3f}x, time {r['ratios'][other]['time']:.2f}x"
            for r in results
        ]
        print(f"chunked / {other}: " + "; ".join(parts))


if __name__ == "__main__":
    main()
