"""Evaluations and a monitor that sample with vLLM, for `tests.support.vllm_scenario`."""

import json

import torch
from peft import get_peft_model

from base.store.checkpoint import Artifact, Store
from evals.measure.evaluate import EvaluationRequest, evaluate
from evals.measure.monitor import Monitor
from experts.domain import HELD_OUT, Domain
from experts.loading import load_domain
from stages.config.distill import DistillConfig
from stages.config.evaluation import EvaluationConfig
from stages.config.on_policy import MonitorConfig
from stages.config.training import LoraConfig
from stages.learner.workspace import Workspace
from stages.model.adapters import peft_config
from stages.model.policy import load_policy
from stages.model.tiny import character_tokenizer, tiny_model
from stages.rows.trained_on import TrainedOn
from stages.sampling.samples import Sampling
from stages.vllm.engine import VllmEngine
from tests.support.chance import score_by_chance
from tests.support.vllm_scenario import SHAPE, distils, random_checkpoint

# Of the weights of a random model that draws many different tokens.
SPREAD = 0.15


def by_chance(domain: Domain) -> Domain:
    """The domain with a score that a random model reaches by chance."""
    domain.score = score_by_chance  # type: ignore[method-assign]
    return domain


def adapter_of(store: Store, base: Artifact, name: str, lora: LoraConfig, seed: int = 1) -> Artifact:
    """A committed adapter that changes what its base draws."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(SHAPE, character_tokenizer(), 0), peft_config(lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    folder = store.staging(name)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return Workspace(store, name, name, 0, {"start": base}, {}, {}).commit(
        folder, trained_on=TrainedOn(), metrics={}, adapter_base=base.key
    )


def evaluations(store: Store, lora: LoraConfig) -> dict:
    """Rows of evaluations by transformers and by vLLM, of a full checkpoint and of an adapter, on two domains."""
    base = random_checkpoint(store, "evaluated-base", 0, SPREAD)
    domains = {name: by_chance(load_domain(name, "strings", {"task": name})) for name in ("sort", "reverse")}
    found: dict = {}
    for kind, checkpoint in (("full", base), ("adapter", adapter_of(store, base, "evaluated", lora))):
        for backend in ("transformers", "vllm"):
            config = EvaluationConfig(
                examples=40, samples=8, max_new_tokens=12, temperature=0.7, batch_size=64, backend=backend
            )
            requests = []
            for name in domains:
                key = f"eval-{kind}-{backend}-{name}"
                place = Workspace(store, key, key, 0, {"checkpoint": checkpoint}, domains, {})
                requests.append(EvaluationRequest(place, config, name, HELD_OUT))
            made = evaluate(requests, checkpoint, store)
            found[f"{kind} {backend}"] = {
                artifact.manifest["domain"]: [
                    json.loads(line) for line in (artifact.path / "scores.jsonl").read_text().splitlines()
                ]
                for artifact in made
            }
            found[f"{kind} {backend} left"] = [(request.workspace.folder / "engine").exists() for request in requests]
    return found


def monitored(store: Store, config: DistillConfig) -> dict:
    """A merge whose monitor samples with the engine: its scores, the engine's greedy requests, and the student's scores
    by transformers at the end."""
    for seed, role in enumerate(("start", "teacher/sort")):
        random_checkpoint(store, role, seed, SPREAD)
    plain = distils(store, config, "plain")["digest"]
    domain = by_chance(load_domain("sort", "strings", {"task": "sort"}))
    watch = MonitorConfig(every=2, examples=30)
    asked: list[int] = []
    draw = VllmEngine.sample

    def counting(self: VllmEngine, prompts: list, group_size: int, sampling: Sampling, seed: int) -> list:
        asked.append(len(prompts) if sampling.temperature == 0 else 0)
        return draw(self, prompts, group_size, sampling, seed)

    VllmEngine.sample = counting  # type: ignore[method-assign,assignment]
    try:
        facts = distils(store, config, "monitored", monitor=Monitor({"sort": domain}, watch, config.max_new_tokens))
    finally:
        VllmEngine.sample = draw  # type: ignore[method-assign]
    student = load_policy(store.get("monitored"), store)
    return {
        "curve": [values["distill/score/sort"] for values in facts["metrics"] if "distill/score/sort" in values],
        "asked": [count for count in asked if count],
        "traceless": facts["digest"] == plain,
        "end": Monitor({"sort": domain}, watch, config.max_new_tokens)(student, 0)["score/sort"],
    }
