"""The text of a first run file. Its numbers are the lab's for a tiny model and those of `smollm2.yaml` for others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from base.documents import one_line
from experts.data.guess import free_text
from experts.domain import Example

GENERAL = "general"


@dataclass(frozen=True)
class Skill:
    """A domain to learn.

    Attributes:
        name: The domain's and its expert's.
        kind: The domain's kind.
        options: Its options.
        examples: Some of its examples.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    examples: Sequence[Example] = field(repr=False)

    @property
    def method(self) -> str:
        """`rl` if a score can separate right from wrong; `sft` for free text."""
        return "sft" if free_text(self.options, [e.answer for e in self.examples]) and self.kind == "hub" else "rl"

    @property
    def longest_answer(self) -> int:
        """Characters of the longest gold answer."""
        return max(len(example.answer) for example in self.examples)

    @property
    def longest_chat(self) -> int:
        """Characters of the longest prompt with its answer."""
        return max(sum(len(m["content"]) + 1 for m in example.messages) for example in self.examples)


@dataclass(frozen=True)
class Sizes:
    """Lengths and devices.

    Attributes:
        tiny: Whether the run pretrains its base.
        gpus: Devices of each training stage.
        context: Context of the tiny model; None for others, which have their own.
        new_tokens: Longest completion of each domain.
    """

    tiny: bool
    gpus: int
    context: int | None
    new_tokens: Mapping[str, int]


def run_file(name: str, base: Mapping[str, Any], skills: Sequence[Skill], sizes: Sizes) -> str:
    """The whole file.

    Args:
        name: The run's name.
        base: `checkpoint` or `gguf`; not used for a tiny model.
        skills: One expert each.
        sizes: Lengths and devices.
    """
    general = GENERAL if all(skill.name != GENERAL for skill in skills) else f"{GENERAL}_skill"
    parts = [
        f"# Check it with `mopd plan --check`, make it with `mopd run`; `mopd run --help-config` lists every key.\n"
        f"name: {name}\nseeds: [0]            # [0, 1, 2] shows how far seeds differ",
        _base(base, sizes),
        _domains(skills, general, sizes),
        _cold_start(skills, sizes),
        _experts(skills, sizes),
        _merge(skills, general, sizes),
        _end(sizes),
    ]
    return "\n\n".join(parts) + "\n"


def _base(base: Mapping[str, Any], sizes: Sizes) -> str:
    if not sizes.tiny:
        return f"base: {one_line(base)}"
    return f"""\
# Half a million parameters, pretrained here on rough answers of the domains.
base:
  pretrain:
    model: {{hidden_size: 128, layers: 3, heads: 4, intermediate_size: 256, max_length: {sizes.context}}}
    max_steps: 2000
    batch_tokens: {max(768, 2 * (sizes.context or 0))}
    examples: 8000
    optimizer: {{learning_rate: 4.0e-3, schedule: cosine, warmup_steps: 50}}"""


def _domains(skills: Sequence[Skill], general: str, sizes: Sizes) -> str:
    if sizes.tiny:
        kept = {"kind": "strings", "options": {"task": "uppercase"}}
    else:
        kept = {
            "kind": "reasoning",
            "options": {"tasks": {"chain_sum": {"max_terms": 3, "max_digits": 2, "min_digits": 1}}},
        }
    lines = []
    for skill in skills:
        if skill.method == "sft":
            lines.append("  # Whole texts are compared, which is a poor score of free text: see the kind `judge`.")
        lines.append(_entry(skill.name, skill.kind, skill.options))
    return "\n".join(
        [
            "# The domains to learn and to measure: the source of examples and the scorer of completions.",
            "domains:",
            *lines,
            "  # No expert trains it: it measures forgetting. Use data here that your model must not forget.",
            f"  {general}: {one_line(kept)}",
        ]
    )


