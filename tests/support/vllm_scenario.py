"""What vLLM does in a trainer's process, run in a process of its own: `python vllm_scenario.py FOLDER` prints facts as
JSON on its last line. `tests/integration/vllm/test_vllm_engine.py` reads them."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedConfig, Qwen3MoeConfig

import stages.distill
from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from base.store.journal import read
from experts.loading import load_domain
from flows.lineage.export import export
from stages.config.distill import DistillConfig
from stages.config.on_policy import RLConfig, SamplerConfig
from stages.config.training import LoraConfig, OptimizerConfig, TinyModelConfig
from stages.learner.workspace import Workspace
from stages.model.adapters import peft_config
from stages.model.policy import Policy, load_policy
from stages.model.tiny import character_tokenizer, tiny_model
from stages.sampling.sampler import sample
from stages.sampling.samples import Sample, Sampling
from stages.vllm.engine import VllmEngine

if TYPE_CHECKING:
    from evals.measure.monitor import Monitor

# vLLM's attention on a CPU takes heads of 32 and more.
SHAPE = TinyModelConfig(hidden_size=64, layers=2, heads=2, intermediate_size=64, max_length=128)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [30] * 20]
LONG = [[5 + i] * 100 for i in range(12)]
UPDATES = 3
VLLM = SamplerConfig(backend="vllm", memory_share=0.1)


def make_policy(lora: LoraConfig | None) -> Policy:
    """A random tiny model with sharp distributions, full or with an adapter."""
    tokenizer = character_tokenizer()
    model = tiny_model(SHAPE, tokenizer, 3).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(4.0)
    return Policy(model if lora is None else get_peft_model(model, peft_config(lora)).eval(), tokenizer)


def move(policy: Policy) -> None:
    """An update, as far as an engine can tell."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                spread = parameter.std() if parameter.std() > 0 else 0.02
                parameter.add_(0.3 * spread * torch.randn_like(parameter))


def gap(policy: Policy, groups: list[list[Sample]], temperature: float) -> float:
    """The largest difference of the samples' log-probabilities from the policy's own forward."""
    return max(float((drawn.logprobs_N - own(policy, drawn, temperature)).abs().max()) for g in groups for drawn in g)


