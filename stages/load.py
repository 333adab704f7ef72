"""Base stage: bring a checkpoint made elsewhere (Hugging Face id, local directory, GGUF file) into the store.

It may come from anybody, so nothing in it is run: weights are read from safetensors or GGUF, never from a pickle, and a
model that brings its own code is refused, unless the run file says `remote_code: true`; then that code goes into the
store with it.

Weights are kept in the type they come in (a GGUF file's are de-quantized to float32); later stages train in float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from base.errors import UserError, first_line
from base.store.checkpoint import Artifact
from base.store.foreign import check_folder
from base.store.source import Source, refuse_paths, refused_adapter
from stages.learner.workspace import Workspace
from stages.model.policy import save_tokenizer
from stages.model.remote_code import OWN_CODE, options
from stages.rows.trained_on import TrainedOn

# What transformers, tokenizers and safetensors raise of files that are damaged or do not belong together.
LIBRARIES_FAULTS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, AssertionError, ArithmeticError,
    SafetensorError,
)  # fmt: skip
# Tensors named in a message.
SHOWN = 3


def run(source: Source, workspace: Workspace) -> Artifact:
    """Copy the checkpoint into the store.

    Raises:
        UserError: the files are no causal language model with a tokenizer, or only a pickle of one, or bring code, or
            name weights elsewhere.
    """
    location, arguments = _arguments(source)
    if source.kind == "hub":
        # It looks where transformers will.
        if find_adapter_config_file(location, revision=source.revision) is not None:
            raise UserError(refused_adapter(workspace.name, location))
    else:
        if not Path(location).exists():
            raise UserError(f"{workspace.name}: {source.location}: there is nothing of this name any more")
        refuse_paths(workspace.name, Path(location))
        if source.kind == "directory":
            check_folder(workspace.name, Path(location))
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            location, dtype="auto", output_loading_info=True, **arguments
        )
    except LIBRARIES_FAULTS as error:
        name = workspace.name
        if "trust_remote_code" in str(error):
            raise UserError(f"{name}: {source.location}: {OWN_CODE}") from None
        raise UserError(
            f"{name}: {source.location}: not a causal language model with a tokenizer: {first_line(error)}"
        ) from error
    _require_whole(loaded, f"{workspace.name}: {source.location}")
    if source.kind == "gguf":
        model = _plain(model)
    make_writable(model)
    folder = workspace.store.staging(workspace.key)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    parameters = sum(p.numel() for p in model.parameters())
    unknown = TrainedOn(unknown=(workspace.name,))
    return workspace.commit(folder, trained_on=unknown, metrics={}, parameters=parameters, origin=source.location)


def make_writable(model: PreTrainedModel) -> None:
    """Let transformers write a model's generation settings: it reads contradictions that it refuses to write.

    Settings of sampling without `do_sample` are those of a model that samples; of other contradictions only the ids
    of tokens are kept, which alone decide anything here.
    """
    generation = model.generation_config
    if generation is None or _is_writable(generation):
        return
    generation.do_sample = True
    if not _is_writable(generation):
        ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


def _is_writable(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def _require_whole(loaded: Mapping[str, Any], where: str) -> None:
    """Refuse weights that are not the model's: transformers fills what is missing with random numbers.

    Raises:
        UserError: names missing and unexpected tensors, and those of another shape.
    """
    shapes = sorted(str(each[0]) if isinstance(each, tuple) else str(each) for each in loaded["mismatched_keys"])
    kinds = {
        "missing": sorted(loaded["missing_keys"]),
        "unexpected": sorted(loaded["unexpected_keys"]),
        "of another shape than its config gives": shapes,
    }
    faults = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if faults:
        raise UserError(f"{where}: its weights are not those of its config: tensors {'; '.join(faults)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights as an ordinary model: a de-quantized one still counts as quantized and refuses to be saved."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    plain = type(model)(type(model.config).from_dict(values))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _arguments(source: Source) -> tuple[str, dict[str, Any]]:
    if source.kind == "gguf":
        path = Path(source.location)
        return str(path.parent), {"gguf_file": path.name}
    revision = {"revision": source.revision} if source.revision else {}
    return source.location, revision | {"use_safetensors": True} | options()
