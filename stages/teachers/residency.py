"""Keeps teachers' weights in memory, and activates one teacher at a time.

Teachers that are adapters of one base share that base. If the student is an adapter of the same base, they share the
student's. Of other bases at most `max_resident` are on the device: the least recently used makes room. On a GPU it then
waits in the host's memory, in its number type and pinned; without room there, and on a CPU, it is dropped and read
again, and while one teacher scores, a thread reads the weights of the next. No teacher has gradients.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import psutil
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from base.store.checkpoint import Artifact, Store
from stages.model.kernels import use_kernels
from stages.model.policy import Policy, check_head
from stages.model.precision import narrow

Weights = dict[str, Tensor]


def base_key(teacher: Artifact) -> str:
    """Key of the full checkpoint under a teacher: its own, or its adapter's base."""
    return str(teacher.manifest.get("adapter_base") or teacher.key)


class PoolConfig(Protocol):
    """The settings of teachers; a merge's config has them."""

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Their number type."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward."""

    @property
    def max_resident(self) -> int:
        """Full checkpoints in memory at the same time."""

    @property
    def teacher_cache(self) -> Literal["device", "cpu"]:
        """Where hidden states are stored until the updates."""


@dataclass(frozen=True)
class TeacherSettings:
    """The settings of a single reference policy; a `PoolConfig`."""

    dtype: Literal["float32", "bfloat16"]
    micro_batch_tokens: int
    max_resident: int = 1
    teacher_cache: Literal["device", "cpu"] = "device"


class Residents:
    """The bases in memory.

    Args:
        store: The store that holds the bases.
        student: Its base is shared if it is an adapter itself.
        config: `max_resident`, `dtype`.
        share_base: Whether the student's base may be shared; not if a data-parallel wrapper holds its parameters.
    """

    def __init__(self, store: Store, student: Policy, config: PoolConfig, share_base: bool) -> None:
        self.store = store
        self.student = student
        self.config = config
        is_adapter = bool(student.adapter_base) and isinstance(student.model, PeftModel)
        self.shared = SharedBase(student) if share_base and is_adapter else None
        self.bases: OrderedDict[str, _Base] = OrderedDict()
        self.waiting: dict[str, _Base] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._reading: dict[str, Future[Weights]] = {}

    def ordered(self, teachers: Iterable[Artifact]) -> list[Artifact]:
        """Teachers by base: those in memory first, starting with the least recently used, which is dropped next."""
        recency = {key: index for index, key in enumerate(self.bases)}
        return sorted(teachers, key=lambda t: (recency.get(base_key(t), len(recency)), base_key(t), t.key))

    def read_ahead(self, upcoming: Sequence[Artifact]) -> None:
        """Start to read the next teacher's base if it is not in memory; it counts towards `max_resident`."""
        key = base_key(upcoming[0]) if upcoming else None
        if key is None or self.config.max_resident < 2 or key in {*self.bases, *self.waiting, *self._reading}:
            return
        if not self._is_shared(key):
            self._drop_to(self.config.max_resident - 1)
            self._reading[key] = self._reader.submit(_read, self.store.get(key))

    @contextlib.contextmanager
    def activated(self, teacher: Artifact) -> Iterator[PreTrainedModel | PeftModel]:
        """A context in which the yielded model is this teacher, in eval mode."""
        key = base_key(teacher)
        if self.shared is not None and self._is_shared(key):
            with self.shared.activated(teacher) as model:
                yield model
            return
        with self._base(key).activated(teacher) as model:
            yield model

    def _base(self, key: str) -> "_Base":
        """A base on the device; others make room before it is copied or read."""
        if key not in self.bases:
            reading, waiting = self._reading.pop(key, None), self.waiting.pop(key, None)
            self._drop_to(max(0, self.config.max_resident - 1 - len(self._reading)))
            if waiting is not None:
                waiting.to_device()
                self.bases[key] = waiting
            else:
                base = self.store.get(key)
                weights = reading.result() if reading else _read(base)
                self.bases[key] = _Base(base, weights, self.config.dtype, self.student)
        self.bases.move_to_end(key)
        return self.bases[key]

    def _is_shared(self, key: str) -> bool:
        return self.shared is not None and key == self.student.adapter_base

    def _drop_to(self, allowed: int) -> None:
        """Remove the least recently used bases from the device until at most `allowed` are left."""
        while len(self.bases) > allowed:
            key, base = self.bases.popitem(last=False)
            if may_wait(base.size, self.student.device):
                base.to_host()
                self.waiting[key] = base


