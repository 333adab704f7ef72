"""Which teachers' weights are in memory, and how a model becomes each of them.

Teachers that are adapters of one base share that base; a student that is one more adapter of it lends its own. Of
other bases at most `max_resident` are in memory: the least recently used goes, and while one teacher scores, a thread
reads the weights of the next. No teacher carries gradients.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from base.store.checkpoint import Artifact, Store
from stages.model.linear import use_onednn
from stages.model.policy import Policy, check_head
from stages.model.remote_code import options

Weights = dict[str, Tensor]


def base_key(teacher: Artifact) -> str:
    """Key of the full checkpoint under a teacher: its own, or its adapter's base."""
    return str(teacher.manifest.get("adapter_base") or teacher.key)


class PoolConfig(Protocol):
    """How teachers are held and run; a merge's config says it."""

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Their number type."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward."""

    @property
    def max_resident(self) -> int:
        """Full checkpoints in memory at one time."""

    @property
    def teacher_cache(self) -> Literal["device", "cpu"]:
        """Where hidden states wait for the updates."""


@dataclass(frozen=True)
class Held:
    """How one reference beside a learner is held and run."""

    dtype: Literal["float32", "bfloat16"]
    micro_batch_tokens: int
    max_resident: int = 1
    teacher_cache: Literal["device", "cpu"] = "device"


class Residents:
    """The bases in memory.

    Args:
        store: Where they are read from.
        student: Lends its base where it is an adapter itself.
        config: `max_resident`, `dtype`.
        lends: Whether the student may lend: not where a data-parallel wrapper holds its parameters.
    """

    def __init__(self, store: Store, student: Policy, config: PoolConfig, lends: bool) -> None:
        self.store = store
        self.student = student
        self.config = config
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.lent = _Lent(student) if lends and student.adapter_base and isinstance(student.model, PeftModel) else None
        self.bases: OrderedDict[str, _Base] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._reading: dict[str, Future[Weights]] = {}

    def ordered(self, teachers: Iterable[Artifact]) -> list[Artifact]:
        """Teachers by base, those in memory first and of them the least recently used: it is the next to go."""
        recency = {key: index for index, key in enumerate(self.bases)}
        return sorted(teachers, key=lambda t: (recency.get(base_key(t), len(recency)), base_key(t), t.key))

    def read_ahead(self, coming: Sequence[Artifact]) -> None:
        """Start to read the next teacher's base if it is not in memory; it counts as one of those that may be."""
        key = base_key(coming[0]) if coming else None
        if key is None or self.config.max_resident < 2 or key in self.bases or key in self._reading:
            return
        if not self._is_lent(key):
            self._drop_to(self.config.max_resident - 1)
            self._reading[key] = self._reader.submit(_read, self.store.get(key))

    @contextlib.contextmanager
    def wearing(self, teacher: Artifact) -> Iterator[PreTrainedModel | PeftModel]:
        """The model as this teacher, in eval mode."""
        key = base_key(teacher)
        if self.lent is not None and self._is_lent(key):
            with self.lent.wearing(teacher) as model:
                yield model
            return
        with self._base(key).wearing(teacher) as model:
            yield model

    def drop_all(self) -> None:
        """Keep none in memory, but for what the student lends."""
        self._drop_to(0)

    def _base(self, key: str) -> "_Base":
        """A base in memory; room for it is made before it is read."""
        if key not in self.bases:
            reading = self._reading.pop(key, None)
            self._drop_to(max(0, self.config.max_resident - 1 - len(self._reading)))
            base = self.store.get(key)
            weights = reading.result() if reading else _read(base)
            self.bases[key] = _Base(base, weights, self.dtype, self.student.device, self.student.tokenizer)
        self.bases.move_to_end(key)
        return self.bases[key]

    def _is_lent(self, key: str) -> bool:
        return self.lent is not None and key == self.student.adapter_base

    def _drop_to(self, allowed: int) -> None:
        """Drop the least recently used until no more are left than allowed."""
        while len(self.bases) > allowed:
            self.bases.popitem(last=False)


def _read(base: Artifact) -> Weights:
    """All weights of a checkpoint, on the CPU."""
    return {
        name: tensor for file in sorted(base.path.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def _model_class(config: PreTrainedConfig, base: Artifact) -> type[PreTrainedModel]:
    """The class of a base's model: transformers' own, or the one it brings where that may be run."""
    own = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    found: type[PreTrainedModel] = (
        get_class_from_dynamic_module(own, base.uri)
        if own and options()["trust_remote_code"]
        else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    )
    return found


class _Base:
    """A base with the adapters it has worn so far."""

    def __init__(
        self,
        base: Artifact,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.key = base.key
        config = AutoConfig.from_pretrained(base.uri, **options())
        kind = _model_class(config, base)
        model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
        check_head(Policy(model, tokenizer), base)
        use_onednn(model)
        _narrow(model, dtype)
        # Read from the file it is mapped from; a head outlives its model, and would keep the whole file in memory.
        head = model.get_output_embeddings().weight
        head.data = head.data.clone()
        self.model: PreTrainedModel | PeftModel = model.to(device).eval()
        self.model.requires_grad_(False)

    @contextlib.contextmanager
    def wearing(self, teacher: Artifact) -> Iterator[PreTrainedModel | PeftModel]:
        """The model as this teacher: the base itself, or the base with the teacher's adapter."""
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


def _narrow(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep what autocast would narrow anyway in the narrow type, and no more: an equal teacher is then equal."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.to(dtype)


class _Lent:
    """The student's own base: it wears a teacher's adapter for a while and is left as it was."""

    def __init__(self, student: Policy) -> None:
        self.student = student

    @contextlib.contextmanager
    def wearing(self, teacher: Artifact) -> Iterator[PeftModel]:
        """The student's model as this teacher."""
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
            # peft decides by adapter what is trained; the student's choice was finer.
            model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            model.train(training)
