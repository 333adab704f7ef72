"""The terms of a stage's memory on one device, in bytes: one function each, for the code as it is. Free of torch.

Parameters, gradients and AdamW's moments are float32. Activations are the tensors that autograd keeps of a decoder
with RMS norms and a gated feed-forward layer, with attention that keeps its inputs and outputs but no square of scores
(FlashAttention, Dao et al. 2022, arXiv:2205.14135); `tests/numerics/test_memory_terms.py` compares the terms with what
is allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from flows.engines.shapes import Shape
from stages.config.chunks import CHUNK_BYTES

FLOAT, NARROW = 4, 2
# Values of an 8-bit moment with one float32 scale (`stages.learner.optimizer`).
QUANTISED = 256
# Tensors of the size of one chunk's logits that live at one time (`stages.losses.chunked`): logits, their
# log-probabilities, both gradients and a temporary; with a teacher also its logits and log-probabilities. `shift` has
# no gradients, but both models' logits before and after their division by the temperature.
LOGIT_COPIES, TAUGHT_COPIES, SHIFT_COPIES = 5, 8, 9
# Completions sampled together by the sampler in the trainer's process (`stages.sampling.samples`), and prompt tokens of
# one of its prefills (`stages.sampling.cache`).
MOST_ROWS, PREFILL_TOKENS = 512, 16384
# Tokens of one forward pass of `shift`.
SHIFT_TOKENS = 16384
# Float32 tensors of the size of the logits of a row's tokens that a vLLM server makes to score them: the logits, their
# log-probabilities, and the comparisons of their ranks.
SCORED_COPIES = 3
# Logits of the rows that draw a token: logits, probabilities, log-probabilities.
DRAWN_COPIES = 3
# Assumed tokens of an SFT row and of a prompt, which no setting limits.
ROW_TOKENS, PROMPT_TOKENS = 1024, 512


@dataclass(frozen=True)
class Trained:
    """What the terms of a training stage depend on.

    Attributes:
        shape: The model.
        config: The stage's settings.
        processes: Processes that train together.
        teachers: Full checkpoints that are in memory beside the student's, and output heads beside those.
        monitored: Completions of the monitor.
        chunk_bytes: Float32 logits of one chunk of tokens.
        on_device: Whether it runs on a GPU.
    """

    shape: Shape
    config: Mapping[str, Any]
    processes: int = 1
    teachers: tuple[int, int] = (0, 0)
    monitored: int = 0
    chunk_bytes: int = CHUNK_BYTES
    on_device: bool = False

    @property
    def shards(self) -> int:
        """Devices over which weights and optimizer state are split."""
        return self.processes if self.sharded else 1

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 splits the weights."""
        return self.config.get("sharding") == "fsdp" and self.processes > 1

    @property
    def offloaded(self) -> bool:
        """Whether the shards of weights, gradients and optimizer state are in the host's memory."""
        return self.sharded and bool(self.config.get("cpu_offload"))

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """The optimizer's settings."""
        found: Mapping[str, Any] = self.config.get("optimizer") or {}
        return found

    @property
    def paged(self) -> bool:
        """Whether the optimizer's state may move to the host's memory."""
        return self.on_device and bool(self.optimizer.get("paged"))

    @property
    def narrow(self) -> bool:
        """Whether autocast computes in bfloat16."""
        return self.config.get("dtype") == "bfloat16"

    @property
    def recomputed(self) -> bool:
        """Whether layers keep their input alone."""
        return bool(self.config.get("gradient_checkpointing"))

    @property
    def adapter(self) -> int:
        """Parameters of adapters on all linear layers; 0 without."""
        lora = self.config.get("lora")
        return adapter_parameters(self.shape, int(lora["rank"])) if lora else 0

    @property
    def trained(self) -> int:
        """Parameters with gradients."""
        return self.adapter or self.shape.parameters

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return min(int(self.config.get("micro_batch_tokens", 0)), ceil(step_tokens(self.config) / self.processes))

    @property
    def rows(self) -> int:
        """Completions that one process samples together."""
        group = int(self.config["group_size"])
        prompts = ceil(int(self.config["prompts_per_step"]) / self.processes)
        drawn = min(prompts, max(1, MOST_ROWS // group)) * group
        return max(drawn, min(self.monitored, MOST_ROWS))


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Parameters of an adapter of this rank on all linear layers."""
    attention = 2 * (shape.hidden + shape.queries) + 2 * (shape.hidden + shape.keys)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.inner))


def step_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one step, from the settings. Lengths of prompts and rows are not among them and are assumed."""
    if "batch_tokens" in config:
        return int(config["batch_tokens"])
    if "batch_size" in config:
        return int(config["batch_size"]) * ROW_TOKENS
    rows = int(config.get("prompts_per_step", 0)) * int(config.get("group_size", 1))
    return rows * row_tokens(config)


def row_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of a prompt with its longest completion."""
    return int(config.get("max_prompt_tokens") or PROMPT_TOKENS) + int(config.get("max_new_tokens", 0))


def frozen(shape: Shape, narrow: bool) -> int:
    """A model that is not trained; in bfloat16 its linear layers and an untied head are kept in it."""
    halved = shape.linear + (0 if shape.tied else shape.embedding) if narrow else 0
    return shape.parameters * FLOAT - halved * (FLOAT - NARROW)


def weights(stage: Trained) -> int:
    """Parameters, a frozen base included; FSDP splits them, or keeps them in the host's memory."""
    if stage.offloaded:
        return 0
    return (frozen(stage.shape, bool(stage.adapter) and stage.narrow) + stage.adapter * FLOAT) // stage.shards


def moments(stage: Trained) -> int:
    """AdamW's two moments of what is trained; FSDP splits them. None where they are paged or in the host's memory."""
    if stage.paged or stage.offloaded:
        return 0
    if stage.optimizer.get("states") != "8bit":
        return 2 * stage.trained * FLOAT // stage.shards
    wide = 0 if stage.adapter else stage.shape.embedding
    quantised = stage.trained - wide
    return 2 * (wide * FLOAT + quantised + quantised * FLOAT // QUANTISED)


def gradients(stage: Trained) -> int:
    """Gradients; FSDP reduces and scatters them with every micro-batch."""
    return 0 if stage.offloaded else stage.trained * FLOAT // stage.shards


def in_host_memory(stage: Trained) -> int:
    """What a stage on devices keeps in the host's memory, in all its processes together."""
    if not stage.offloaded and not stage.paged:
        return 0
    optimizer = {**stage.optimizer, "paged": False}
    kept = replace(stage, config={**stage.config, "cpu_offload": False, "optimizer": optimizer})
    return stage.processes * (moments(kept) + (weights(kept) + gradients(kept) if stage.offloaded else 0))


def buckets(stage: Trained) -> int:
    """The gradients' copies that DDP exchanges."""
    return stage.trained * FLOAT if stage.processes > 1 and not stage.sharded else 0


def gathered_for_update(stage: Trained) -> int:
    """FSDP's root group, embedding and output head, which stays whole from its forward to the end of the backward
    pass; and one layer with the next."""
    if not stage.sharded:
        return 0
    heads = stage.shape.embedding * (1 if stage.shape.tied else 2)
    return (heads + 2 * stage.shape.linear // max(1, stage.shape.layers)) * (NARROW if stage.narrow else FLOAT)


def gathered_for_rollout(stage: Trained) -> int:
    """FSDP's whole weights in the stage's number type: in the preflight, and where this process draws the rollouts."""
    return stage.shape.parameters * (NARROW if stage.narrow else FLOAT) if stage.sharded else 0


def head_gradient(stage: Trained) -> int:
    """The output head's gradient of one micro-batch, beside the accumulated one."""
    return 0 if stage.adapter else stage.shape.embedding * FLOAT


def head_factor(stage: Trained) -> int:
    """The output head rounded to bfloat16 for its products, which a CPU computes with a float32 copy; none on a GPU for
    a frozen head that is kept in bfloat16."""
    if not stage.narrow:
        return 0
    kept = stage.on_device and stage.adapter and not stage.shape.tied
    return 0 if kept else stage.shape.embedding * (NARROW if stage.on_device else FLOAT)


def logits(stage: Trained, taught: bool = False) -> int:
    """Logits of one chunk of tokens, their log-probabilities and gradients; with a teacher's beside them."""
    chunk = (stage.config.get("objective") or {}).get("chunk_tokens")
    size = int(chunk) * stage.shape.vocabulary * FLOAT if chunk else stage.chunk_bytes
    tokens = min(size, stage.tokens * stage.shape.vocabulary * FLOAT)
    return (TAUGHT_COPIES if taught else LOGIT_COPIES) * tokens


def activations(stage: Trained) -> int:
    """What one micro-batch's backward pass needs: all layers' tensors, or their inputs and one layer's tensors."""
    shape = stage.shape
    layer = layer_bytes(shape, stage.narrow) + _adapter_bytes(stage)
    # The last norm's tensors, and the hidden states with their gradient.
    ends = 5 * shape.hidden * FLOAT
    if stage.recomputed:
        return stage.tokens * (shape.layers * shape.hidden * FLOAT + layer + ends)
    return stage.tokens * (shape.layers * layer + ends)


def layer_bytes(shape: Shape, narrow: bool) -> int:
    """Bytes a token that autograd keeps of one decoder layer.

    In float32: of each of two norms its input, the normed input and its output; queries, keys and values as attention
    reads them, repeated for all query heads, and its output; gate, its activation, up and their product. In bfloat16
    the norms keep their first two in float32, each linear layer casts its own input (five casts of the width), and the
    rest has 2 bytes.
    """
    attention, inner = 4 * shape.queries, 4 * shape.inner
    if narrow:
        normed = 6 * (shape.queries + shape.keys) if shape.normed_heads else 0
        return 26 * shape.hidden + NARROW * (attention + inner) + normed
    normed = 2 * (shape.queries + shape.keys) if shape.normed_heads else 0
    return FLOAT * (6 * shape.hidden + attention + inner + normed)


def _adapter_bytes(stage: Trained) -> int:
    """Bytes a token and layer that seven adapters add, their inner states; less the normed inputs, which only the
    gradients of the norms' weights need."""
    if not stage.adapter:
        return 0
    rank = int(stage.config["lora"]["rank"])
    return 7 * rank * FLOAT - 2 * stage.shape.hidden * FLOAT


def narrow_copies(stage: Trained) -> int:
    """Weights that autocast casts to bfloat16 and the backward pass needs; with recomputation all of them during the
    forward pass, when neither logits nor the head's gradient exist yet. FSDP gathers them in bfloat16 already, and
    frozen weights are kept in it."""
    if not stage.narrow or stage.sharded or stage.adapter:
        return 0
    copies = NARROW * stage.shape.linear
    if not stage.recomputed:
        return copies
    return max(0, copies - head_gradient(stage) - logits(stage))


def teachers(stage: Trained) -> int:
    """Full teachers in this process, in the stage's number type but for their output heads, and further heads."""
    whole, heads = stage.teachers
    body = (stage.shape.parameters - stage.shape.embedding) * (NARROW if stage.narrow else FLOAT)
    return whole * (body + stage.shape.embedding * FLOAT) + heads * stage.shape.embedding * FLOAT


def teacher_states(stage: Trained) -> int:
    """The teachers' hidden states of one rollout, until its updates."""
    if not any(stage.teachers) or stage.config.get("teacher_cache", "device") != "device":
        return 0
    rows = ceil(int(stage.config["prompts_per_step"]) / stage.processes) * int(stage.config["group_size"])
    return rows * int(stage.config["max_new_tokens"]) * stage.shape.hidden * (NARROW if stage.narrow else FLOAT)


def cache(shape: Shape, rows: int, tokens: int, narrow: bool = False) -> int:
    """Keys and values of the sampler in this process: key-value heads x head size, two a layer, in the stage's number
    type, with room for the whole row."""
    return rows * tokens * shape.layers * 2 * shape.keys * (NARROW if narrow else FLOAT)


def decoding(shape: Shape, rows: int, tokens: int, repeats: bool = True) -> int:
    """What one token's step adds: the rows' logits; or a layer's keys and values repeated for the query heads, which
    float32 does on a CPU alone."""
    repeated = rows * tokens * 2 * shape.queries * FLOAT if repeats and shape.queries > shape.keys else 0
    return max(repeated, rows * shape.vocabulary * FLOAT * DRAWN_COPIES)


def prefill(shape: Shape, prompts: int, tokens: int) -> int:
    """What a prefill of distinct prompts adds: its own keys and values, and one layer's tensors."""
    run = min(PREFILL_TOKENS, prompts * tokens)
    return cache(shape, 1, run) + forward(shape, run)


def forward(shape: Shape, tokens: int) -> int:
    """One layer's tensors in a forward pass without gradients."""
    return tokens * FLOAT * (4 * shape.hidden + max(3 * shape.inner, 4 * shape.queries))


def scored_logits(shape: Shape, tokens: int) -> int:
    """What a vLLM server makes of the logits of a row's tokens that it scores together."""
    return tokens * shape.vocabulary * FLOAT * SCORED_COPIES