def own(policy: Policy, drawn: Sample, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = policy.model(torch.tensor([drawn.tokens])).logits[0] / (temperature or 1.0)
    logprobs_NV = logits_TV.log_softmax(-1)[len(drawn.prompt_ids) - 1 : -1]
    return logprobs_NV.gather(1, torch.tensor(drawn.completion_ids)[:, None]).squeeze(1)


def tokens(groups: list[list[Sample]]) -> list[list[list[int]]]:
    return [[drawn.completion_ids for drawn in group] for group in groups]


def cut_by_a_string(policy: Policy, greedy: list[list[Sample]], longest: int) -> tuple[Sampling, list[list[Sample]]]:
    """Greedy sampling that ends at two characters of the first completion, and what it draws in the trainer's process;
    at least that completion is cut."""
    (text,) = policy.texts([greedy[0][0].completion_ids])
    cut = Sampling(longest, 0.0, stop=(text[5:7], "never written"))
    own = sample(policy, PROMPTS, 1, cut, 0)
    assert own[0][0].finished
    assert len(own[0][0].completion_ids) < len(greedy[0][0].completion_ids)
    return cut, own


def ends(groups: list[list[Sample]]) -> list[list[bool]]:
    return [[drawn.finished for drawn in group] for group in groups]


def make_moe(architecture: type[PreTrainedConfig], **experts: int) -> Policy:
    """A random mixture of four experts, of which a token takes two."""
    tokenizer = character_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"head_dim": 32, "intermediate_size": 64, "max_position_embeddings": 128, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = architecture(vocab_size=len(tokenizer), num_experts_per_tok=2, **shape, **ids, **experts)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return Policy(model, tokenizer)


def experts_follow(folder: Path, policy: Policy) -> list[float]:
    """Gaps of an engine that is handed a mixture of experts three times."""
    engine = VllmEngine(policy, RLConfig(sampler=VLLM), folder)
    gaps = []
    for update in range(3):
        engine.update_weights(policy, update)
        gaps.append(gap(policy, engine.sample(PROMPTS, 4, Sampling(16), 1), 1.0))
        move(policy)
    engine.close()
    return gaps


def refuses(folder: Path) -> dict:
    """What an engine says that was given weights of another shape, and after a load that failed."""
    policy = make_policy(None)
    engine = VllmEngine(policy, RLConfig(sampler=VLLM), folder)
    said: dict = {}

    def note(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except UserError as error:
            said[name] = str(error)

    def draw() -> list[list[Sample]]:
        return engine.sample(PROMPTS, 4, Sampling(16), 1)

    note("nothing given", draw)
    engine.update_weights(policy, 0)
    tokenizer = character_tokenizer()
    other = Policy(tiny_model(SHAPE.model_copy(update={"intermediate_size": 96}), tokenizer, 5), tokenizer)
    note("shape", lambda: engine.update_weights(other, 1))
    note("after shape", draw)
    engine.update_weights(policy, 2)
    said["gap"] = gap(policy, draw(), 1.0)
    load = engine.engine.collective_rpc

    def half(method: str, kwargs: dict) -> object:
        """Half of the tensors, and then no more."""
        whole = list(kwargs["tensors"])

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from whole[: len(whole) // 2]
            raise OSError("the rest is gone")

        return load(method, kwargs={"tensors": tensors()})

    engine.engine.collective_rpc = half
    move(policy)
    note("half", lambda: engine.update_weights(policy, 3))
    engine.engine.collective_rpc = load
    note("after half", draw)
    note("again", lambda: engine.update_weights(policy, 4))
    note("after again", draw)
    engine.close()
    return said


def follows(folder: Path, lora: LoraConfig | None) -> Iterator[dict]:
    """Sample, move the weights, sample: what the engine says before and after it follows."""
    policy = make_policy(lora)
    config = DistillConfig(lora=lora, temperature=0.7, sampler=VLLM)
    engine = VllmEngine(policy, config, folder)
    greedy, warm = Sampling(16, 0.0), Sampling(16, 0.7)
    for update in range(UPDATES + 1):
        engine.update_weights(policy, update)
        chosen = engine.sample(PROMPTS, 1, greedy, 0)
        drawn = engine.sample(PROMPTS, 4, warm, 1)
        cut, own_cut = cut_by_a_string(policy, chosen, 16)
        cut_here = engine.sample(PROMPTS, 1, cut, 0)
        facts = {
            "cut": tokens(cut_here) == tokens(own_cut) and ends(cut_here) == ends(own_cut),
            "cut_gap": gap(policy, cut_here, 0.0),
            "greedy": tokens(chosen) == tokens(sample(policy, PROMPTS, 1, greedy, 0)),
            "greedy_gap": gap(policy, chosen, 0.0),
            "gap": gap(policy, drawn, 0.7),
            "repeats": tokens(drawn) == tokens(engine.sample(PROMPTS, 4, warm, 1)),
            "nothing": engine.sample([], 4, warm, 1),
            # More to read in all than one forward pass takes.
            "long_gap": gap(policy, engine.sample(LONG, 8, Sampling(8, 0.7), 2), 0.7),
            "distinct": len({tuple(one.completion_ids) for one in drawn[0]}),
            "ended": all(
                one.finished == (len(one.completion_ids) < 16 or one.completion_ids[-1] == policy.eos_id)
                and policy.eos_id not in one.completion_ids[:-1]
                for g in drawn
                for one in g
            ),
        }
        move(policy)
        yield facts | {"stale_gap": gap(policy, drawn, 0.7)}
    engine.close()


def contexts(folder: Path) -> dict:
    """The context of an engine that was given the longest prompt, of a model that takes more."""
    policy = make_policy(None)
    policy.model.config.max_position_embeddings = 8192
    found = {}
    for longest in (600, None):
        engine = VllmEngine(policy, RLConfig(sampler=VLLM, max_new_tokens=64), folder, longest)
        settings = engine.engine.llm_engine.vllm_config
        found[str(longest)] = [
            engine.engine.model_config.max_model_len,
            settings.cache_config.kv_cache_memory_bytes,
            settings.scheduler_config.max_num_batched_tokens,
        ]
        engine.close()
    return found


def distils(
    store: Store, config: DistillConfig, key: str, deaf: bool = False, monitor: "Monitor | None" = None
) -> dict:
    """A short merge: its metrics and notes; `deaf` lets the engine follow only once and say that it always did."""
    parents = {role: random_checkpoint(store, role, seed) for seed, role in enumerate(("start", "teacher/sort"))}
    place = Workspace(store, key, key, 0, parents, {"sort": load_domain("sort", "strings", {"task": "sort"})}, {})
    follow = VllmEngine.update_weights

    def claim(self: VllmEngine, policy: Policy, version: int) -> None:
        if self._has_base:
            self._version = version
        else:
            follow(self, policy, version)

    if deaf:
        VllmEngine.update_weights = claim
    try:
        student = stages.distill.train(config, place, monitor)
    finally:
        VllmEngine.update_weights = follow
    records = list(read(place.folder / "journal.jsonl"))
    return {
        "digest": student.digest,
        "metrics": metrics_of(store, key),
        "notes": [record["text"] for record in records if record["kind"] == "note"],
        "left": [path.name for path in place.folder.iterdir()],
    }


def metrics_of(store: Store, key: str) -> list[dict]:
    """What a stage has logged so far."""
    records = read(store.work(key) / "journal.jsonl")
    return [record["values"] for record in records if record["kind"] == "metrics"]


def exported(store: Store, folder: Path, lora: LoraConfig) -> bool:
    """Whether an adapter that was exported gives plain vLLM the tokens of the policy it was."""
    from vllm import LLM, SamplingParams

    policy = make_policy(lora)
    start = random_checkpoint(store, "shared", 3)
    policy.adapter_base = start.key
    move(policy)
    staged = store.staging("adapter")
    policy.save(staged)
    place = Workspace(store, "adapter", "experts/sort", 0, {"start": start}, {}, {})
    adapter = place.commit(staged, trained_on=None, metrics={}, adapter_base=start.key)
    export(store, "adapter", folder)
    engine = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=2**26)
    told = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], SamplingParams(temperature=0, max_tokens=16))
    meant = sample(load_policy(adapter, store), PROMPTS, 1, Sampling(16, 0.0), 0)
    return [list(each.outputs[0].token_ids) for each in told] == [group[0].completion_ids for group in meant]


