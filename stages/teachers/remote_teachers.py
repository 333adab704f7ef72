"""Teachers behind vLLM servers: they report the log-probabilities of each sampled token and of the likeliest tokens.

Shape suffixes: N completion tokens, C those of one chunk, V vocabulary, K tokens that a server reports.

Servers serve a teacher under its content key, so that no other checkpoint can be used in its place. Rows of several
teachers are scored at the same time, each on its own servers.
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
from stages.vllm.dispatch import dispatch
from stages.vllm.server import ServerLostError, VllmServer

ROWS_AT_ONCE = 64
# The reported tokens in `TopLogprobs`.
REPORTED = ("ids_NK", "logprobs_NK")
# Probability of all tokens that a server did not report, if rounding leaves none.
LEAST_REST = 1e-9


@dataclass(frozen=True)
class TopLogprobs:
    """The log-probabilities that a server reported for one row.

    Attributes:
        ids_NK: The reported tokens; if there are fewer than K, the sampled token is repeated.
        logprobs_NK: Their log-probabilities.
        sampled_N: The log-probabilities of the sampled tokens.
        rest_N: Log-probability of each other token, with the remaining mass spread evenly.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    sampled_N: Tensor
    rest_N: Tensor

    @classmethod
    def of(
        cls, reported: Sequence[Mapping[int, float]], tokens: Sequence[int], width: int, vocabulary: int
    ) -> "TopLogprobs":
        """Return a server's report as tensors.

        Args:
            reported: Log-probability by id, for each token.
            tokens: The sampled tokens.
            width: K.
            vocabulary: V.
        """
        ids = [[*by_id, *[token] * (width - len(by_id))] for by_id, token in zip(reported, tokens, strict=True)]
        logprobs = [[by_id[token] for token in row] for by_id, row in zip(reported, ids, strict=True)]
        left = [max(LEAST_REST, 1.0 - sum(math.exp(value) for value in by_id.values())) for by_id in reported]
        even = [math.log(share / max(1, vocabulary - len(by_id))) for share, by_id in zip(left, reported, strict=True)]
        # Rounding must not raise the other tokens above the likeliest K − 1.
        least = [sorted(by_id.values(), reverse=True)[width - 2] if width > 1 else 0.0 for by_id in reported]
        rest = [min(pair) for pair in zip(even, least, strict=True)]
        sampled = [by_id[token] for by_id, token in zip(reported, tokens, strict=True)]
        return cls(torch.tensor(ids), torch.tensor(logprobs), torch.tensor(sampled), torch.tensor(rest))


