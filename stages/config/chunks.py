"""The size of a chunk of logits, by which losses are computed and memory is planned. Free of torch."""

# Smaller chunks lose time between kernels, larger ones do not fit a CPU's cache (`benchmarks/exact_kl.py`).
CHUNK_BYTES = 64 * 2**20
# On a GPU each chunk reads the head and, in training, its gradient anew.
MOST_CHUNK_BYTES = 2**30
# A loss and its gradient hold about eight tensors of the logits' size at once, teachers' included: half of the free
# memory.
CHUNK_SHARE = 16


def chunk_bytes(free: int) -> int:
    """Bytes of a chunk's float32 logits on a GPU: the largest power of two within `MOST_CHUNK_BYTES` and a share of the
    free memory, at least `CHUNK_BYTES`.

    Powers of two, because the size decides the order of sums: free memory that differs a little between two runs rarely
    changes it.

    Args:
        free: Free memory of the device in bytes.
    """
    size = MOST_CHUNK_BYTES
    while size > max(CHUNK_BYTES, free // CHUNK_SHARE):
        size //= 2
    return size
