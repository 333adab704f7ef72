"""Matrix products in float32 on processors where torch's own choice of library is slow.

On x86 torch uses MKL, which does not use the AVX-512 units of processors not made by Intel; oneDNN, also included in
torch, does (`benchmarks/linear.py` prints both). On other processors, in other precisions, under autocast, with
`torch.backends.mkldnn` disabled, and for products too small to pay for the overhead, torch's choice is kept.

Shape suffixes: M rows (any leading dimensions), K inputs, N outputs.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Multiply-adds; with fewer, the overhead of oneDNN costs what its kernels save (`benchmarks/linear.py`).
WORTHWHILE = 2_000_000


def matmul_t(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """left @ right.T [M, N]; differentiable.

    Args:
        left_MK: Usually activations.
        right_NK: Usually a weight; need not be contiguous.
    """
    if not _suits(left_MK, right_NK):
        return left_MK @ right_NK.T
    return _through_onednn(left_MK, right_NK)


def use_onednn(model: nn.Module) -> None:
    """Make a model's linear layers choose the library as `matmul_t` does; parameters, their names and saved files do
    not change."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """A linear layer's output."""
        if not _suits(input, self.weight):
            return functional.linear(input, self.weight, self.bias)
        output_MN = _through_onednn(input, self.weight)
        return output_MN if self.bias is None else output_MN + self.bias


def _suits(left_MK: Tensor, right_NK: Tensor) -> bool:
    return (
        left_MK.dtype == right_NK.dtype == torch.float32
        and left_MK.device.type == "cpu"
        and left_MK.numel() * right_NK.shape[0] >= WORTHWHILE
        and _mkl_is_slow()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch would use MKL, and MKL would not use this processor's widest units."""
    here = platform.system() == "Linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    available = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return here and available and "GenuineIntel" not in Path("/proc/cpuinfo").read_text()


def _through_onednn(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (left_MK.requires_grad or right_NK.requires_grad):
        product_MN: Tensor = _Product.apply(left_MK, right_NK)
        return product_MN
    return _run(left_MK, right_NK)


def _run(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    # The operation that torch.compile emits for linear layers on a CPU.
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left_MK: Tensor, right_NK: Tensor) -> Tensor:
        """Multiply, and save both factors without copies."""
        ctx.save_for_backward(left_MK, right_NK)
        return _run(left_MK, right_NK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the factors that need one."""
        left_MK, right_NK = ctx.saved_tensors
        gradient_MN = gradients[0]
        left = _run(gradient_MN, right_NK.t()) if ctx.needs_input_grad[0] else None
        right = None
        if ctx.needs_input_grad[1]:
            right = _run(gradient_MN.flatten(0, -2).t(), left_MK.flatten(0, -2).t())
        return left, right
