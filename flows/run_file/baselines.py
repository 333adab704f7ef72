"""Other ways to make one student of the same experts, with the same prompts and number of completions. Torch-free.

Each baseline takes the shared settings from the merge (steps, prompts, completions, lengths, precision, optimizer,
adapter) and its own settings from `merge.baselines.NAME`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from base.errors import UserError, nearest
from flows.run_file.keys import mistakes
from flows.run_file.schema import MergeConfig, RunConfig
from stages.config.distill import DistillSettings
from stages.config.merge import WeightMergeConfig
from stages.config.on_policy import RLConfig
from stages.config.training import SFTConfig, StrictModel

WEIGHT_MERGES = ("weight_average", "task_arithmetic", "ties", "dare_linear", "dare_ties")
SEQKD, MIX_SFT, MIX_RL = "seqkd", "mix_sft", "mix_rl"
# What each baseline takes from the merge: the model, its data and its precision; its samples; the loss on them.
_TRAINING = (
    *("max_steps", "optimizer", "lora", "dtype", "float32_matmul", "micro_batch_tokens", "gradient_checkpointing"),
    *("sharding", "cpu_offload", "save_every", "examples", "max_prompt_tokens", "longer_prompts"),
)
_SAMPLES = ("max_new_tokens", "temperature", "top_p", "stop")
_LOSS = ("loss_normalisation", "max_domain_share", "preflight_tolerance")
_TEACHING = ("prompts_per_step", "group_size", "domain_weights", "max_resident", "teacher_cache")
_SHARED = {
    MIX_SFT: _TRAINING,
    SEQKD: (*_TRAINING, *_SAMPLES, *_LOSS, *_TEACHING),
    MIX_RL: (*_TRAINING, *_SAMPLES, *_LOSS),
}
# What `mix_rl` takes from the merge if the run has an RL expert, from which it takes all else.
_SHARED_BESIDE_RL = (
    *("max_steps", "examples", "lora", "dtype", "float32_matmul", "sharding", "cpu_offload"),
    *("max_new_tokens", "temperature", "top_p"),
)
GROUP_SIZE = 8
_SCHEMAS: dict[str, type[StrictModel]] = {SEQKD: DistillSettings, MIX_SFT: SFTConfig, MIX_RL: RLConfig}
# Settings that define a baseline of this name.
FIXED = {SEQKD: ("objective", "on_policy_fraction", "off_policy")}


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
            return DistillSettings.model_validate({**_seqkd(merge), **settings})
        if name == MIX_SFT:
            batch = {"batch_size": merge.prompts_per_step * merge.group_size}
            return SFTConfig.model_validate({**_of(merge, _SHARED[MIX_SFT]), **batch, **settings})
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
    own = _of(merge, _SHARED[SEQKD])
    if merge.anchor:
        own["domain_weights"] = dict.fromkeys(merge.anchor.domains, merge.anchor.weight) | merge.domain_weights
    return {**own, "objective": {"type": "imitation"}, "on_policy_fraction": 0.0, "off_policy": "teacher"}


def _mix_rl(config: RunConfig, merge: MergeConfig) -> dict[str, Any]:
    """RL on all domains, with the settings of the run's first RL expert and the merge's completions per step."""
    chosen = (expert.train.chosen[1] for expert in config.experts.values() if expert.train)
    template = next((method for method in chosen if isinstance(method, RLConfig)), None)
    if template is None:
        group, own = GROUP_SIZE, _of(merge, _SHARED[MIX_RL])
    else:
        group = template.group_size
        own = _of(template, [name for name in RLConfig.model_fields if name != "monitor"])
        own |= _of(merge, _SHARED_BESIDE_RL)
    prompts = max(len(config.practised()), round(merge.prompts_per_step * merge.group_size / group))
    return {**own, "group_size": group, "prompts_per_step": prompts}


def _of(config: StrictModel, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
