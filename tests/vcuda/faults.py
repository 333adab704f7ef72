"""Operations that mix devices, which the pretended device must report, and some that it must not."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def _draw(device: str) -> None:
    torch.empty(4).to("cuda").exponential_(generator=torch.Generator(device).manual_seed(0))


def _in_a_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: torch.ones(3).to("cuda") + torch.ones(3)).result()


def _backward() -> None:
    weight = torch.ones(3).to("cuda").requires_grad_(True)

    class Mixing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            ctx.kept = torch.ones(3).to("cpu")
            return value * 2

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * ctx.kept

    Mixing.apply(weight).sum().backward()


# What must be reported: each mixes devices once.
FAULTS: Mapping[str, Callable[[], Any]] = {
    "index_select": lambda: torch.ones(4).to("cuda").index_select(0, torch.tensor([1])),
    "index": lambda: torch.ones(4).to("cuda")[torch.tensor([1, 2])],
    "add": lambda: torch.ones(4).to("cuda") + torch.ones(4),
    "scalar": lambda: torch.ones(4).to("cuda") + torch.tensor(1.0),
    "cat": lambda: torch.cat([torch.ones(4, device="cuda"), torch.ones(4)]),
    "generator": lambda: _draw("cpu"),
    "numpy": lambda: torch.ones(4, device="cuda").numpy(),
    "thread": _in_a_thread,
    "backward": _backward,
}
HARMLESS: Mapping[str, Callable[[], Any]] = {
    "index_select": lambda: torch.ones(4).to("cuda").index_select(0, torch.tensor([1], device="cuda")),
    "copy": lambda: torch.ones(4).copy_(torch.ones(4, device="cuda")),
    "generator": lambda: _draw("cuda"),
    "number": lambda: torch.ones(4, device="cuda") * 2 + 1,
}
