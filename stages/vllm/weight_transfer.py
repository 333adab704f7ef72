"""Sends full weights from the trainer's device to a server's by vLLM's own weight-transfer interface, over NCCL.

The hosts must reach each other. A server that dies during a transfer blocks NCCL until its own time-out. Used if the
trainer is on a GPU and the server was started with `--weight-transfer-config '{"backend": "nccl"}'`, as the pipeline
and `mopd serve` do.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stages.vllm.handover import Shapes, sent_as
from stages.vllm.server import ServerFailedError, ServerLostError, VllmServer

BACKEND = "nccl"

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


def takes_transfers(server: VllmServer) -> bool:
    """Whether this process and the server can send weights over NCCL."""
    return torch.cuda.is_available() and server.setting("weight_transfer_config", "backend") == BACKEND


class NcclTransfer:
    """The trainer's end of one server's transfers.

    Args:
        server: Its workers and this process form a process group.
        shapes: Name and shape of each tensor.
        dtype: The server's number type.
        tensors: Returns the current weights, in the order of the shapes; called by each `send`.

    Raises:
        ServerLostError: the server does not join.
    """

    def __init__(self, server: VllmServer, shapes: Shapes, dtype: torch.dtype, tensors: Tensors) -> None:
        import requests
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        self._server = server
        meeting = NCCLTrainerInitInfo(
            rank=0, master_address=get_ip(), master_port=get_open_port(), world_size=1 + server.world_size()
        )
        client = HTTPVLLMWeightSyncClient(server.url, timeout=server.timeout)
        try:
            self._engine: Any = WeightTransferTrainerFactory.trainer_init(
                meeting, client=client, source=weight_source(shapes, dtype, tensors)
            )
        except requests.RequestException as error:
            raise ServerLostError(f"{server.url}: no transfer of weights: {error}") from error

    def send(self) -> None:
        """Send the weights, then drop the server's prefix cache, which older weights filled.

        Raises:
            ServerLostError: the server does not answer.
            ServerFailedError: the server answers with an error.
        """
        import requests

        try:
            self._engine.send_weights()
        except requests.HTTPError as error:
            raise ServerFailedError(f"{self._server.url}: weights were not received: {error}") from error
        except requests.RequestException as error:
            raise ServerLostError(f"{self._server.url}: weights were not received: {error}") from error
        self._server.forget()

    def close(self) -> None:
        """Leave the process group."""
        self._engine.shutdown()


def weight_source(shapes: Shapes, dtype: torch.dtype, tensors: Tensors) -> Any:
    """Weights as a source of vLLM's transfer: the metadata, then each tensor in the same order; arguments as for
    `NcclTransfer`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Student(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, sent_as(shape, dtype), shape) for name, shape in shapes.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return tensors()

    return Student()
