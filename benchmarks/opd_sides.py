"""The two sides of `opd_step.py`: the project's own distillation step, and TRL's trainer, which runs it after
each of its own.

Both get the same checkpoints, prompts, completion length, number type, optimizer and rate, without gradient
checkpointing. Ours is the step of `stages.on_policy.loop`, metrics included; TRL's is timed from its callback before a
step to the one after it, so that neither its data loader nor its log counts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from base.store.checkpoint import Artifact, Store
from base.store.source import Source, resolve_gguf
from experts.domain import TRAIN, Domain, Example
from stages.config.distill import DistillConfig
from stages.config.training import LoraConfig, OptimizerConfig
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.load import run as import_base
from stages.model.policy import load_policy
from stages.on_policy.loop import OnPolicyTask, take_step
from stages.on_policy.objectives import distillation_objective
from stages.on_policy.rollout import PromptMixture
from stages.on_policy.signals import TeacherSignal
from stages.rows.chat import encode_prompt
from stages.teachers.scoring import Routed, TeacherPool

# Small, so that the completions' lengths are the same in all turns.
LEARNING_RATE = 1e-6
NEVER = "<|never|>"


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: As the table has it.
        batch: Completions of one step, each of a prompt of its own.
        length: Longest completion.
        fixed: Whether every completion is that long: both sides' EOS is then a token that no model can draw.
        dtype: Number type of both sides' products.
        micro_batch_tokens: Tokens of one forward and backward pass of ours; TRL's has the whole batch.
    """

    name: str
    batch: int
    length: int
    fixed: bool
    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch_tokens: int = 16384


def distill_config(case: Case) -> DistillConfig:
    """One update with the exact reverse KL, as TRL's `beta=1`."""
    return DistillConfig(
        prompts_per_step=case.batch,
        group_size=1,
        max_new_tokens=case.length,
        dtype=case.dtype,
        micro_batch_tokens=case.micro_batch_tokens,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
    )


def import_checkpoint(store: Store, location: str) -> Artifact:
    """A Hugging Face directory or a GGUF reference as an artifact of the store."""
    gguf = location.startswith("package://") or location.endswith(".gguf")
    source = resolve_gguf(location) if gguf else Source("directory", location)
    key = source.fingerprint()[:24]
    return store.find(key) or import_base(source, _workspace(store, key))


