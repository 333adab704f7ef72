"""What is recorded of a case on the pretended device: mixed devices, and on request synchronisations and products.

Mixed are operations whose tensors are on different devices, random numbers from the other device's generator, and
CUDA tensors read as arrays of the host. Synchronisations are values read on the host, copies either way and masks as
indices. Every count names the product's line.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
# Modules that make attention masks.
MASKS = ("stages/model/attention.py", "stages/model/architecture.py", "stages/rows/packing.py")
PRODUCT = tuple(f"{ROOT / package}/" for package in ("stages", "evals", "experts", "flows"))


class Record:
    """What was seen since `clear`.

    Attributes:
        mixed: (operation, what is mixed, product line) -> how often.
        operations: Operations on the device.
        synchronisations: (phase, kind, product line) -> how often; with `detailed` only.
        products: (phase, number type, operation, product line) -> floating-point operations; with `detailed` only.
        moved: (phase, product line) -> bytes copied between host and device; with `detailed` only.
        largest: (phase, device) -> bytes, shape, number type and product line of the largest tensor; with `detailed`
            only.
        masks: device -> tensors made that are square in their last two dimensions by lines of `MASKS`; with `detailed`
            only.
        phase: A label of what runs now.
    """

    def __init__(self) -> None:
        self.detailed = False
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.mixed, self.synchronisations, self.products = Counter(), Counter(), Counter()
        self.moved, self.masks = Counter(), Counter()
        self.largest = {}
        self._paused = False
        self.operations = 0
        self.phase = "-"

    def mix(self, operation: str, what: str) -> None:
        """Count an operation that CUDA would refuse, or that takes a tensor of the host along."""
        self.mixed[operation, what, where()] += 1

    def synchronise(self, kind: str) -> None:
        """Count a point at which the host waits for the device."""
        if self.detailed and not self._paused:
            self.synchronisations[self.phase, kind, where()] += 1

    def move(self, tensor: torch.Tensor) -> None:
        """Count the bytes of a copy between host and device."""
        if self.detailed and not self._paused:
            self.moved[self.phase, where()] += tensor.numel() * tensor.element_size()

    def make(self, device: str, tensor: torch.Tensor) -> None:
        """Note a tensor that was made on a device or on the host (`cpu`)."""
        if self._paused:
            return
        size = tensor.numel() * tensor.element_size()
        if size > self.largest.get((self.phase, device), (0,))[0]:
            kind = str(tensor.dtype).removeprefix("torch.")
            self.largest[self.phase, device] = (size, list(tensor.shape), kind, where())
        if tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > 1 and where().startswith(MASKS):
            self.masks[device] += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which copies, synchronisations and tensors are those of a stand-in, and are not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def multiply(self, dtype: str, operation: str, work: int) -> None:
        """Count the floating-point operations of a product."""
        self.products[self.phase, dtype, operation, where()] += work


def where() -> str:
    """The two innermost lines of the product, and the library's line they called."""
    lines: list[str] = []
    library = ""
    frame = sys._getframe(1)
    while frame is not None and len(lines) < 2:
        file = frame.f_code.co_filename
        if file.startswith(PRODUCT) and "site-packages" not in file:
            lines.append(f"{Path(file).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}")
        elif not lines and not library and "site-packages/" in file and "/torch/" not in file:
            library = f"{file.split('site-packages/', 1)[1]}:{frame.f_lineno} < "
        frame = frame.f_back
    return library + " < ".join(lines or ["(no line of the product)"])
