"""Base stage: copy an external checkpoint (Hugging Face id, local directory, GGUF file) into the store.

The checkpoint is untrusted, so none of its code is run: weights are read from safetensors or GGUF, never from a pickle.
A model with its own code is refused, unless the run file has `remote_code: true`; its code is then copied into the
store too.

Weights keep their original type (a GGUF file's are de-quantized to float32); later stages train in float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from base.errors import UserError, first_line
from base.store.checkpoint import Artifact
from base.store.foreign import check_folder
from base.store.source import Source, refuse_paths, refused_adapter
from stages.learner.workspace import Workspace
from stages.model.policy import save_tokenizer
from stages.model.remote_code import OWN_CODE
from stages.rows.trained_on import TrainedOn

# Raised by transformers, tokenizers and safetensors for files that are damaged or do not belong together.
LIBRARIES_FAULTS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, AssertionError, ArithmeticError,
    SafetensorError,
)  # fmt: skip
# Number of tensors named in a message.
SHOWN = 3


def run(source: Source, workspace: Workspace) -> Artifact:
    """Copy the checkpoint into the store.

    Raises:
        UserError: the files are no causal language model with a tokenizer, are only a pickle of one, contain code, or
            refer to weights outside of the folder.
    """
    location, arguments = _arguments(source, workspace.remote_code)
    if source.kind == "hub":
        # transformers searches the same places for an adapter.
        if find_adapter_config_file(location, revision=source.revision) is not None:
            raise UserError(refused_adapter(workspace.name, location))
    elif not Path(location).exists():
        raise UserError(f"{workspace.name}: {source.location}: no longer exists")
    elif source.kind == "directory":
        _check_directory(workspace.name, Path(location))
    else:
        refuse_paths(workspace.name, Path(location))
    model, tokenizer = _read(f"{workspace.name}: {source.location}", location, arguments)
    if source.kind == "gguf":
        model = _plain(model)
    make_writable(model)
    folder = workspace.store.staging(workspace.key)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    parameters = sum(p.numel() for p in model.parameters())
    unknown = TrainedOn(unknown=(workspace.name,))
    return workspace.commit(folder, trained_on=unknown, metrics={}, parameters=parameters, origin=source.location)


def read_checkpoint(name: str, folder: Path, remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder that another program has written.

    Args:
        name: The node, for messages.
        folder: A Hugging Face folder; untrusted.
        remote_code: Whether its own Python code may run.

    Raises:
        UserError: as for `run`.
    """
    _check_directory(name, folder)
    return _read(f"{name}: {folder}", str(folder), {"use_safetensors": True, "trust_remote_code": remote_code})


def _check_directory(name: str, folder: Path) -> None:
    refuse_paths(name, folder)
    check_folder(name, folder)


def _read(where: str, location: str, arguments: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            location, dtype="auto", output_loading_info=True, **arguments
        )
    except LIBRARIES_FAULTS as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{where}: {OWN_CODE}") from None
        raise UserError(f"{where}: not a causal language model with a tokenizer: {first_line(error)}") from error
    _require_whole(loaded, where)
    return model, tokenizer


def make_writable(model: PreTrainedModel) -> None:
    """Repair a model's generation settings: transformers reads contradictory settings that it refuses to write.

    If sampling settings come without `do_sample`, it is set. For other contradictions only the token ids are kept,
    since no stage uses any other setting.
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
    """Refuse weights that do not match the model: transformers fills missing tensors with random numbers.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message names some of them.
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
    """The same weights as an ordinary model: transformers refuses to save a de-quantized model as it is."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    plain = type(model)(type(model.config).from_dict(values))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _arguments(source: Source, remote_code: bool) -> tuple[str, dict[str, Any]]:
    if source.kind == "gguf":
        path = Path(source.location)
        return str(path.parent), {"gguf_file": path.name}
    revision = {"revision": source.revision} if source.revision else {}
    return source.location, revision | {"use_safetensors": True, "trust_remote_code": remote_code}