def random_checkpoint(store: Store, name: str, seed: int, spread: float | None = None) -> Artifact:
    """A committed model of random weights; with a wide `spread` it draws many different tokens."""
    key = name.replace("/", "-")
    if found := store.find(key):
        return found
    folder = store.staging(key)
    tokenizer = character_tokenizer()
    model = tiny_model(SHAPE, tokenizer, seed)
    for parameter in model.parameters():
        if spread is not None and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder)
    return Workspace(store, key, name, 0, {}, {}, {}).commit(folder, trained_on=None, metrics={})


def main() -> None:
    from tests.support.vllm_measures import evaluations, monitored

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # Of a rank that vLLM does not know by itself.
    lora = LoraConfig(rank=12)
    facts = {"full": list(follows(folder / "full", None)), "lora": list(follows(folder / "lora", lora))}
    config = DistillConfig(
        max_steps=4,
        examples=40,
        prompts_per_step=6,
        max_new_tokens=8,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        sampler=VLLM,
        health={"window": 1},
    )
    store = Store(folder)
    facts["moe"] = {
        "qwen3": experts_follow(folder / "moe", make_moe(Qwen3MoeConfig, num_experts=4, moe_intermediate_size=64)),
        "glm4": experts_follow(
            folder / "moe",
            make_moe(Glm4MoeConfig, n_routed_experts=4, moe_intermediate_size=64, first_k_dense_replace=1),
        ),
    }
    facts["contexts"] = contexts(folder / "contexts")
    facts["refuses"] = refuses(folder / "refuses")
    facts["merge"] = distils(store, config, "merge")
    facts["exported"] = exported(store, folder / "exported", lora)
    facts["merge_again"] = distils(store, config, "merge-again")
    facts["monitored"] = {
        "full": monitored(Store(folder / "monitored"), config),
        "adapter": monitored(Store(folder / "adapters"), config.model_copy(update={"lora": lora})),
    }
    facts["evaluations"] = evaluations(store, lora)
    try:
        distils(store, config, "deaf", deaf=True)
    except UserError as error:
        facts["deaf"] = {"error": str(error), "steps": len(metrics_of(store, "deaf"))}
    sys.stdout.write(f"{json.dumps(facts)}\n")


if __name__ == "__main__":
    main()
