"""The peaks of device memory that earlier stages measured, by what decides them. Free of torch."""

from collections.abc import Mapping
from typing import Any

from base.hashing import stable_hash
from base.store.checkpoint import Artifact, Store

# The settings that decide a stage's memory, beside its model, its processes and its device.
DECIDING = (
    "lora", "dtype", "sharding", "gradient_checkpointing", "micro_batch_tokens", "batch_tokens", "batch_size",
    "prompts_per_step", "group_size", "max_new_tokens", "max_prompt_tokens", "sampler", "backend", "samples",
    "monitor", "reference_kl", "max_resident", "teacher_cache", "teacher_backend", "objective",
)  # fmt: skip


def settings_of(stage: str, parameters: int, config: Mapping[str, Any], processes: int, kind: str) -> str:
    """A hash of what decides a stage's memory."""
    chosen = {name: config[name] for name in DECIDING if name in config}
    optimizer = config.get("optimizer") or {}
    chosen["states"] = [optimizer.get("states", "float32"), bool(optimizer.get("paged"))]
    chosen["cpu_offload"] = bool(config.get("cpu_offload"))
    return stable_hash([stage, parameters, chosen, processes, kind])


def peaks_of(store: Store) -> dict[str, int]:
    """Settings -> the largest peak measured with them."""
    artifacts = {artifact.key: artifact for artifact in store.artifacts()}
    peaks: dict[str, int] = {}
    for artifact in artifacts.values():
        manifest = artifact.manifest
        if not isinstance(manifest.get("config"), Mapping) or "device" not in manifest:
            continue
        processes = int((manifest.get("ingredients") or {}).get("world_size", 1))
        parameters = _full_size(artifact, artifacts)
        key = settings_of(
            str(manifest.get("stage")), parameters, manifest["config"], processes, str(manifest["device"])
        )
        peaks[key] = max(peaks.get(key, 0), int(manifest.get("peak_memory") or 0))
    return peaks


def _full_size(artifact: Artifact, artifacts: Mapping[str, Artifact]) -> int:
    """Parameters of a checkpoint without its adapter; of a measurement, those of the checkpoint measured."""
    manifest = artifact.manifest
    parents = manifest.get("parents") or {}
    measured = artifacts.get((parents.get("checkpoint") or {}).get("key", ""))
    manifest = measured.manifest if measured else manifest
    base = artifacts.get(str(manifest.get("adapter_base") or ""))
    return int((base.manifest if base else manifest).get("parameters") or 0)
