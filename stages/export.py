"""Export a stored checkpoint as a plain Hugging Face directory for other programs: adapters merged, safetensors."""

from pathlib import Path
from typing import Literal, get_args

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from base.errors import UserError, nearest
from base.store.checkpoint import Artifact, Store
from stages.model.policy import save_tokenizer
from stages.rows.chat import generation_stops, stop_ids

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(DType)
PROBE_TOKENS = 16
READABLE = 0o644


def export_weights(
    checkpoint: Artifact, store: Store, folder: Path, dtype: str = "auto", remote_code: bool = False
) -> int:
    """Write weights, configuration, tokenizer and chat template of a checkpoint, then read them back as a check.

    An adapter is added to its base in float32 and then cast.

    Args:
        checkpoint: A stored checkpoint, full or adapter.
        store: Holds an adapter's base.
        folder: The target; exists and is empty.
        dtype: Type of the weights; `auto` is that of the checkpoint, for an adapter that of its base.
        remote_code: Whether the checkpoint's own Python code may run.

    Returns:
        The number of parameters.

    Raises:
        UserError: `dtype` is not valid; or the written files do not give the checkpoint's logits.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype: '{dtype}' is none of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    disable_progress_bar()
    base = checkpoint.manifest.get("adapter_base")
    root = store.get(base) if base else checkpoint
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.uri, trust_remote_code=remote_code)
    model = AutoModelForCausalLM.from_pretrained(root.uri, dtype="auto", trust_remote_code=remote_code)
    kept = model.dtype if dtype == "auto" else getattr(torch, dtype)
    if base:
        model = with_adapter(model, checkpoint.uri)
    generation = model.generation_config
    if generation is not None and tokenizer.eos_token_id is not None:
        before = generation.eos_token_id
        generation.eos_token_id = generation_stops(before, stop_ids(tokenizer, before))
    cast_parameters(model.eval(), kept)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(READABLE)  # safetensors makes files that only their owner can read
    _check(model, tokenizer, folder, remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def with_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """A base with the adapter in a folder added to its weights, in float32."""
    merged: PreTrainedModel = PeftModel.from_pretrained(model.float(), adapter).merge_and_unload(safe_merge=True)
    return merged


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters, in place; the buffers of rotary positions keep their type."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, remote_code: bool) -> None:
    """Check that the written files load as the intended model and tokenizer.

    Raises:
        UserError: they do not.
    """
    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=remote_code
    ).eval()
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    if read.get_vocab() != tokenizer.get_vocab() or read.chat_template != tokenizer.chat_template:
        raise UserError(f"{folder}: the written tokenizer does not load as the checkpoint's own")
    tokens_1T = torch.arange(min(PROBE_TOKENS, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        expected_1TV, found_1TV = (each(input_ids=tokens_1T, use_cache=False).logits for each in (model, again))
    if not torch.equal(expected_1TV, found_1TV):
        raise UserError(f"{folder}: the written weights do not give the checkpoint's logits")