@dataclass(frozen=True)
class RemoteScores:
    """The servers' scores of one rollout's rows; has the methods of `stages.teachers.scoring.Scores`.

    Attributes:
        reported: The reported log-probabilities of each row.
        vocabulary: V.
        seconds: Time each teacher took, by its name; several run at the same time.
        device: Where the student's logits are.
        exact: Whether the whole distribution is available.
    """

    reported: Sequence[TopLogprobs]
    vocabulary: int
    seconds: Mapping[str, float]
    device: torch.device
    exact: bool = False

    def logits(self, rows: Sequence[int]) -> Callable[[slice], Tensor]:
        """A function of a slice of the rows' concatenated tokens that returns their log-probabilities [C, V].

        The likeliest tokens and the sampled one are exact; the remaining mass is spread evenly over the others. The
        likeliest K remain the likeliest K.
        """
        ids_NK, logprobs_NK, rest_N = (
            torch.cat([getattr(self.reported[i], name) for i in rows]) for name in ("ids_NK", "logprobs_NK", "rest_N")
        )

        def read(part: slice) -> Tensor:
            whole_CV = rest_N[part].to(self.device)[:, None].repeat(1, self.vocabulary)
            return whole_CV.scatter_(1, ids_NK[part].to(self.device), logprobs_NK[part].to(self.device))

        return read

    def likeliest(self, rows: Sequence[int], k: int) -> Callable[[slice], tuple[Tensor, Tensor, Tensor]]:
        """A function of a slice of the rows' concatenated tokens that returns the teacher's k likeliest tokens.

        Returns:
            Token ids [C, K], their log-probabilities [C, K], and a mask [C, K] of the valid ones; valid ids are
            distinct.
        """
        ids_NK, logprobs_NK = (torch.cat([getattr(self.reported[i], name) for i in rows]) for name in REPORTED)

        def read(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            ids_CK = ids_NK[part].to(self.device)
            # The sampled token may fill up a row in which it is reported already.
            again_CK = (ids_CK[:, :, None] == ids_CK[:, None, :]).tril(-1).any(2)
            values_CK = logprobs_NK[part].to(self.device).masked_fill(again_CK, -torch.inf)
            best_CK, order_CK = values_CK.topk(min(k, values_CK.shape[1]))
            return ids_CK.gather(1, order_CK), best_CK, best_CK > -torch.inf

        return read

    def per_teacher_logits(self, rows: Sequence[int]) -> dict[str, Callable[[slice], tuple[Tensor, Tensor]]]:
        """Empty: each row has one teacher."""
        del rows
        return {}

    def logprobs(self, rows: Sequence[int], tokens_N: Tensor, temperature: float) -> Tensor:
        """Log-probability [N] of each of the rows' sampled tokens."""
        assert temperature == 1.0
        del tokens_N
        return torch.cat([self.reported[i].sampled_N for i in rows]).to(self.device)


class RemoteTeachers:
    """Client of the servers that score for a stage.

    Args:
        urls: The servers; each teacher is on one or more of them.
        teachers: Content key -> name, for messages and metrics.
        config: The merge's objective, timeout and retries.
        vocabulary: The student's output tokens.

    Raises:
        UserError: no server is named, or all servers answer and none serves some teacher.
        ServerLostError: no server that answers serves some teacher.
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
        self.top = config.objective.likeliest.k if config.objective.likeliest else 0
        self.servers = [VllmServer(url, config.sampler.timeout_seconds) for url in urls]
        self.context = sys.maxsize
        self._lost: list[ServerLostError] = []
        self._serving = self._find(list(teachers))

    def check_room(self, tokens: int) -> None:
        """Check that a row fits the servers' context: scoring it takes one more token.

        Raises:
            UserError: it does not.
        """
        if tokens + 1 > self.context:
            raise UserError(
                f"a prompt and its completion have up to {tokens} tokens, and scoring them takes one more; the "
                f"teachers' servers take {self.context}; lower merge.max_new_tokens or shorten the domains' prompts"
            )

    def score(self, rows: Sequence[Row], keys: Sequence[str], device: torch.device) -> RemoteScores:
        """Score every row by its own teacher.

        Args:
            rows: The rows.
            keys: Content key of each row's teacher.
            device: Where the student's logits are.

        Raises:
            ServerLostError: scores are missing after all retries.
        """
        mine: dict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            mine[key].append(index)
        reported: dict[int, TopLogprobs] = {}
        seconds: dict[str, float] = {}

        def work(key: str) -> None:
            started = time.monotonic()
            reported.update(self._score(key, mine[key], rows))
            seconds[self.teachers[key]] = time.monotonic() - started

        with ThreadPoolExecutor(max(1, len(mine))) as pool:
            for future in [pool.submit(work, key) for key in mine]:
                future.result()
        return RemoteScores([reported[i] for i in range(len(rows))], self.vocabulary, seconds, device)

    def drain_log(self) -> list[str]:
        """Return a line for each server lost since the last call."""
        lines, self._lost = [f"lost: {error}" for error in self._lost], []
        return lines

    def close(self) -> None:
        """Close the connections; the servers keep running."""
        for server in self.servers:
            server.close()

    def _score(self, key: str, mine: Sequence[int], rows: Sequence[Row]) -> dict[int, TopLogprobs]:
        def ask(server: VllmServer, index: int) -> TopLogprobs:
            row = rows[index]
            logprobs = server.score(key, row.tokens, row.start, self.top)
            return TopLogprobs.of(logprobs, row.targets, self.top + 1, self.vocabulary)

        found: dict[int, TopLogprobs] = {}
        for attempt in range(self.config.sampler.retries + 1):
            missing = [index for index in mine if index not in found]
            if not missing:
                return found
            servers = self._find([key])[key] if attempt else self._serving[key]
            for _, answers, _ in dispatch(missing, servers, ask, ROWS_AT_ONCE, self._lost.append):
                found |= answers
        if len(found) == len(mine):
            return found
        raise ServerLostError(
            f"teacher {self.teachers[key]}: {len(mine) - len(found)} of {len(mine)} rows without scores after "
            f"{self.config.sampler.retries + 1} attempts: {self._lost[-1]}"
        )

    def _find(self, keys: Sequence[str]) -> dict[str, list[VllmServer]]:
        """Wait until every teacher has a server; returns the servers of each.

        The time-out begins again with each further server that answers: those on one device start in turn.
        """
        deadline, most = time.monotonic() + self.config.sampler.start_seconds, 0
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
            if len(up) > most:
                deadline, most = time.monotonic() + self.config.sampler.start_seconds, len(up)
            lacking = [key for key, servers in serving.items() if not servers]
            if not lacking:
                return serving
            names = ", ".join(f"{self.teachers[key]} ({key})" for key in lacking)
            if len(up) == len(self.servers):
                raise UserError(
                    f"resources.teacher_servers.urls: no server serves {names}; they serve {', '.join(served)}. "
                    f"`mopd serve teachers` serves a run's teachers under their content keys"
                )
            if time.monotonic() > deadline:
                down = ", ".join(server.url for server in self.servers if server not in up)
                raise ServerLostError(f"no server of teacher {names} answers; these are down: {down}")
            time.sleep(0.5)
