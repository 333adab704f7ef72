"""A stored checkpoint's full weights, one tensor at a time."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from base.errors import UserError
from base.store.checkpoint import STAGING, Artifact, Store
from stages.model.policy import load_policy

# Names of a layer's factors in an adapter's file; in a model the adapter's name precedes the suffix.
_FACTOR = re.compile(r"(\.lora_(?:embedding_)?[AB])(\.weight)?$")


class StoredWeights:
    """The weights of a checkpoint by name, read on demand; for an adapter, its base's weights with its deltas added.

    Names are those of the model's parameters. If the files have other names (transformers joins the experts of a
    mixture into one tensor when it loads them), the checkpoint is loaded once and written to a temporary file under the
    model's names.

    Args:
        checkpoint: A stored checkpoint, full or adapter.
        store: Holds an adapter's base.
        remote_code: Whether the checkpoint's own Python code may run.

    Attributes:
        shapes: Shape of every tensor.
        config: The model's config, as in `config.json`.

    Raises:
        UserError: there are no safetensors files; or the adapter has tensors that are no low-rank factors, or changes a
            weight that its base does not have.
    """

    def __init__(self, checkpoint: Artifact, store: Store, remote_code: bool = False) -> None:
        base = checkpoint.manifest.get("adapter_base")
        root = store.get(base) if base else checkpoint
        config = AutoConfig.from_pretrained(root.uri, trust_remote_code=remote_code)
        self.config: Mapping[str, Any] = config.to_dict()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in sorted(root.path.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                self._files |= dict.fromkeys(names, path)
                self.shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        if not self._files:
            raise UserError(f"{checkpoint.name}: no weights in {root.uri} (*.safetensors)")
        self._adapters: dict[str, LoraLayer] = {}
        if not self._files.keys() <= _parameter_names(config, remote_code):
            self._rename(checkpoint, store, remote_code)
            return
        self._adapters = _adapters(checkpoint, config, remote_code) if base else {}
        if strange := sorted(self._adapters.keys() - self._files.keys()):
            raise UserError(f"{checkpoint.name}: its adapter changes {strange[0]}, which its base does not hold")

    def _rename(self, checkpoint: Artifact, store: Store, remote_code: bool) -> None:
        """Write a temporary file with the model's own names and merged adapters, and read from it."""
        staging = store.root / STAGING
        staging.mkdir(exist_ok=True)
        # `mopd gc` keeps folders of this name while this process runs.
        self._folder = TemporaryDirectory(dir=staging, prefix=f"{checkpoint.key}-", suffix=f".{os.getpid()}.mirror")
        path = Path(self._folder.name) / "model.safetensors"
        # A tied tensor is written once, under one of its names.
        loaded = load_policy(checkpoint, store, trainable=True, remote_code=remote_code)
        whole = {tensor.data_ptr(): (name, tensor) for name, tensor in loaded.model.state_dict().items()}
        named = {name: tensor.contiguous() for name, tensor in whole.values()}
        save_file(named, path)
        self._files = dict.fromkeys(named, path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}

    def read(self, name: str) -> Tensor:
        """One tensor in float32, in its own memory."""
        # Opened for each tensor: an open file stays mapped, and with it all data ever read from it.
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).to(torch.float32, copy=True)
        if name in self._adapters:
            tensor += self._adapters[name].get_delta_weight("default").float()
        return tensor


def _parameter_names(config: PreTrainedConfig, remote_code: bool) -> set[str]:
    """The names of the tensors of a config's model, which is built without memory."""
    with torch.device("meta"):
        return set(AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code).state_dict())


def _adapters(checkpoint: Artifact, config: PreTrainedConfig, remote_code: bool) -> dict[str, LoraLayer]:
    """The adapter's layers by the name of the weight that each changes; their base is built without memory."""
    weights = load_peft_weights(checkpoint.uri, device="cpu")
    if strange := [name for name in weights if not _FACTOR.search(name)]:
        raise UserError(f"{checkpoint.name}: its adapter holds {strange[0]}, which is not a low-rank factor")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code)
    wrapped = PeftModel(model, PeftConfig.from_pretrained(checkpoint.uri), low_cpu_mem_usage=True)
    # peft's own loading would move them to the base's device, which is `meta`.
    named = {_FACTOR.sub(r"\1.default\2", name): tensor for name, tensor in weights.items()}
    if strange := wrapped.load_state_dict(named, strict=False, assign=True).unexpected_keys:
        raise UserError(f"{checkpoint.name}: its adapter holds {strange[0]}, for which its base has no place")
    modules = wrapped.get_base_model().named_modules()
    return {f"{name}.weight": module for name, module in modules if isinstance(module, LoraLayer)}
