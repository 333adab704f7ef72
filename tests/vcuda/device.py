"""A pretended CUDA device: numbers are computed on the CPU, and every storage has a device that is kept beside it.

`pretend` patches torch for the whole process, so it is called in a child process only (`tests.vcuda.cases`). Inside
`watching` a TorchFunctionMode answers `.device`, `.to`, `.cpu` and `torch.tensor(device=…)`, and a TorchDispatchMode
sees every ATen operation, those of the backward pass included. Work that is submitted to a thread pool is watched in
its thread. `tests.vcuda.record` describes what is recorded.

What lives on the device is counted (`tests.vcuda.live`), and torch.cuda answers with it.

Not covered: limits of CUDA's kernels, NCCL, the allocator, time, and threads that are started without a pool.
"""

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.attention.varlen
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.varlen import varlen_attn
from tests.vcuda.live import Live
from tests.vcuda.record import Record

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Marks of storages that are gone are dropped beyond this many.
MOST_MARKS = 20000

# Operations on two devices that CUDA takes, and why the product has them. Any other mixture is a fault.
ALLOWED = {
    "aten::copy_": "copies between devices",
    "aten::_to_copy": "copies between devices",
}
# The same where all that is on the host is one number, a tensor of no dimension.
ALLOWED_NUMBERS = {
    "aten::index_put_": "Python numbers assigned at indices: the sampler's lengths and flags of rows that ended",
    "aten::where": "a Python number in place of one of the two tensors",
    "aten::_foreach_mul_": "clipping: C++ groups gradients by the device they really have, and the factor follows them",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
MATRIX_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::linear"}
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
READS |= {"aten::unique_dim", "aten::_unique2", "aten::equal"}


class Marks:
    """The storages that are on the device."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def device(self, tensor: torch.Tensor) -> torch.device:
        """Where a tensor is."""
        known = self._known.get(_storage(tensor)._cdata)
        return CPU if known is None or known.expired() else CUDA

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Note where a tensor is from now on."""
        storage = _storage(tensor)
        if device.type == "cpu":
            self._known.pop(storage._cdata, None)
            return
        if len(self._known) > MOST_MARKS:
            self._known = {key: known for key, known in list(self._known.items()) if not known.expired()}
        self._known[storage._cdata] = StorageWeakRef(storage)
        live.add(tensor)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


record, marks, live = Record(), Marks(), Live()
# Depth of calls into the autograd engine: its factories ask for the device that tensors really have.
_backwards = [0]


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _tensors(*trees: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    found: list[torch.Tensor] = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, list | tuple):
            found += _tensors(*tree)
        elif isinstance(tree, dict):
            found += _tensors(*tree.values())
    return found


class _Dispatch(TorchDispatchMode):
    """Runs every operation on the CPU and gives its results the device they would have."""

    # Where results are in any case: set while a copy to another device is made.
    forced: torch.device | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and keeping dynamo out of every operation takes as long as the operation.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        asked = kwargs.get("device")
        if _is_cuda(asked):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        inside = _tensors(args, kwargs)
        devices = [marks.device(tensor) for tensor in inside]
        on_device = CUDA in devices
        if on_device or _is_cuda(asked):
            record.operations += 1
            self._look(name, args, inside, devices)
        result = _wide_product(*args) if func is torch.ops.aten.mm.dtype else func(*args, **kwargs)
        device = self._device(name, asked, devices)
        given = {_storage(tensor)._cdata for tensor in inside} if device is not None or record.detailed else set()
        if record.detailed:
            for tensor in _tensors(result):
                if _storage(tensor)._cdata not in given:
                    record.make((device or CPU).type, tensor)
        if device is not None:
            for tensor in _tensors(result):
                # What was given, or a view of it, stays where it is: a copy into a tensor does not move it.
                if _storage(tensor)._cdata not in given:
                    marks.put(tensor, device)
        return result

    def _device(self, name: str, asked: Any, devices: list[torch.device]) -> torch.device | None:
        """Where the results are; None leaves them as they are."""
        if self.forced is not None:
            return self.forced
        if name == "aten::_to_copy":
            # A copy to the CPU goes through `_Function`; C++ names the device a tensor really has.
            return CUDA if _is_cuda(asked) else devices[0]
        # C++ asks for the device a tensor really has, in composite operations and in the backward pass.
        if asked is not None and (_is_cuda(asked) or _backwards[0] or (CUDA in devices and _is_derived(name))):
            return CUDA
        if asked is not None:
            return CPU
        return CUDA if CUDA in devices else None

    def _look(self, name: str, args: Any, inside: list[torch.Tensor], devices: list[torch.device]) -> None:
        """Record what is mixed, what synchronises and what is multiplied."""
        hosted = [tensor for tensor, device in zip(inside, devices, strict=True) if device == CPU]
        if hosted and CUDA in devices:
            self._mixed(name, args, hosted)
        if not record.detailed:
            return
        if name in READS:
            record.synchronise(name)
        if name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] or []):
            record.synchronise(f"{name} by a mask")
        if name in MATRIX_PRODUCTS and inside[-2].dim() >= 2 and inside[-1].dim() >= 2:
            self._multiplied(name, inside[-2], 2 * inside[-2].numel() * inside[-1].shape[-1])
        elif "scaled_dot_product" in name:
            query, key = inside[1:3] if "backward" in name else inside[:2]
            self._multiplied(name, query, 4 * query.numel() * key.shape[-2])

    def _mixed(self, name: str, args: Any, hosted: list[torch.Tensor]) -> None:
        """Record an operation that takes tensors of the host along, unless it may."""
        if name in ALLOWED:
            record.synchronise(f"{name} between devices")
            record.move(hosted[0])
        elif name in ALLOWED_NUMBERS and all(tensor.dim() == 0 for tensor in hosted):
            record.synchronise(f"{name} of a number")
        elif name in INDEXING and all(marks.device(tensor) == CUDA for tensor in (args[0], *args[2:3])):
            record.mix(name, "an index on the CPU")
        else:
            record.mix(name, f"tensors of shape {[tuple(tensor.shape) for tensor in hosted]} on the CPU")

    def _multiplied(self, name: str, left: torch.Tensor, work: int) -> None:
        record.multiply(str(left.dtype).removeprefix("torch."), name, work)


