"""Teachers behind vLLM servers: of each token they tell its log-probability and those of the likeliest ones.

Shape suffixes: N completion tokens, C those of one chunk, V vocabulary, K tokens a server tells of.

A teacher is found on a server by its content key, the name it is served under, so that no other checkpoint can stand
in for it. Rows of several teachers are scored at the same time, each on its own servers.
"""

import contextlib
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import UserError
from stages.config.distill import DistillConfig
from stages.learner.update import Row
from stages.vllm.server import ServerLostError, VllmServer
from stages.vllm.spread import spread

ROWS_AT_ONCE = 64
# Probability left for the tokens a server told nothing of, where rounding leaves none.
LEAST_REST = 1e-9


@dataclass(frozen=True)
class Known:
    """What a server told of one row.

    Attributes:
        ids_NK: Tokens told of; the sampled one fills up what is short of K.
        logprobs_NK: Their log-probabilities.
        sampled_N: Those of the sampled tokens.
        rest_N: Log-probability of each other token, were they all alike.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    sampled_N: Tensor
    rest_N: Tensor

    @classmethod
    def of(cls, told: Sequence[Mapping[int, float]], tokens: Sequence[int], width: int, vocabulary: int) -> "Known":
        """Lay out what was told of each token.

        Args:
            told: Log-probability by id, for each token.
            tokens: The sampled tokens.
            width: K.
            vocabulary: V.
        """
        ids = [[*known, *[token] * (width - len(known))] for known, token in zip(told, tokens, strict=True)]
        logprobs = [[known[token] for token in row] for known, row in zip(told, ids, strict=True)]
        left = [max(LEAST_REST, 1.0 - sum(math.exp(value) for value in known.values())) for known in told]
        even = [math.log(share / max(1, vocabulary - len(known))) for share, known in zip(left, told, strict=True)]
        # Rounding must not lift the others above the likeliest K − 1.
        least = [sorted(known.values(), reverse=True)[width - 2] if width > 1 else 0.0 for known in told]
        rest = [min(pair) for pair in zip(even, least, strict=True)]
        sampled = [known[token] for known, token in zip(told, tokens, strict=True)]
        return cls(torch.tensor(ids), torch.tensor(logprobs), torch.tensor(sampled), torch.tensor(rest))


@dataclass(frozen=True)
class RemoteScores:
    """What servers told of one rollout's rows; read like `stages.teachers.scoring.TeacherScores`.

    Attributes:
        known: By row.
        vocabulary: V.
        seconds: Time each teacher took, by its name; several at the same time.
        device: Where the student's logits are.
        exact: Whether all of a distribution is known.
    """

    known: Sequence[Known]
    vocabulary: int
    seconds: Mapping[str, float]
    device: torch.device
    exact: bool = False

    def logits(self, rows: Sequence[int]) -> Callable[[slice], Tensor]:
        """Of a slice of the rows' tokens laid end to end log-probabilities [C, V]: exact for the likeliest tokens and
        the sampled one, what is left spread evenly over the others. The likeliest K stay the likeliest K."""
        ids_NK, logprobs_NK, rest_N = (
            torch.cat([getattr(self.known[i], name) for i in rows]) for name in ("ids_NK", "logprobs_NK", "rest_N")
        )

        def read(part: slice) -> Tensor:
            whole_CV = rest_N[part].to(self.device)[:, None].repeat(1, self.vocabulary)
            return whole_CV.scatter_(1, ids_NK[part].to(self.device), logprobs_NK[part].to(self.device))

        return read

    def apart(self, rows: Sequence[int]) -> dict[str, Callable[[slice], tuple[Tensor, Tensor]]]:
        """Nothing: a row has one teacher."""
        del rows
        return {}

    def logprobs(self, rows: Sequence[int], tokens_N: Tensor, temperature: float) -> Tensor:
        """Log-probability [N] of each of the rows' sampled tokens."""
        assert temperature == 1.0
        del tokens_N
        return torch.cat([self.known[i].sampled_N for i in rows]).to(self.device)


