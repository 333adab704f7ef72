"""AdamW of a stage: torch's with moments in float32, or that of bitsandbytes with moments in 8 bits.

8-bit moments are quantised in blocks of 256 values with one scale each (Dettmers et al. 2022, arXiv:2110.02861). Those
of embeddings stay float32, as the paper advises and transformers' Trainer does.
"""

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from base.extras import require_bitsandbytes
from stages.config.training import OptimizerConfig

# Buffers of bitsandbytes that may be paged.
_MOMENTS = ("state1", "state2")


def adamw(config: OptimizerConfig, model: nn.Module, device: torch.device) -> Optimizer:
    """The optimizer of a model's trainable parameters.

    Args:
        config: Its settings.
        model: The model; its embeddings are found by their type.
        device: Where the parameters will be when it steps.

    Raises:
        UserError: it needs bitsandbytes, which is not installed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    if config.states == "float32":
        return torch.optim.AdamW(trained, fused=True, **settings)
    require_bitsandbytes("optimizer.states")
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    # One for all optimizers of a process.
    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    manager.override_config(embeddings, "optim_bits", 32)
    # A CPU has nothing to page.
    optimizer: Optimizer = AdamW8bit(trained, is_paged=config.paged and device.type == "cuda", **settings)
    return optimizer


def load_state(optimizer: Optimizer, kept: dict[str, Any]) -> None:
    """Load what `state_dict` returned.

    bitsandbytes itself would load paged moments into the device's memory.
    """
    inner: Any = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if isinstance(inner, torch.optim.AdamW):
        inner.load_state_dict(kept)
        return
    inner.load_state_dict(kept, move_to_device=False)
    for parameter, values in inner.state.items():
        for name, value in values.items():
            if name in _MOMENTS:
                values[name] = inner.get_state_buffer(parameter, dtype=value.dtype)
                values[name].copy_(value)
            elif isinstance(value, Tensor):
                values[name] = value.to(parameter.device)
