"""A policy: a causal language model with its tokenizer, full or as an adapter on a shared base.

Shape suffixes: B sequences, T tokens, H hidden, V vocabulary.

A forward pass stops at the hidden states. Losses and samplers compute logits from them and the output head, chunk by
chunk (`chunked_token_loss` in `stages.losses.chunked`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from stages.config.training import LoraConfig
from stages.model.adapters import peft_config
from stages.model.architecture import Masks, logit_scale, unsupported
from stages.model.kernels import use_kernels
from stages.model.precision import Dtype, as_factor, narrow, precision
from stages.model.stop_strings import before_stop
from stages.model.tokenizers import tokens_beyond
from stages.rows.chat import decode_completions, generation_stops, stop_ids

TOKENIZER_CONFIG = "tokenizer_config.json"
# Tokens of the row on which a loaded model's logits are compared with ours.
PROBE_TOKENS = 8
# Fields in which transformers records how a tokenizer was loaded, and which it never reads again. They depend on the
# machine, its environment and the path, and a digest must not.
_READ_WITH = {
    "cache_dir",
    "force_download",
    "gguf_file",
    "is_local",
    "local_files_only",
    "name_or_path",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_safetensors",
}


@dataclass
class Policy:
    """A model with its tokenizer.

    Attributes:
        model: A causal language model, wrapped by peft if it has an adapter.
        tokenizer: Its tokenizer; has an EOS and a pad token.
        adapter_base: Key of the full checkpoint under the adapter; None for a full model.
        dtype: Number type of the model's products; see `compute_in`.
        remote_code: Whether the Python code of checkpoints that are used with this one may run.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    adapter_base: str | None = None
    dtype: Dtype = "float32"
    remote_code: bool = False

    def compute_in(self, dtype: Dtype) -> None:
        """Multiply in `dtype` from now on, in samplers, losses and measurements alike; in bfloat16 frozen weights of
        linear layers are kept in it."""
        self.dtype = dtype
        if dtype == "bfloat16":
            narrow(self.model)

    @property
    def eos_id(self) -> int:
        """The tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, ascending: those of the generation config, EOS, and the template's end of
        turn. Every sampler stops at each of them.
        """
        generation = causal_lm(self.model).generation_config
        return stop_ids(self.tokenizer, None if generation is None else generation.eos_token_id)

    @cached_property
    def barred_ids(self) -> tuple[int, ...]:
        """Rows of the vocabulary that are no token of the tokenizer, such as padding; no sampler draws them.

        Losses include them: exact divergences compare the whole distributions of student and teacher.
        """
        tokens = set(self.tokenizer.get_vocab().values())
        return tuple(row for row in range(self.head_VH.shape[0]) if row not in tokens)

    @property
    def context(self) -> int | None:
        """The most tokens of a prompt and its completion together; None if the config sets no limit."""
        limit: int | None = getattr(causal_lm(self.model).config.get_text_config(), "max_position_embeddings", None)
        return limit

    def texts(self, completions: Iterable[Sequence[int]], stop: Sequence[str] = ()) -> list[str]:
        """The text of completions, without the stop token or stop string that ends each, and without control tokens."""
        decoded = decode_completions(self.tokenizer, completions, self.stop_ids)
        return [before_stop(text, stop) for text in decoded]

    @property
    def pad_id(self) -> int:
        """The padding token of a batch; never attended to, never scored."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return head_weight(self.model).device

    @property
    def head_VH(self) -> Tensor:
        """Weight of the output head; shared with the input embedding in tied models."""
        return head_weight(self.model)

    @property
    def size(self) -> int:
        """Number of parameters, without those of teachers' adapters on a shared base."""
        named = self.model.named_parameters()
        return sum(p.numel() for name, p in named if ".lora_" not in name or ".default." in name)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write weights (or the adapter alone), config and tokenizer as a Hugging Face directory.

        Args:
            folder: The target folder.
            weights: All parameters by name, if the model holds only shards of them.
        """
        if isinstance(self.model, PeftModel):
            # peft records the directory of the base; the key does not depend on the store's location.
            shape = self.model.peft_config["default"]
            shape.base_model_name_or_path = self.adapter_base
            # peft keeps a set. Its order differs from process to process, and would change the digest.
            if isinstance(shape.target_modules, set):
                shape.target_modules = sorted(shape.target_modules)
            # Only the student's own adapter: a shared base may have teachers' adapters too.
            self.model.save_pretrained(
                folder, save_embedding_layers=False, selected_adapters=["default"], state_dict=weights
            )
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        save_tokenizer(self.tokenizer, folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


class HiddenStates(nn.Module):
    """The policy without its head; data-parallel wrappers wrap this module, because gradients flow through its
    forward pass."""

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: Dtype = "float32") -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self._masks = Masks.of(causal_lm(model).config)

    def forward(self, tokens_BT: Tensor, bounds_S: Tensor | None = None) -> Tensor:
        """Return hidden states [B, T, H] of right-padded tokens, in the type in which the head multiplies them.

        Args:
            tokens_BT: One row per line, with padding on the right, which causality hides; or packed rows.
            bounds_S: Where rows and fillings begin, if rows are packed; see `stages.rows.packing.Packed`.
        """
        mask, positions_BT = None, None
        with precision(tokens_BT.device, self.dtype):
            if bounds_S is not None:
                mask, positions_BT = self._masks.of_rows(bounds_S, *tokens_BT.shape)
            output = causal_lm(self.model).get_decoder()(
                input_ids=tokens_BT, position_ids=positions_BT, attention_mask=mask, use_cache=False
            )
            return as_factor(scaled(self.model, output.last_hidden_state), self.dtype)


def scaled(model: PreTrainedModel | PeftModel, hidden_BTH: Tensor) -> Tensor:
    """Hidden states whose product with the head's weight are the logits: they include the model's scale of logits."""
    scale = logit_scale(causal_lm(model).config)
    return hidden_BTH if scale == 1.0 else hidden_BTH * scale


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, identical on every machine."""
    tokenizer.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in values.items() if name not in _READ_WITH}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model itself, adapters in place."""
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def head_weight(model: PreTrainedModel | PeftModel) -> Tensor:
    """The output head's weight [V, H]."""
    weight: Tensor = causal_lm(model).get_output_embeddings().weight
    return weight


