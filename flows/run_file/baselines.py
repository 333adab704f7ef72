"""Other ways to make one student of the same experts, with the same prompts and number of completions. Torch-free.

Each baseline takes the shared settings from the merge (steps, prompts, completions, lengths, precision, optimizer,
adapter) and its own settings from `merge.baselines.NAME`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from base.errors import UserError, nearest
from flows.run_file.keys import mistakes
from flows.run_file.schema import MergeConfig, RunConfig
from stages.config.distill import DistillConfig
from stages.config.merge import WeightMergeConfig
from stages.config.on_policy import RLConfig
from stages.config.training import SFTConfig, StrictModel, TrainConfig

WEIGHT_MERGES = ("weight_average", "task_arithmetic", "ties", "dare_linear", "dare_ties")
SEQKD, MIX_SFT, MIX_RL = "seqkd", "mix_sft", "mix_rl"
# Settings of the merge that mean something else for a stage that learns from others' completions.
_NOT_SHARED = {"objective", "sampler", "health", "monitor", "teacher_backend", "updates_per_batch"}
GROUP_SIZE = 8
_SCHEMAS: dict[str, type[StrictModel]] = {SEQKD: DistillConfig, MIX_SFT: SFTConfig, MIX_RL: RLConfig}
# Settings that define a baseline of this name.
FIXED = {SEQKD: ("objective", "on_policy_fraction", "off_policy", "teacher_weights")}


def baseline_config(config: RunConfig, name: str) -> StrictModel:
    """The stage config of a baseline in the run file.

    Raises:
        UserError: its settings are wrong.
    """
    merge = config.merge
    assert merge is not None
    settings: Mapping[str, Any] = getattr(merge.baselines, name) or {}
    fixed = ("method",) if name in WEIGHT_MERGES else FIXED.get(name, ())
    if key := next((key for key in fixed if key in settings), None):
        raise UserError(f"merge.baselines.{name}.{key}: fixed by the baseline's name; leave it out")
    schema = _SCHEMAS.get(name, WeightMergeConfig)
    try:
        if name in WEIGHT_MERGES:
            weighed = WeightMergeConfig.model_validate({"method": name, **settings})
            _check_weights(config, name, weighed)
            return weighed
        if name == SEQKD:
            return DistillConfig.model_validate({**_seqkd(merge), **settings})
        if name == MIX_SFT:
            batch = {"batch_size": merge.prompts_per_step * merge.group_size}
            return SFTConfig.model_validate({**_shared(merge, SFTConfig), **batch, **settings})
        return RLConfig.model_validate({**_mix_rl(config, merge), **settings})
    except ValidationError as error:
        raise UserError(mistakes(schema, error, f"merge.baselines.{name}.")[0]) from None


def _check_weights(config: RunConfig, name: str, own: WeightMergeConfig) -> None:
    """Check that every weight belongs to an expert in the merge: a teacher, or the start of the merge."""
    merge = config.merge
    assert merge is not None
    taken = {teacher for weights in config.teachers().values() for teacher in weights} | {merge.start_from}
    merged = [expert for expert in config.experts if expert in taken]
    if unknown := next((expert for expert in own.weights if expert not in merged), None):
        here = "an expert, but no teacher of the merge" if unknown in config.experts else "no expert of the run"
        raise UserError(f"merge.baselines.{name}.weights: '{unknown}' is {here}{nearest(unknown, merged)}")


def _seqkd(merge: MergeConfig) -> dict[str, Any]:
    """Sequence-level distillation (Kim & Rush 2016): the teachers answer every prompt, the student imitates them."""
    own = {name: getattr(merge, name) for name in DistillConfig.model_fields if name not in _NOT_SHARED}
    own.pop("teacher_weights")
    if merge.anchor:
        own["domain_weights"] = dict.fromkeys(merge.anchor.domains, merge.anchor.weight) | merge.domain_weights
    return {**own, "objective": {"type": "imitation"}, "on_policy_fraction": 0.0, "off_policy": "teacher"}


def _mix_rl(config: RunConfig, merge: MergeConfig) -> dict[str, Any]:
    """RL on all domains, with the settings of the run's first RL expert and the merge's completions per step."""
    chosen = (expert.train.chosen[1] for expert in config.experts.values() if expert.train)
    experts = (method for method in chosen if isinstance(method, RLConfig))
    template = next(experts, None)
    own: dict[str, Any] = {}
    if template is not None:
        own = {name: getattr(template, name) for name in RLConfig.model_fields if name != "monitor"}
    group = template.group_size if template else GROUP_SIZE
    prompts = max(len(config.practised()), round(merge.prompts_per_step * merge.group_size / group))
    same = {"max_steps", "examples", "lora", "dtype", "float32_matmul", "sharding", "cpu_offload"}
    same |= {"max_new_tokens", "temperature", "top_p"}
    shared = {name: value for name, value in _shared(merge, RLConfig).items() if name in same or not own}
    return {**own, **shared, "group_size": group, "prompts_per_step": prompts}


def _shared(merge: MergeConfig, schema: type[TrainConfig]) -> dict[str, Any]:
    """The settings that the merge and another stage share."""
    names = (schema.model_fields.keys() & MergeConfig.model_fields.keys()) - _NOT_SHARED
    return {name: getattr(merge, name) for name in names if name not in ("group_size", "prompts_per_step")}