def may_wait(size: int, device: torch.device) -> bool:
    """Whether a base of `size` bytes that leaves a device may wait in the host's memory.

    On a CPU it would stay in the memory that `max_resident` limits. At most half of what is available is taken.
    """
    return device.type != "cpu" and size <= psutil.virtual_memory().available // 2


def _read(base: Artifact) -> Weights:
    """All weights of a checkpoint, on the CPU."""
    return {
        name: tensor for file in sorted(base.path.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def _model_class(config: PreTrainedConfig, base: Artifact, remote_code: bool) -> type[PreTrainedModel]:
    """The class of a base's model: transformers' own, or the base's own code if the run file permits it."""
    own = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    found: type[PreTrainedModel] = (
        get_class_from_dynamic_module(own, base.uri)
        if own and remote_code
        else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    )
    return found


class _Base:
    """A base with the adapters that were activated on it so far."""

    def __init__(
        self,
        base: Artifact,
        weights: Weights,
        dtype: Literal["float32", "bfloat16"],
        student: Policy,
    ) -> None:
        self.key = base.key
        config = AutoConfig.from_pretrained(base.uri, trust_remote_code=student.remote_code)
        kind = _model_class(config, base, student.remote_code)
        model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
        use_kernels(model)
        # A sharded student is gathered under autocast, in which the check's tolerances do not hold.
        with torch.autocast("cpu", enabled=False):
            check_head(Policy(model, student.tokenizer), base)
        # Copied: the weight is mapped from its file, and a head that outlives its model would keep all of it in memory.
        head = model.get_output_embeddings().weight
        head.data = head.data.clone()
        self.model: PreTrainedModel | PeftModel = model.to(student.device).eval()
        self.model.requires_grad_(False)
        if dtype == "bfloat16":
            narrow(self.model)
        self._device = student.device
        self._on_host: dict[Tensor, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of all weights, those of adapters included."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def to_host(self) -> None:
        """Leave the device. The host's copy is made once, because the weights never change."""
        for tensor in self._tensors():
            if tensor not in self._on_host:
                copy = tensor.data.cpu()
                # Pinned memory is copied to a GPU several times as fast.
                self._on_host[tensor] = copy.pin_memory() if torch.accelerator.is_available() else copy
            tensor.data = self._on_host[tensor]

    def to_device(self) -> None:
        """Return to the device."""
        for tensor in self._tensors():
            tensor.data = tensor.data.to(self._device, non_blocking=True)

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @contextlib.contextmanager
    def activated(self, teacher: Artifact) -> Iterator[PreTrainedModel | PeftModel]:
        """A context that yields this teacher: the base itself, or the base with the teacher's adapter."""
        if teacher.key == self.key:
            with self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext():
                yield self.model
            return
        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, teacher.uri, adapter_name=teacher.key)
            self.model.eval().requires_grad_(False)
        elif teacher.key not in self.model.peft_config:
            self.model.load_adapter(teacher.uri, adapter_name=teacher.key)
            self.model.eval().requires_grad_(False)
        if self.model.active_adapter != teacher.key:
            self.model.set_adapter(teacher.key, inference_mode=True)
        yield self.model


class SharedBase:
    """The student's own base, with a teacher's adapter activated temporarily; the student is then restored."""

    def __init__(self, student: Policy) -> None:
        self.student = student

    @contextlib.contextmanager
    def activated(self, teacher: Artifact) -> Iterator[PeftModel]:
        """A context in which the student's model is this teacher."""
        model = self.student.model
        assert isinstance(model, PeftModel)
        own, training = model.active_adapter, model.training
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            if teacher.key == self.student.adapter_base:
                with model.eval().disable_adapter():
                    yield model
            else:
                if teacher.key not in model.peft_config:
                    model.load_adapter(teacher.uri, adapter_name=teacher.key, is_trainable=False)
                model.set_adapter(teacher.key, inference_mode=True)
                yield model.eval()
        finally:
            model.set_adapter(own)
            # peft sets what is trained for whole adapters; the student's selection is finer.
            model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            model.train(training)