class RemoteTeachers:
    """Servers that score for a stage.

    Args:
        urls: The servers; each teacher is on one or more of them.
        teachers: Content key -> name, for messages and metrics.
        config: The merge's objective, timeout and retries.
        vocabulary: The student's output tokens.

    Raises:
        UserError: no server is named, or one that answers does not serve what it should.
        ServerLostError: a teacher is on no server that answers.
    """

    def __init__(
        self, urls: Sequence[str], teachers: Mapping[str, str], config: DistillConfig, vocabulary: int
    ) -> None:
        if not urls:
            raise UserError(
                "merge.teacher_backend: vllm_server without a server; name some in resources.teacher_servers.urls"
            )
        self.teachers = teachers
        self.config = config
        self.vocabulary = vocabulary
        self.top = config.objective.top_k.k if config.objective.top_k else 0
        self.servers = [VllmServer(url, config.sampler.timeout_seconds) for url in urls]
        self.context = sys.maxsize
        self._lost: list[ServerLostError] = []
        self._serving = self._find(list(teachers))

    def check_room(self, tokens: int) -> None:
        """See that a row fits: scoring it takes one token more.

        Raises:
            UserError: it does not.
        """
        if tokens + 1 > self.context:
            raise UserError(
                f"a prompt and its completion have up to {tokens} tokens, and scoring them takes one more; the "
                f"teachers' servers take {self.context}; lower merge.max_new_tokens or shorten the domains' prompts"
            )

    def score(self, rows: Sequence[Row], keys: Sequence[str], device: torch.device) -> RemoteScores:
        """Ask of every row its own teacher.

        Raises:
            ServerLostError: answers are missing after all retries.
        """
        mine: dict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            mine[key].append(index)
        known: dict[int, Known] = {}
        seconds: dict[str, float] = {}

        def work(key: str) -> None:
            started = time.monotonic()
            known.update(self._score(key, mine[key], rows))
            seconds[self.teachers[key]] = time.monotonic() - started

        with ThreadPoolExecutor(max(1, len(mine))) as pool:
            for future in [pool.submit(work, key) for key in mine]:
                future.result()
        return RemoteScores([known[i] for i in range(len(rows))], self.vocabulary, seconds, device)

    def news(self) -> list[str]:
        """Servers lost since this was asked last."""
        told, self._lost = [f"lost: {error}" for error in self._lost], []
        return told

    def close(self) -> None:
        """Close the connections; the servers go on running."""
        for server in self.servers:
            server.close()

    def _score(self, key: str, mine: Sequence[int], rows: Sequence[Row]) -> dict[int, Known]:
        def ask(server: VllmServer, index: int) -> Known:
            row = rows[index]
            told = server.score(key, row.tokens, row.start, self.top)
            return Known.of(told, row.targets, self.top + 1, self.vocabulary)

        found: dict[int, Known] = {}
        for attempt in range(self.config.sampler.retries + 1):
            missing = [index for index in mine if index not in found]
            if not missing:
                return found
            servers = self._find([key])[key] if attempt else self._serving[key]
            for _, answers, _ in spread(missing, servers, ask, ROWS_AT_ONCE, self._lost.append):
                found |= answers
        if len(found) == len(mine):
            return found
        raise ServerLostError(
            f"teacher {self.teachers[key]}: {len(mine) - len(found)} of {len(mine)} rows without scores after "
            f"{self.config.sampler.retries + 1} attempts: {self._lost[-1]}"
        )

    def _find(self, keys: Sequence[str]) -> dict[str, list[VllmServer]]:
        """The servers of each teacher, once every one of them has some."""
        deadline = time.monotonic() + self.config.sampler.timeout_seconds
        while True:
            serving: dict[str, list[VllmServer]] = {key: [] for key in keys}
            served: list[str] = []
            up = []
            for server in self.servers:
                with contextlib.suppress(ServerLostError):
                    models = server.models()
                    up.append(server)
                    served += models
                    self.context = min(self.context, server.context())
                    for key in serving.keys() & models.keys():
                        serving[key].append(server)
            lacking = [key for key, servers in serving.items() if not servers]
            if not lacking:
                return serving
            names = ", ".join(f"{self.teachers[key]} ({key})" for key in lacking)
            if len(up) == len(self.servers):
                raise UserError(
                    f"resources.teacher_servers.urls: no server serves {names}; served are {', '.join(served)}. "
                    f"`mopd serve teachers` serves a run's teachers under their content keys"
                )
            if time.monotonic() > deadline:
                down = ", ".join(server.url for server in self.servers if server not in up)
                raise ServerLostError(f"no server of teacher {names} answers; down are {down}")
            time.sleep(0.5)
