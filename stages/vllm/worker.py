"""Methods added to every vLLM worker (`--worker-extension-cls`), in the trainer's process and in servers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# For `--worker-extension-cls`.
EXTENSION = "stages.vllm.worker.HandOver"


class HandOver:
    """Mixin of vLLM's worker class, whose `reload_weights` and `update_config` it calls."""

    model_runner: Any
    reload_weights: Any
    update_config: Any

    def take_weights(self, tensors: "Iterator[tuple[str, Tensor]] | None" = None, folder: str | None = None) -> None:
        """Replace the weights by other full weights.

        Args:
            tensors: Names and tensors in checkpoint format, from this process.
            folder: The folder of their safetensors, if they are not from this process.

        Raises:
            RuntimeError: vLLM has not loaded the weights of some experts.
        """
        experts = self._packed_experts()
        for method in experts:
            # vLLM 0.32 packs experts for the CPU's kernel only if there is no kernel yet. Without this, a reload leaves
            # them in the checkpoint's layout, which the kernel reads as packed.
            method.moe_kernel = None
        if folder is not None:
            # The engine may have been started with `--load-format dummy`, which reads no files.
            self.update_config({"load_config": {"load_format": "safetensors"}})
        self.reload_weights(weights_iterator=tensors, weights_path=folder)
        if any(method.moe_kernel is None for method in experts):
            name = type(self.model_runner.get_model()).__name__
            raise RuntimeError(f"vLLM does not reload the experts of {name} on a CPU")

    def _packed_experts(self) -> list[Any]:
        """The quantization methods of the layers whose experts are packed for a CPU."""
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return []
        methods = (getattr(layer, "quant_method", None) for layer in self.model_runner.get_model().modules())
        return [method for method in methods if isinstance(method, UnquantizedFusedMoEMethod)]