def make_teachers(store: Store, base: Artifact, number: int, lora: bool) -> list[Artifact]:
    """Teachers near a checkpoint: its weights each moved a little by random numbers, or adapters on it."""
    teachers = []
    for seed in range(number):
        key = f"{base.key}-{'adapter' if lora else 'full'}-{seed}"
        policy = load_policy(base, store, lora=LoraConfig(rank=8) if lora else None, trainable=True, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        folder = store.staging(key)
        policy.save(folder)
        facts = {"adapter_base": base.key} if lora else {}
        teachers.append(_workspace(store, key).commit(folder, trained_on=None, metrics={}, **facts))
    return teachers


def _workspace(store: Store, key: str) -> Workspace:
    return Workspace(store, key, key, 0, parents={}, domains={}, provenance={})


def draw_examples(domains: Sequence[Domain], number: int) -> dict[str, list[Example]]:
    """Prompts of all domains, the same number of each."""
    return {domain.name: domain.draw(TRAIN, number, 0) for domain in domains}


def deal(examples: Mapping[str, Sequence[Example]], parts: int) -> dict[str, list[Example]]:
    """The same prompts under as many domain names as there are parts, each a mixture of all."""
    mixed = [example for drawn in zip(*examples.values(), strict=True) for example in drawn]
    return {f"part{i}": [replace(e, domain=f"part{i}") for e in mixed[i::parts]] for i in range(parts)}


class Ours:
    """The project's step.

    Args:
        store: Where the checkpoints are.
        student: What is trained.
        teachers: By domain.
        examples: Prompts by domain.
        case: What to measure.
        folder: For files of the learner.
    """

    def __init__(
        self,
        store: Store,
        student: Artifact,
        teachers: Mapping[str, Artifact],
        examples: Mapping[str, Sequence[Example]],
        case: Case,
        folder: Path,
    ) -> None:
        self.config = distill_config(case)
        policy = load_policy(student, store, trainable=True)
        self.learner = Learner(policy, self.config, 1000, folder, 0)
        routes = {domain: (Routed(teacher),) for domain, teacher in teachers.items()}
        pool = TeacherPool(routes, store, policy, self.config)
        self.mixture = PromptMixture(examples, case.batch, {}, 0)
        self.task = OnPolicyTask(
            stage="distill",
            mixture=self.mixture,
            signal=TeacherSignal(pool),
            objective=distillation_objective(self.config, self.learner),
            progress=("reverse_kl", "lower"),
        )
        if case.fixed:
            never_end(policy.tokenizer)
            # Those that the checkpoint names end no completion either.
            policy.stop_ids = (policy.eos_id,)

    def step(self, number: int) -> dict[str, float]:
        """Take a step; returns its metrics."""
        self.learner.seed_step(number)
        return take_step(self.task, self.learner, self.config, number)[2]

    def prompts(self, number: int) -> list[str]:
        """The prompts of a step as text; tokenized they are those our step samples from."""
        tokenizer = self.learner.policy.tokenizer
        ids = [encode_prompt(tokenizer, example.prompt) for example in self.mixture.step(number)]
        texts: list[str] = tokenizer.batch_decode(ids)
        if tokenizer(texts)["input_ids"] != ids:
            raise SystemExit("the tokenizer does not read its own text as the tokens it came from")
        return texts


def never_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make EOS a token beyond the model's vocabulary: it is never drawn, and drawing costs what it did."""
    tokenizer.add_special_tokens({"eos_token": NEVER})


def _now() -> float:
    """Seconds, when the device has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns(TrainerCallback):
    """Seconds of TRL's steps and of ours, which are taken between them, and what each of the two worked on."""

    def __init__(self, ours: Callable[[int], Mapping[str, float]]) -> None:
        self.ours = ours
        self.rounds: list[dict[str, float]] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock."""
        self._started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Stop it, run ours."""
        theirs = _now() - self._started
        started = _now()
        metrics = self.ours(state.global_step)
        seconds = _now() - started
        parts = {name: metrics[f"distill/seconds/{name}"] for name in ("rollout", "signal", "update")}
        means = {"length": metrics["distill/length"], "kl": metrics["distill/reverse_kl"]}
        self.rounds.append({"ours": seconds, "trl": theirs, **parts, **means})

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **rest: Any) -> None:
        """Add TRL's length and KL."""
        if "completions/mean_length" in logs:
            self.rounds[-1] |= {"trl_length": logs["completions/mean_length"], "trl_kl": logs["loss"]}


def take_turns(ours: Ours, student: Artifact, teacher: Artifact, case: Case, rounds: int, folder: Path) -> list[dict]:
    """Train with TRL's `DistillationTrainer`, our step after each of its own; the first round warms up."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DistillationConfig, DistillationTrainer

    prompts = [text for number in range(1, rounds + 2) for text in ours.prompts(number)]
    tokenizer = AutoTokenizer.from_pretrained(student.uri, padding_side="left")
    model, taught = (AutoModelForCausalLM.from_pretrained(a.uri, dtype=torch.float32) for a in (student, teacher))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if case.fixed:
        never_end(tokenizer)
        model.generation_config.eos_token_id = None
    arguments = DistillationConfig(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=case.dtype == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=case.batch,
        max_steps=rounds + 1,
        max_completion_length=case.length,
        beta=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=ours.config.optimizer.betas[1],
        max_grad_norm=ours.config.optimizer.max_grad_norm,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    turns = Turns(ours.step)
    trainer = DistillationTrainer(
        model=model,
        teacher_model=taught,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return turns.rounds[1:]
