"""What parts of a merge cost on an H100, by today's code and by that of 28 November 2026: arithmetic, not measurement.

Work is counted from the model's shape (`studies.gpu_work`); what the hardware and the host reach is assumed (`Card`,
`Host`). `studies.gpu_estimates` prints tables of it.
"""

from dataclasses import dataclass

from flows.engines.shapes import Shape
from stages.config.chunks import CHUNK_BYTES, chunk_bytes
from studies import gpu_work

GIB = 2**30
CARD_BYTES = 80 * GIB


@dataclass(frozen=True)
class Card:
    """What one H100 SXM is assumed to reach, in operations and bytes a second.

    Attributes:
        bfloat16: Products of bfloat16; 989e12 by the data sheet.
        float32: Products of float32 without TF32; 67e12.
        memory: Its memory; 3.35e12.
        nvlink: To another card, one way; 450e9.
    """

    bfloat16: float = 600e12
    float32: float = 50e12
    memory: float = 2.8e12
    nvlink: float = 200e9


@dataclass(frozen=True)
class Host:
    """What a host is assumed to reach.

    Attributes:
        operation: Seconds of one ATen operation in eager mode, low and high.
        disk: Bytes a second, written or read.
        pageable: Bytes a second to a device from pageable memory.
        pinned: The same from pinned memory.
        build: Seconds to build a model of 8 billion parameters from its files.
        entry: Seconds to read one log-probability of a teachers' server (80 bytes of JSON) on one thread; 3.0
            microseconds measured for the client on a shared x86-64 core. The server's side is taken to be the same.
    """

    operation: tuple[float, float] = (4e-6, 8e-6)
    disk: float = 2.5e9
    pageable: float = 6e9
    pinned: float = 25e9
    build: float = 5.0
    entry: float = 3e-6


@dataclass(frozen=True)
class Code:
    """What decides the time in the product's code.

    Attributes:
        narrow: Whether rollouts, output heads and weights for servers are bfloat16, and decoding reads the cache of
            grouped heads as it is. Else they are float32, and the cache is repeated for all query heads.
        layer: ATen operations of a layer in a step of decoding.
        layer_with_adapters: The same with adapters on all linear layers.
        rest: Operations of the step outside the layers.
    """

    narrow: bool
    layer: int
    layer_with_adapters: int
    rest: int

    @property
    def width(self) -> int:
        """Bytes of a number in rollouts, heads and weights for servers."""
        return 2 if self.narrow else 4


# `tests/numerics/test_gpu_estimates.py` counts today's operations again. Those with adapters were not counted before.
BEFORE, AFTER = Code(False, 66, 66, 23), Code(True, 88, 139, 32)
CARD, HOST = Card(), Host()
Range = tuple[float, float]


def head_rate(code: Code) -> float:
    """Operations a second of output heads."""
    return CARD.bfloat16 if code.narrow else CARD.float32


def decode_device(code: Code, shape: Shape, rows: int, tokens: float, cast: bool = False) -> float:
    """Seconds in which the device reads weights and cache for one token of each row.

    Args:
        code: Today's or the earlier.
        shape: The model.
        rows: Rows decoded together.
        tokens: Tokens of each so far.
        cast: Whether float32 weights are cast to bfloat16 for each token, as those of a student trained in full are:
            read, written and read again.
    """
    cache = rows * tokens * gpu_work.cache_values(shape) * code.width
    # Repeated for the query heads: read, written and read again.
    cache *= 1 if code.narrow else 1 + 2 * shape.queries // shape.keys
    weight = 4 + 2 + 2 if cast and code.narrow else code.width
    return (shape.parameters * weight + cache) / CARD.memory


def decode_host(code: Code, shape: Shape, adapters: bool) -> Range:
    """Seconds in which the host starts one token's operations, low and high."""
    count = (code.layer_with_adapters if adapters else code.layer) * shape.layers + code.rest
    return count * HOST.operation[0], count * HOST.operation[1]


def decode(code: Code, shape: Shape, rows: int, tokens: float, adapters: bool) -> Range:
    """Seconds of one token of each row: the device's or the host's, whichever takes longer."""
    device = decode_device(code, shape, rows, tokens, cast=not adapters)
    low, high = decode_host(code, shape, adapters)
    return max(device, low), max(device, high)


def prefill(code: Code, shape: Shape, tokens: int) -> float:
    """Seconds of a prefill's linear layers."""
    return 2 * shape.linear * tokens / head_rate(code)


def token(code: Code, shape: Shape) -> tuple[float, float]:
    """Seconds of a token in teacher and full update, without recomputation: bodies, and both heads."""
    return 8 * shape.linear / CARD.bfloat16, 8 * shape.embedding / head_rate(code)


def chunk(code: Code, shape: Shape, free: int = CARD_BYTES) -> tuple[int, float]:
    """Tokens of a chunk of logits, and seconds a token in which heads are read and the head's gradient is written."""
    tokens = (chunk_bytes(free) if code.narrow else CHUNK_BYTES) // (4 * shape.vocabulary)
    moved = shape.embedding * (3 * code.width + 2 * 4)
    return tokens, moved / CARD.memory / tokens


def hand_over(code: Code, shape: Shape, by_file: bool) -> tuple[float, float]:
    """Bytes of a full student for a server, and seconds until it has them; a file is written, and read from the cache
    of the file system."""
    if not code.narrow:
        whole = (shape.parameters + shape.embedding) * 4
        return whole, whole / HOST.disk
    whole = shape.parameters * code.width
    return whole, whole / (HOST.disk if by_file else CARD.nvlink)


def teacher_again(code: Code, shape: Shape) -> float:
    """Seconds until a full teacher beyond `max_resident` is on the device again."""
    file = shape.parameters * 2
    if code.narrow:
        return file / HOST.pinned
    return file / HOST.disk + HOST.build + (shape.linear * 2 + 2 * shape.embedding * 4) / HOST.pageable
