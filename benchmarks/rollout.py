"""Rollouts a second: the project's sampler beside transformers' `generate`, on the same model and prompts.

Both draw `--group-size` completions of each prompt at temperature 1 and return the log-probability of every sampled
token, as training needs them. The two take turns in one process; the figure is the ratio of their token rates in
each turn.

    python benchmarks/rollout.py [CHECKPOINT] [--run-file flows/runs/lab.yaml] [--rounds 5] [--json FILE]

CHECKPOINT is a Hugging Face directory; by default the newest student in `$MOPD_HOME`. The last line has the ratios.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.domain import HELD_OUT, load_domain
from flows.config import STUDENT
from flows.run_file import load_run_file
from stages.core.checkpoint import Store
from stages.core.policy import Policy, encode_prompt
from stages.on_policy.sampler import Sampling, sample


def newest_student() -> Path:
    """The directory of the student made last."""
    store = Store(Path(os.environ.get("MOPD_HOME", ".mopd")))
    students = [a for a in store.artifacts() if a.manifest["name"] == STUDENT]
    if not students:
        raise SystemExit(f"no student in {store.root}; run `make demo` first, or give a checkpoint")
    return max(students, key=lambda artifact: artifact.manifest["created"]).path


def ours(policy: Policy, prompts: list[list[int]], group_size: int, length: int, seed: int) -> int:
    """Sample with the project's sampler; returns the number of completion tokens."""
    groups = sample(policy, prompts, group_size, Sampling(length), seed)
    return sum(len(row.completion_ids) for group in groups for row in group)


def generate(policy: Policy, prompts: list[list[int]], group_size: int, length: int, seed: int) -> int:
    """Sample with `generate`; returns the number of completion tokens up to EOS."""
    torch.manual_seed(seed)
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
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
        output_scores=True,
    )
    policy.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    completions = output.sequences[:, width:]
    ended = completions == policy.eos_id
    after = ended.cumsum(1) - ended.long()
    return int((after == 0).sum())


def rate(run: Callable[..., int], *arguments: object) -> float:
    """Completion tokens a second."""
    start = time.perf_counter()
    tokens = run(*arguments)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    """Print the ratio for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--run-file", type=Path, default=Path(__file__).parent.parent / "flows/runs/lab.yaml")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.checkpoint or newest_student()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = Policy(model, AutoTokenizer.from_pretrained(folder))
    config = load_run_file(arguments.run_file)
    length = config.evaluate.max_new_tokens
    domains = [load_domain(name, d.kind, d.options) for name, d in config.domains.items()]
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(domains)} domains in a batch")
    cases = []
    for count in arguments.prompts:
        examples = [e for domain in domains for e in domain.draw(HELD_OUT, -(-count // len(domains)), 0)]
        prompts = [encode_prompt(policy.tokenizer, example.prompt) for example in examples]
        ratios, rates = [], []
        for turn in range(arguments.rounds + 1):
            mine = rate(ours, policy, prompts, arguments.group_size, length, turn)
            theirs = rate(generate, policy, prompts, arguments.group_size, length, turn)
            if turn > 0:  # The first turn warms both up.
                ratios.append(mine / theirs)
                rates.append(mine)
        print(
            f"{len(prompts):4d} prompts x {arguments.group_size}: {statistics.median(ratios):.2f}x generate "
            f"({min(ratios):.2f}-{max(ratios):.2f}; {statistics.median(rates):,.0f} tokens/s)"
        )
        cases.append({"prompts": len(prompts), "ratio": statistics.median(ratios), "ratios": ratios, "rates": rates})
    if arguments.json:
        facts = {
            "command": sys.argv,
            "machine": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": arguments.threads},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "group_size": arguments.group_size,
            "cases": cases,
        }
        arguments.json.write_text(json.dumps(facts, indent=1))
    print("; ".join(f"{case['prompts']} x {arguments.group_size} {case['ratio']:.2f}x generate" for case in cases))


if __name__ == "__main__":
    main()
