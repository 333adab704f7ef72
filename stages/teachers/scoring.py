"""TeacherPool: every sample is scored once by each teacher of its domain.

Shape suffixes: B rows, T tokens, N completion tokens, C those of one chunk, M those of one teacher, H hidden,
V vocabulary.

Rows are sorted by teacher, so that the cost of scoring depends on the tokens, not on the number of teachers. A forward
pass keeps only the hidden states that predict completion tokens. Logits are computed from them and the teacher's output
head one chunk at a time, when an objective reads them, and again in every further update of the rollout.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from base.errors import UserError, nearest
from base.store.checkpoint import Artifact, Store
from stages.learner.update import Row
from stages.losses.chunked import chunk_length
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import HiddenStates, Policy, head_weight
from stages.model.precision import head_factor, head_logits
from stages.model.tokenizers import tokenizer_difference
from stages.rows.packing import micro_batches, pack
from stages.teachers.remote_teachers import RemoteTeachers
from stages.teachers.residency import PoolConfig, Residents, base_key

# The pseudo-domain of the policy that extrapolation moves away from and that a KL penalty stays close to.
REFERENCE = "(reference)"


@dataclass(frozen=True)
class Routed:
    """A teacher of a domain and its weight among the domain's teachers; only the ratio of weights counts."""

    teacher: Artifact
    weight: float = 1.0


class Scores(Protocol):
    """Teachers' scores of one rollout's rows; see `TeacherScores` for the methods."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time each teacher took, by its name."""

    @property
    def exact(self) -> bool:
        """Whether the whole distribution is available, or only its likeliest tokens and the sampled one."""

    def logits(self, rows: Sequence[int]) -> Callable[[slice], Tensor]:
        """A function of a slice of the rows' concatenated tokens that returns their target logits [C, V]."""

    def likeliest(self, rows: Sequence[int], k: int) -> Callable[[slice], tuple[Tensor, Tensor, Tensor]] | None:
        """The teachers' k likeliest tokens, see `RemoteScores`; None where the whole distribution is available."""

    def per_teacher_logits(self, rows: Sequence[int]) -> dict[str, Callable[[slice], tuple[Tensor, Tensor]]]:
        """Each teacher's own logits, by name, if some row has several teachers; else empty."""

    def logprobs(self, rows: Sequence[int], tokens_N: Tensor, temperature: float) -> Tensor:
        """Log-probability [N] of each of the rows' sampled tokens."""


