"""Floating-point operations and bytes of a step, counted from a model's shape, and what cards reach. Free of torch.

A product of M x K with K x N is 2 M K N operations. Norms, activations, softmax and the optimizer are left out: they
are far below a per cent of a step. Causal attention computes half of the square of scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.engines.shapes import Shape

# Dense bfloat16 products, in operations a second, by a part of the card's name. NVIDIA's data sheets, whose figures
# with sparsity are halved.
DATA_SHEETS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def data_sheet(name: str) -> float | None:
    """The data sheet's dense bfloat16 operations a second of a card; None if the card is not in the table."""
    return next((peak for part, peak in DATA_SHEETS.items() if part in name), None)


@dataclass(frozen=True)
class Rows:
    """The rows of a step.

    Attributes:
        tokens: Tokens of all rows, prompts included.
        scored: Completion tokens, of which logits are computed.
        squares: Sum over the rows of the squared length.
    """

    tokens: int
    scored: int
    squares: int

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int]]) -> "Rows":
        """Rows from pairs of tokens of the prompt and of the completion."""
        whole = [prompt + completion for prompt, completion in lengths]
        return cls(sum(whole), sum(completion for _, completion in lengths), sum(length**2 for length in whole))


def layers_forward(shape: Shape, rows: Rows) -> float:
    """Operations of a forward pass of the layers: 2 a parameter and token, and the two products of attention."""
    return 2.0 * shape.linear * rows.tokens + attention_forward(shape, rows)


def attention_forward(shape: Shape, rows: Rows) -> float:
    """Operations of causal attention's two products in all layers: 2 x 2 T^2 / 2 a row and query width."""
    return 2.0 * shape.layers * shape.queries * rows.squares


def head_forward(shape: Shape, rows: Rows) -> float:
    """Operations of the output head on the completion tokens."""
    return 2.0 * shape.embedding * rows.scored


def update(shape: Shape, rows: Rows, *, adapters: bool, recomputed: bool, teacher_heads: int) -> float:
    """Operations of forward and backward pass of one update.

    Args:
        shape: The student.
        rows: All rows of the update.
        adapters: Whether the layers' own weights are frozen, and get no gradient; a head is then frozen too.
        recomputed: Whether the backward pass computes the layers' forward again.
        teacher_heads: Output heads of teachers that are multiplied for each token while the student is updated.
    """
    attention, head = attention_forward(shape, rows), head_forward(shape, rows)
    linear = layers_forward(shape, rows) - attention
    forward = linear + attention
    if recomputed:
        # Recomputation of a layer stops at the last tensor that the backward pass needs: without adapters that is the
        # input of the layer's last product.
        last = 2.0 * shape.layers * shape.hidden * shape.inner * rows.tokens
        forward += linear + attention - (0 if adapters else last)
    backward = (1 if adapters else 2) * linear + 2 * attention
    return forward + backward + head * ((2 if adapters else 3) + teacher_heads)


def score(shape: Shape, rows: Rows) -> float:
    """Operations of a teacher's forward pass without its head, which the update multiplies."""
    return layers_forward(shape, rows)


def cache_values(shape: Shape) -> int:
    """Numbers in the cache of one token: keys and values of all layers."""
    return 2 * shape.layers * shape.keys
