"""TeacherPool: every sample is scored once, by the teacher its domain is routed to.

Shape suffixes: B rows, T tokens, N completion tokens, H hidden, V vocabulary.

Residency: teachers that are adapters of one base share that base; of full checkpoints at most `max_resident` stay in
memory, the least recently used is dropped and read again from the store when its turn comes. Output heads stay, for
an exact divergence reads logits long after the forward pass: hidden states are kept and logits formed in chunks.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.errors import UserError, nearest
from stages.config import DistillConfig
from stages.core.checkpoint import Artifact, Store
from stages.core.packing import micro_batches
from stages.core.policy import HiddenStates, Policy, completion_hidden, head_weight, tokenizer_difference
from stages.core.update import CHUNK_TOKENS, Row, pad_rows
from stages.on_policy.losses import token_logprobs


@dataclass(frozen=True)
class TeacherScores:
    """What the routed teachers say of one rollout's rows.

    Attributes:
        teachers: Key of each row's teacher.
        hidden: The teacher's hidden states [N, H] that predict the row's completion tokens.
        heads: Output head [V, H] of each teacher.
    """

    teachers: Sequence[str]
    hidden: Sequence[Tensor]
    heads: Mapping[str, Tensor]

    def logits(self, rows: Sequence[int]) -> Callable[[slice], Tensor]:
        """Logits of the rows' tokens laid end to end, a slice [C, V] at a time."""
        hidden_NH = torch.cat([self.hidden[i] for i in rows])
        lengths = torch.tensor([len(self.hidden[i]) for i in rows])
        present = sorted({self.teachers[i] for i in rows})
        owner_N = torch.tensor([present.index(self.teachers[i]) for i in rows]).repeat_interleave(lengths)

        def read(part: slice) -> Tensor:
            hidden_CH, owner_C = hidden_NH[part], owner_N[part]
            first = int(owner_C[0])
            if bool((owner_C == first).all()):
                return (hidden_CH @ self.heads[present[first]].T).float()
            width = self.heads[present[first]].shape[0]
            logits_CV = torch.empty(len(hidden_CH), width, device=hidden_CH.device)
            for number, teacher in enumerate(present):
                index = (owner_C == number).nonzero().squeeze(1).to(hidden_CH.device)
                logits_CV[index] = (hidden_CH[index] @ self.heads[teacher].T).float()
            return logits_CV

        return read

    def logprobs(self, rows: Sequence[int], tokens_N: Tensor, temperature: float) -> Tensor:
        """Log-probability [N] of each of the rows' sampled tokens under its teacher."""
        read = self.logits(rows)
        parts = [slice(start, start + CHUNK_TOKENS) for start in range(0, len(tokens_N), CHUNK_TOKENS)]
        return torch.cat([token_logprobs(read(part) / temperature, tokens_N[part]) for part in parts])


class TeacherPool:
    """Routes rows to teachers and keeps as many in memory as allowed.

    Args:
        teachers: domain -> checkpoint, the strict routing.
        store: Where the bases of adapters are.
        student: Whose tokens the teachers must be able to score.
        config: The merge's config.

    Raises:
        UserError: a teacher's tokenizer or vocabulary differs from the student's; names domain and teacher.
    """

    def __init__(self, teachers: Mapping[str, Artifact], store: Store, student: Policy, config: DistillConfig) -> None:
        self.teachers = teachers
        self.store = store
        self.student = student
        self.config = config
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.backbones: OrderedDict[str, _Backbone] = OrderedDict()
        self.heads: dict[str, Tensor] = {}
        self._preflight()

    @torch.no_grad()
    def score(self, rows: Sequence[Row], domains: Sequence[str]) -> TeacherScores:
        """Forward every row through its own teacher, teacher after teacher.

        Raises:
            UserError: a row's domain has no teacher.
        """
        owners = [self._route(domain).key for domain in domains]
        hidden: list[Tensor] = [torch.empty(0)] * len(rows)
        for key in sorted(set(owners), key=lambda key: (key not in self.backbones, key)):
            mine = [i for i, owner in enumerate(owners) if owner == key]
            with self._resident(next(t for t in self.teachers.values() if t.key == key)) as model:
                forward = HiddenStates(model)
                for batch in micro_batches([len(rows[i].tokens) for i in mine], self.config.micro_batch_tokens):
                    chosen = [mine[i] for i in batch]
                    tokens_BT, mask_BT = pad_rows([rows[i] for i in chosen], self.student.pad_id)
                    device = self.student.device
                    hidden_NH = completion_hidden(forward(tokens_BT.to(device)), mask_BT.to(device))
                    parts = hidden_NH.split([rows[i].scored for i in chosen])
                    for i, part_NH in zip(chosen, parts, strict=True):
                        hidden[i] = part_NH
        return TeacherScores(owners, hidden, self.heads)

    def _route(self, domain: str) -> Artifact:
        if domain not in self.teachers:
            raise UserError(f"domain '{domain}' has no teacher{nearest(domain, self.teachers)}")
        return self.teachers[domain]

    @contextlib.contextmanager
    def _resident(self, teacher: Artifact) -> Iterator[torch.nn.Module]:
        """The teacher's model, in memory and with its adapter active."""
        base = teacher.manifest.get("adapter_base") or teacher.key
        if base not in self.backbones:
            while len(self.backbones) >= self.config.max_resident:
                self.backbones.popitem(last=False)
            self.backbones[base] = _Backbone(self.store.get(base), self.dtype, self.student.device)
        self.backbones.move_to_end(base)
        with self.backbones[base].wearing(teacher) as model:
            if teacher.key not in self.heads:
                self.heads[teacher.key] = head_weight(model).detach()
            yield model

    def _preflight(self) -> None:
        """Refuse a teacher that reads or writes other tokens than the student."""
        for domain, teacher in self.teachers.items():
            difference = tokenizer_difference(self.student.tokenizer, AutoTokenizer.from_pretrained(teacher.uri))
            if difference:
                raise UserError(
                    f"merge.teachers.{domain}: the tokenizer of teacher {teacher.name} differs from the student's: "
                    f"{difference}; a teacher scores the student's own tokens, so both must share one tokenizer"
                )
            with self._resident(teacher) as model:
                rows, ours = head_weight(model).shape[0], self.student.head_VH.shape[0]
            if rows != ours:
                raise UserError(
                    f"merge.teachers.{domain}: teacher {teacher.name} has {rows} output tokens, the student {ours}; "
                    f"both must be padded to one vocabulary"
                )


class _Backbone:
    """A base in memory with the adapters it has worn so far."""

    def __init__(self, base: Artifact, dtype: torch.dtype, device: torch.device) -> None:
        self.key = base.key
        self.model = AutoModelForCausalLM.from_pretrained(base.uri, dtype=dtype).to(device).eval()
        self.model.requires_grad_(False)

    @contextlib.contextmanager
    def wearing(self, teacher: Artifact) -> Iterator[torch.nn.Module]:
        """The model as this teacher: the base itself, or the base with the teacher's adapter."""
        if teacher.key == self.key:
            with self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext():
                yield self.model
            return
        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, teacher.uri, adapter_name=teacher.key)
        elif teacher.key not in self.model.peft_config:
            self.model.load_adapter(teacher.uri, adapter_name=teacher.key)
        self.model.set_adapter(teacher.key)
        self.model.eval()
        self.model.requires_grad_(False)
        yield self.model