def load_policy(
    checkpoint: Artifact,
    store: Store,
    *,
    lora: LoraConfig | None = None,
    trainable: bool = False,
    seed: int = 0,
    remote_code: bool = False,
) -> Policy:
    """Load a checkpoint in float32, for inference or as the start of a training stage.

    A full checkpoint with `lora` gets a new adapter; an adapter with `lora` continues training on its own base; an
    adapter without `lora` is merged into its base if it is to be trained in full.

    Args:
        checkpoint: A stored checkpoint, full or adapter.
        store: Holds an adapter's base.
        lora: Shape of the adapter to train.
        trainable: Whether the policy will be trained.
        seed: Seed of a new adapter's weights.
        remote_code: Whether the checkpoint's own Python code may run.

    Raises:
        UserError: see `check_head`; or no module of the model matches `lora.target_modules`; or the checkpoint contains
            code that may not be run.
    """
    base = checkpoint.manifest.get("adapter_base")
    root = store.get(base) if base else checkpoint
    try:
        model = AutoModelForCausalLM.from_pretrained(root.uri, dtype=torch.float32, trust_remote_code=remote_code)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.uri, trust_remote_code=remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{checkpoint.name}: it contains code of its own, which this run file does not permit; to run it set "
            f"`remote_code: true`"
        ) from None
    use_kernels(model)
    if base:
        model = PeftModel.from_pretrained(model, checkpoint.uri, is_trainable=trainable and lora is not None)
        if trainable and lora is None:
            # peft froze the base, and merging does not unfreeze it.
            model, base = model.merge_and_unload().requires_grad_(True), None
    elif lora:
        torch.manual_seed(seed)
        try:
            model = get_peft_model(model, peft_config(lora))
        except ValueError as error:
            raise UserError(f"{checkpoint.name}: lora.target_modules {lora.target_modules!r}: {error}") from error
        base = checkpoint.key
    if not trainable:
        model.requires_grad_(False)
    model.eval()
    policy = Policy(model, tokenizer, base, remote_code=remote_code)
    check_head(policy, checkpoint)
    if (generation := causal_lm(model).generation_config) is not None:
        generation.eos_token_id = generation_stops(generation.eos_token_id, policy.stop_ids)
    return policy


def check_head(policy: Policy, checkpoint: Artifact) -> None:
    """Check that logits are the hidden states times the head's weight, as all chunked losses assume.

    Raises:
        UserError: the tokenizer has no EOS or ids beyond the embedding, the head has an adapter, or the architecture
            is not supported.
    """
    name = checkpoint.name
    if policy.tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no EOS token, so a completion could never end")
    model = causal_lm(policy.model)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"{name}: lora.target_modules puts an adapter on the output head, but losses read the head's weight "
            f"without adapters; leave the head out, as 'all-linear' does"
        )
    if (fault := unsupported(model.config)) is not None:
        raise UserError(f"{name}: {type(model).__name__} {fault}")
    rows = model.get_input_embeddings().weight.shape[0]
    if beyond := tokens_beyond(policy.tokenizer.get_vocab(), rows):
        raise UserError(f"{name}: {beyond}")
    # Ordinary tokens: in many models the embedding of padding is zero, and all compared values would be zero too.
    tokens_BT = torch.linspace(0, rows - 1, min(rows, PROBE_TOKENS), device=policy.device).long()[None]
    with torch.no_grad():
        logits_BTV = policy.model(input_ids=tokens_BT, use_cache=False).logits
        shorter_BTV = policy.model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        ours_BTV = HiddenStates(policy.model)(tokens_BT) @ policy.head_VH.T
    tolerated = 1e-3 * float(logits_BTV.std())
    if not torch.allclose(logits_BTV[:, :-1], shorter_BTV, rtol=1e-3, atol=tolerated):
        raise UserError(f"{name}: {type(model).__name__} attends to later tokens; causal language models are supported")
    if not torch.allclose(logits_BTV, ours_BTV, rtol=1e-3, atol=tolerated):
        raise UserError(
            f"{name}: {type(model).__name__} does more to its logits than a linear head without bias and a scale; such "
            f"architectures are not supported"
        )