def _wide_product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A product with sums in another type, which only CUDA has."""
    return left.to(dtype) @ right.to(dtype)


def _is_derived(name: str) -> bool:
    return "_like" in name or "new_" in name


class _Function(TorchFunctionMode):
    """Answers what Python asks of tensors about their device."""

    def __init__(self, dispatch: _Dispatch) -> None:
        super().__init__()
        self._dispatch = dispatch
        self._answers = {
            torch.Tensor.device.__get__: self._device,
            torch.Tensor.is_cuda.__get__: lambda tensor: marks.device(tensor) == CUDA,
            torch.Tensor.is_cpu.__get__: lambda tensor: self._device(tensor).type == "cpu",
            torch.Tensor.get_device: lambda tensor: 0 if marks.device(tensor) == CUDA else -1,
            torch.Tensor.pin_memory: lambda tensor: tensor,
            torch.Tensor.cpu: lambda tensor: self._to(tensor, CPU),
            torch.Tensor.cuda: lambda tensor: self._to(tensor, CUDA),
            torch.Tensor.to: self._to,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if answer := self._answers.get(func):
            return answer(*args, **kwargs)
        if (generator := kwargs.get("generator")) is not None:
            self._draw(func, generator, args, kwargs)
        if func is torch.tensor and _is_cuda(kwargs.get("device")):
            record.synchronise("torch.tensor on the device")
            found = func(*args, **kwargs | {"device": CPU})
            record.move(found)
            marks.put(found, CUDA)
            return found
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and marks.device(args[0]) == CUDA:
            record.mix(func.__name__, "a CUDA tensor as an array of the host")
        if func is torch.Tensor.tolist and marks.device(args[0]) == CUDA:
            record.synchronise("tolist")
        return func(*args, **kwargs)

    def _device(self, tensor: torch.Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            found = tensor.device
        return CUDA if found.type == "cpu" and marks.device(tensor) == CUDA else found

    def _draw(self, func, generator, args, kwargs) -> None:
        """Record random numbers that a tensor's device would refuse to draw with this generator."""
        inside = _tensors(args)
        device = marks.device(inside[0]) if inside else torch.device(kwargs.get("device") or "cpu")
        if generator.device.type != device.type:
            record.mix(func.__name__, f"a {generator.device.type} generator for a {device.type} tensor")

    def _to(self, tensor, *args, dtype=None, device=None, copy=False, non_blocking=False, memory_format=None):
        del non_blocking, memory_format
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, torch.Tensor):
                dtype, device = arg.dtype, arg.device
            elif isinstance(arg, torch.device | str) or (isinstance(arg, int) and not isinstance(arg, bool)):
                device = arg
        here = marks.device(tensor)
        there = here if device is None else torch.device(device)
        if there.type == "meta":
            return torch._C.TensorBase.to(tensor, device="meta", dtype=dtype or tensor.dtype)
        if there.type == here.type and not copy:
            narrows = dtype is not None and dtype != tensor.dtype
            return torch._C.TensorBase.to(tensor, dtype) if narrows else tensor
        if there.type != here.type:
            record.synchronise(f"copy to {there.type}")
            record.move(tensor)
        self._dispatch.forced = CUDA if there.type == "cuda" else there
        try:
            found = tensor.clone()
            return found if dtype is None else found.to(dtype)
        finally:
            self._dispatch.forced = None


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Watch everything in this thread, and what it gives to thread pools."""
    dispatch = _Dispatch()
    with dispatch, _Function(dispatch):
        yield


class _Generator(torch.Generator):
    """A generator of the CPU that answers with the device it was asked for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.pretended = torch.device(device)
        return made

    def __init__(self, device="cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        return self.pretended


class _Properties:
    name, major, minor, total_memory, multi_processor_count, gcnArchName = "Pretended", 9, 0, 80 * 2**30, 132, ""


def pretend() -> None:
    """Let torch show one CUDA device in this process, for good."""
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_capability": lambda device=None: (_Properties.major, _Properties.minor),
        "get_device_properties": lambda device=None: _Properties,
        "max_memory_allocated": lambda device=None: live.peak,
        "reset_peak_memory_stats": lambda device=None: live.reset(),
        "memory_allocated": lambda device=None: live.bytes,
        "memory_reserved": lambda device=None: live.bytes,
        "mem_get_info": lambda device=None: (_Properties.total_memory - live.bytes, _Properties.total_memory),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [],
    }
    nothing = ("_lazy_init", "init", "set_device", "empty_cache", "synchronize", "manual_seed", "manual_seed_all")
    answers |= dict.fromkeys((*nothing, "set_rng_state", "set_rng_state_all"), lambda *args, **kwargs: None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.nn.attention.varlen.varlen_attn = record.paused()(varlen_attn)
    torch.Generator = _Generator
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None
    _pretend_autocast()
    _mark_backward()
    submit = ThreadPoolExecutor.submit

    def submit_watched(self, function, /, *args, **kwargs):
        return submit(self, watching()(function), *args, **kwargs)

    ThreadPoolExecutor.submit = submit_watched


def _pretend_autocast() -> None:
    """Autocast on CUDA is the CPU's."""
    init, enabled = torch.amp.autocast_mode.autocast.__init__, torch.is_autocast_enabled

    def init_on_cpu(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        init(self, "cpu" if device_type == "cuda" else device_type, dtype, enabled, cache_enabled)

    torch.amp.autocast_mode.autocast.__init__ = init_on_cpu
    torch.is_autocast_enabled = lambda device=None: enabled("cpu" if device in (None, "cuda") else device)


def _mark_backward() -> None:
    engine = torch.autograd.graph._engine_run_backward

    @functools.wraps(engine)
    def run_backward(*args, **kwargs):
        _backwards[0] += 1
        try:
            return engine(*args, **kwargs)
        finally:
            _backwards[0] -= 1

    torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = run_backward