@dataclass(frozen=True)
class TeacherScores:
    """The routed teachers' scores of one rollout's rows.

    Attributes:
        weights: Each row's teachers by key, with weights that sum to 1.
        hidden: The teachers' hidden states [N, H] that predict the row's completion tokens, by teacher.
        heads: Output head [V, H] of each teacher, as a factor of its logits.
        names: Name of each teacher.
        seconds: Time each teacher took, including loading, by its name.
        device: Where logits are computed.
        exact: Whether the whole distribution is available.
    """

    weights: Sequence[Mapping[str, float]]
    hidden: Sequence[Mapping[str, Tensor]]
    heads: Mapping[str, Tensor]
    names: Mapping[str, str]
    seconds: Mapping[str, float]
    device: torch.device
    exact: bool = True

    def logits(self, rows: Sequence[int]) -> Callable[[slice], Tensor]:
        """A function of a slice of the rows' concatenated tokens that returns their target logits [C, V].

        If a row has several teachers, their logits are averaged by weight. Up to normalisation this is the geometric
        mean of their distributions at any temperature, and Σ_i w_i·KL(S‖T_i) is the KL to it up to a constant.
        """
        present = sorted({key for i in rows for key in self.weights[i]})
        if len(present) == 1:
            whole_NH = torch.cat([self.hidden[i][present[0]] for i in rows])
            return lambda part: self._logits(whole_NH[part], present[0])
        shares = {key: self._share(rows, key) for key in present}
        total, width = sum(self._length(i) for i in rows), self.heads[present[0]].shape[0]

        def read(part: slice) -> Tensor:
            first, last, _ = part.indices(total)
            logits_CV = torch.zeros(last - first, width, device=self.device)
            for key, share in shares.items():
                here_M, theirs_MV, weights_M = self._read(share, key, first, last)
                if len(here_M):
                    logits_CV.index_add_(0, here_M, theirs_MV if share.alone else theirs_MV * weights_M[:, None])
            return logits_CV

        return read

    def likeliest(self, rows: Sequence[int], k: int) -> None:
        """None: the whole distribution is available."""
        del rows, k

    def per_teacher_logits(self, rows: Sequence[int]) -> dict[str, Callable[[slice], tuple[Tensor, Tensor]]]:
        """Each teacher's own logits, by name, if some row has several teachers; else empty.

        Each value is a function of a slice of the rows' concatenated tokens. It returns the positions [M] that the
        teacher scored, and its logits [M, V] there.
        """
        if all(len(self.weights[i]) == 1 for i in rows):
            return {}
        total = sum(self._length(i) for i in rows)

        def reader(key: str) -> Callable[[slice], tuple[Tensor, Tensor]]:
            share = self._share(rows, key)

            def read(part: slice) -> tuple[Tensor, Tensor]:
                first, last, _ = part.indices(total)
                here_M, theirs_MV, _ = self._read(share, key, first, last)
                return here_M, theirs_MV

            return read

        return {self.names[key]: reader(key) for key in sorted({key for i in rows for key in self.weights[i]})}

    def logprobs(self, rows: Sequence[int], tokens_N: Tensor, temperature: float) -> Tensor:
        """Log-probability [N] of each of the rows' sampled tokens under its teachers."""
        read = self.logits(rows)
        size = chunk_length(len(next(iter(self.heads.values()))), self.device)
        parts = [slice(start, start + size) for start in range(0, len(tokens_N), size)]
        return torch.cat([token_logprobs(read(part) / temperature, tokens_N[part]) for part in parts])

    def _length(self, row: int) -> int:
        return len(next(iter(self.hidden[row].values())))

    def _share(self, rows: Sequence[int], key: str) -> "_Share":
        """The tokens of the rows that a teacher scored."""
        starts = itertools.accumulate((self._length(i) for i in rows), initial=0)
        mine = [(i, start, self._length(i)) for i, start in zip(rows, starts, strict=False) if key in self.weights[i]]
        return _Share(
            torch.cat([torch.arange(start, start + length) for _, start, length in mine]),
            torch.cat([self.hidden[i][key] for i, _, _ in mine]),
            torch.cat([torch.full((length,), self.weights[i][key]) for i, _, length in mine]),
            all(len(self.weights[i]) == 1 for i, _, _ in mine),
        )

    def _read(self, share: "_Share", key: str, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """A teacher's positions [M] among the tokens from `first` to `last`, with its logits [M, V] and weights [M]."""
        # Positions ascend, so a slice of the tokens is a slice of each teacher's tokens.
        low, high = torch.searchsorted(share.index_M, torch.tensor([first, last])).tolist()
        here_M = (share.index_M[low:high] - first).to(self.device)
        return here_M, self._logits(share.hidden_MH[low:high], key), share.weights_M[low:high].to(self.device)

    def _logits(self, hidden_CH: Tensor, key: str) -> Tensor:
        factor_VH = self.heads[key]
        return head_logits(hidden_CH.to(factor_VH.device, non_blocking=True), factor_VH).float()


@dataclass(frozen=True)
class _Share:
    """One teacher's M tokens among the concatenated tokens of some rows.

    Attributes:
        index_M: Their positions, ascending.
        hidden_MH: The teacher's hidden states.
        weights_M: The teacher's weight for each token.
        alone: Whether none of these rows has another teacher.
    """

    index_M: Tensor
    hidden_MH: Tensor
    weights_M: Tensor
    alone: bool


class TeacherPool:
    """Routes rows to teachers and keeps as many in memory as allowed.

    Args:
        routes: domain -> its teachers; a domain without an entry is an error.
        store: The store of the teachers and their bases.
        student: The policy whose tokens the teachers score.
        config: The settings of teachers; a merge's config has them.
        share_base: Whether teachers may share the base of a student that is an adapter of the same base.
        remote: Scores instead of teachers in this process; the reference is always scored here.

    Raises:
        UserError: a teacher's tokenizer or vocabulary differs from the student's; the message names domain and teacher.
    """

    def __init__(
        self,
        routes: Mapping[str, Sequence[Routed]],
        store: Store,
        student: Policy,
        config: PoolConfig,
        share_base: bool = False,
        remote: RemoteTeachers | None = None,
    ) -> None:
        self.routes = routes
        self.remote = remote
        self.student = student
        self.config = config
        self.residents = Residents(store, student, config, share_base)
        self._preflight()

    @property
    def teachers(self) -> dict[str, Artifact]:
        """All teachers by key, each once."""
        return {routed.teacher.key: routed.teacher for taught in self.routes.values() for routed in taught}

    @torch.no_grad()
    def score(self, rows: Sequence[Row], domains: Sequence[str]) -> Scores:
        """Run every row through its own teachers, one teacher after another, or score on servers.

        Raises:
            UserError: a row's domain has no teacher.
            ServerLostError: a teacher's servers do not answer.
        """
        weights = [self._weights(domain) for domain in domains]
        if self.remote is not None and REFERENCE not in domains:
            return self.remote.score(rows, [next(iter(row)) for row in weights], self.student.device)
        hidden: list[dict[str, Tensor]] = [{} for _ in rows]
        heads: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        needed = {key: self.teachers[key] for key in {key for row in weights for key in row}}
        order = self.residents.ordered(needed.values())
        for number, teacher in enumerate(order):
            started = time.monotonic()
            mine = [i for i, row in enumerate(weights) if teacher.key in row]
            heads[teacher.key], found = self._run(teacher, [rows[i] for i in mine], order[number + 1 :])
            for i, part_NH in zip(mine, found, strict=True):
                hidden[i][teacher.key] = part_NH
            seconds[teacher.name] = seconds.get(teacher.name, 0.0) + time.monotonic() - started
        names = {key: teacher.name for key, teacher in needed.items()}
        return TeacherScores(weights, hidden, heads, names, seconds, self.student.device)

    def on_servers(self, domain: str) -> bool:
        """Whether servers score a domain's rows; their teachers are never loaded in this process."""
        return self.remote is not None and domain != REFERENCE

    @contextlib.contextmanager
    def teaching(self, domain: str) -> Iterator[Policy]:
        """A context that yields a domain's teacher as a policy to sample from; of several, the one of most weight."""
        routed = max(self._route(domain), key=lambda r: r.weight)
        with self.residents.activated(routed.teacher) as model:
            yield Policy(model, self.student.tokenizer, dtype=self.config.dtype)

    def _run(self, teacher: Artifact, rows: Sequence[Row], upcoming: Sequence[Artifact]) -> tuple[Tensor, list[Tensor]]:
        """A teacher's head [V, H] and its hidden states of the rows; no other tensor of the teacher is kept alive."""
        with self.residents.activated(teacher) as model:
            self.residents.read_ahead(upcoming)
            head_VH = head_weight(model)
            dtype = torch.bfloat16 if self.config.dtype == "bfloat16" else head_VH.dtype
            return head_factor(head_VH, dtype), self._forward(model, rows)

    def _forward(self, model: torch.nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """Hidden states [N, H] of each row's completion tokens."""
        forward = HiddenStates(model, self.config.dtype)
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in micro_batches([len(row.tokens) for row in rows], self.config.micro_batch_tokens):
            tokens, starts = [rows[i].tokens for i in batch], [rows[i].start for i in batch]
            packed = pack(tokens, starts, self.student.pad_id, self.student.device)
            hidden_NH = packed.scored(forward(*packed.inputs))
            if self.config.teacher_cache == "cpu":
                hidden_NH = hidden_NH.cpu()
            for i, part_NH in zip(batch, hidden_NH.split([rows[i].scored for i in batch]), strict=True):
                found[i] = part_NH
        return found

    def _route(self, domain: str) -> Sequence[Routed]:
        if domain not in self.routes:
            raise UserError(f"domain '{domain}' has no teacher{nearest(domain, self.routes)}")
        return self.routes[domain]

    def _weights(self, domain: str) -> dict[str, float]:
        """The weights of the domain's teachers by key, summing to 1; one checkpoint under two names counts as one."""
        weights: dict[str, float] = {}
        for routed in self._route(domain):
            weights[routed.teacher.key] = weights.get(routed.teacher.key, 0.0) + routed.weight
        total = sum(weights.values())
        return {key: weight / total for key, weight in weights.items()}

    def _preflight(self) -> None:
        """Refuse a teacher whose tokenizer or vocabulary differs from the student's."""
        checked: set[str] = set()
        for domain, taught in self.routes.items():
            for teacher in (routed.teacher for routed in taught if routed.teacher.key not in checked):
                checked.add(teacher.key)
                theirs = AutoTokenizer.from_pretrained(teacher.uri, trust_remote_code=self.student.remote_code)
                difference = tokenizer_difference(self.student.tokenizer, theirs)
                if difference:
                    raise UserError(
                        f"merge.teachers.{domain}: the tokenizer of teacher {teacher.name} differs from the student's: "
                        f"{difference}; a teacher scores the student's own tokens, so both must share one tokenizer"
                    )
                rows, ours = self._output_tokens(teacher, self.on_servers(domain)), self.student.head_VH.shape[0]
                if rows != ours:
                    raise UserError(
                        f"merge.teachers.{domain}: teacher {teacher.name} has {rows} output tokens, the student "
                        f"{ours}; both must be padded to one vocabulary"
                    )

    def _output_tokens(self, teacher: Artifact, elsewhere: bool) -> int:
        if elsewhere:
            base = self.residents.store.get(base_key(teacher))
            config = AutoConfig.from_pretrained(base.uri, trust_remote_code=self.student.remote_code)
            return int(config.get_text_config().vocab_size)
        with self.residents.activated(teacher) as model:
            return head_weight(model).shape[0]