def _entry(name: str, kind: str, options: Mapping[str, Any]) -> str:
    entry = {"kind": kind, **({"options": dict(options)} if options else {})}
    line = f"  {name}: {one_line(entry)}"
    if len(line) <= 110:
        return line
    inner = "\n".join(f"      {key}: {one_line(value)}" for key, value in options.items())
    return f"  {name}:\n    kind: {kind}\n    options:\n{inner}"


def _cold_start(skills: Sequence[Skill], sizes: Sizes) -> str:
    names = ", ".join(skill.name for skill in skills)
    lora = "" if sizes.tiny else "    lora: {rank: 32, alpha: 64}\n"
    rate, batch, examples = ("3.0e-4", 64, 100) if sizes.tiny else ("2.0e-4", 16, 200)
    return f"""\
# A few demonstrations of every domain: the common start of all experts and of the merge.
cold_start:
  sft:
    domains: [{names}]
    demonstrations: {"rough" if sizes.tiny else "gold"}
    examples: {examples}
    max_steps: 40
    batch_size: {batch}
{lora}    optimizer: {{learning_rate: {rate}, schedule: cosine}}"""


def _experts(skills: Sequence[Skill], sizes: Sizes) -> str:
    lines = [
        "# One expert a domain: rl learns from the score of its own completions, sft imitates gold answers.",
        "experts:",
    ]
    for skill in skills:
        lines += [f"  {skill.name}:", f"    domain: {skill.name}", "    train:", f"      {skill.method}:"]
        settings = _rl(sizes, sizes.new_tokens[skill.name]) if skill.method == "rl" else _sft(sizes)
        lines += [f"        {line}" for line in settings]
    return "\n".join(lines)


def _rl(sizes: Sizes, new_tokens: int) -> list[str]:
    lora = [] if sizes.tiny else ["lora: {rank: 32, alpha: 64}"]
    rate, steps, prompts = ("6.0e-4", 200, 16) if sizes.tiny else ("5.0e-5", 150, 32)
    schedule = ", schedule: linear" if sizes.tiny else ""
    return [
        f"max_steps: {steps}",
        f"prompts_per_step: {prompts}",
        "group_size: 8",
        f"max_new_tokens: {new_tokens}",
        *lora,
        f"optimizer: {{learning_rate: {rate}{schedule}, warmup_steps: 5}}",
    ]


def _sft(sizes: Sizes) -> list[str]:
    if sizes.tiny:
        return ["max_steps: 120", "batch_size: 64", _rate("2.0e-3")]
    return ["max_steps: 200", "batch_size: 16", "lora: {rank: 32, alpha: 64}", _rate("2.0e-4")]


def _rate(rate: str) -> str:
    return f"optimizer: {{learning_rate: {rate}, schedule: cosine, warmup_steps: 5}}"


def _merge(skills: Sequence[Skill], general: str, sizes: Sizes) -> str:
    longest = max(sizes.new_tokens.values())
    if sizes.tiny:
        steps, prompts, rate, lora = 300, 16 * (len(skills) + 1), "5.0e-4, schedule: cosine", ""
    else:
        steps, prompts, rate, lora = 150, max(64, 16 * (len(skills) + 1)), "1.0e-4", "  lora: {rank: 32, alpha: 64}\n"
    return f"""\
# The student: its own samples, each scored by the teacher of its domain.
merge:
  method: mopd
  max_steps: {steps}
  prompts_per_step: {prompts}
  max_new_tokens: {longest}
{lora}  objective: {{type: reverse_kl}}
  anchor: {{domains: [{general}]}}    # taught by the start itself, so that it is kept
  optimizer: {{learning_rate: {rate}, warmup_steps: 5}}"""


def _end(sizes: Sizes) -> str:
    longest = max(sizes.new_tokens.values())
    examples, side_by_side = (400, 2) if sizes.tiny else (200, 1)
    return f"""\
evaluate: {{domains: all, examples: {examples}, samples: 4, max_new_tokens: {longest}}}
gate: {{non_inferiority_margin: 0.08, max_forgetting: 0.05}}    # of each teacher's score; of the general skill
resources: {{gpus: {sizes.gpus}, parallel_experts: {side_by_side}}}"""
