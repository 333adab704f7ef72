"""Rollouts from vLLM servers: prompts are dispatched to the servers that answer, and each gets the student's weights.

A server may end and return in the middle of a step. Its unanswered prompts go to the other servers, or again to it once
it is back. A restarted server has no version of the student's weights, and receives them. If a server restarts
unnoticed during its requests, its answers are discarded.

Only one stage at a time samples with a server, because the server has that stage's weights; another stage waits.
"""

import contextlib
import itertools
import queue
import shutil
import time
from collections.abc import Sequence

import torch
from filelock import FileLock, Timeout

from base.errors import UserError
from base.hashing import stable_hash
from stages.config.on_policy import OnPolicyConfig
from stages.learner.ranks import while_others_wait
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import Policy
from stages.sampling.agreement import plain_logits
from stages.sampling.sampler import parse_logprobs
from stages.sampling.samples import Gap, Sample, Sampling
from stages.vllm.dispatch import dispatch
from stages.vllm.engine import check_context, prompt_seed
from stages.vllm.handover import Probe
from stages.vllm.remote_handover import RemoteHandOver
from stages.vllm.server import Completion, Ends, ServerLostError, VllmServer, wait_for_any
from stages.vllm.settings import logprobs_mode, rows_at_a_time
from stages.vllm.weight_transfer import takes_transfers

# Completions that each server scores when its gap to the trainer is measured.
MEASURED_ROWS = 4


class RemoteSampler:
    """A `Sampler` over servers, used by every process of a stage.

    Args:
        learner: The student; its main process hands the weights over.
        config: Lengths, temperature, adapter and `sampler`.
        workspace: `servers` has the URLs; servers read weights from its folder.

    Raises:
        UserError: no server is named, vLLM cannot report the log-probabilities that these settings need, or the first
            server that answers was started with other settings.
        ServerLostError: no server answers.
    """

    def __init__(self, learner: Learner, config: OnPolicyConfig, workspace: Workspace) -> None:
        urls = workspace.servers.get("rollout", ())
        if not urls:
            raise UserError(
                f"{workspace.name}: sampler.backend vllm_server without a server; name some in "
                f"resources.rollout_servers.urls"
            )
        self.mode = logprobs_mode(config.temperature, config.top_p)
        self.learner = learner
        self.config = config
        self.ends = Ends(learner.policy.stop_ids, learner.policy.barred_ids)
        self.folder = workspace.folder / "rollout-weights"
        self.version = 0
        self._log: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._locks = contextlib.ExitStack()
        self.servers = [VllmServer(url, config.sampler.timeout_seconds) for url in urls]

        def occupy() -> None:
            for url in sorted(urls):
                self._hold(workspace.store.lock(_lock_name(url)), url)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

        while_others_wait(occupy)
        self._student = RemoteHandOver(learner.policy, config, workspace.key, self.folder, self.mode)
        first = wait_for_any(self.servers, config.sampler.start_seconds)[0]
        self._student.check(first)
        self.model, self.context = first.base_model(), first.context()

    def update_weights(self, policy: Policy, version: int) -> None:
        """Hand the policy's weights over to the servers that answer; others get them when they answer.

        Raises:
            UserError: a server cannot load them, or scores differently from the trainer.
        """
        # In every process: a forward pass of sharded weights needs all of them.
        with self.learner.layers_gathered_in_turn():
            probe = Probe.of(policy, self.config)
        if self.learner.accelerator.is_main_process:
            self._student.publish(policy, version, probe, self._is_direct())
        else:
            self._student.take_part(policy)
        self.version = version

        def hand_over() -> None:
            for server in self.servers:
                try:
                    self._student.bring_up_to_date(server, policy, True)
                except ServerLostError as error:
                    # It loads files when it answers again.
                    self._lost(error)

        while_others_wait(hand_over)

    def sample(
        self, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Arguments and result as for `stages.sampling.sampler.sample`.

        Raises:
            UserError: a prompt with its completion does not fit the servers' context, or `sampling` needs
                log-probabilities of another kind than the servers were started for.
            ServerLostError: completions are missing after all retries.
        """
        if sampling.temperature > 0 and logprobs_mode(sampling.temperature, sampling.top_p) != self.mode:
            raise UserError(f"the servers report {self.mode}, which does not fit temperature {sampling.temperature}")
        check_context(prompts, sampling.max_new_tokens, self.context)
        found: dict[int, list[Sample]] = {}
        at_once = max(1, rows_at_a_time(self.config) // group_size)
        # vLLM refuses several greedy completions of one prompt, which would all be the same.
        drawn = group_size if sampling.temperature > 0 else 1
        name = self._student.served_name(self.model)

        def ask(server: VllmServer, index: int) -> list[Completion]:
            own = prompt_seed(seed, index)
            return server.complete(name, prompts[index], drawn, sampling, own, self.ends)

        for attempt in range(self.config.sampler.retries + 1):
            missing = [index for index in range(len(prompts)) if index not in found]
            if not missing:
                break
            if attempt:
                self._log.put(f"{len(missing)} of {len(prompts)} prompts are asked again (attempt {attempt + 1})")
            for server, answers, failed in dispatch(missing, self._ready(), ask, at_once, self._lost):
                # A failed server got no further requests, so its answers are from before it failed.
                if failed or self._is_current(server):
                    found |= {i: self._samples(prompts[i], answer, group_size) for i, answer in answers.items()}
        if len(found) < len(prompts):
            raise ServerLostError(
                f"{len(prompts) - len(found)} of {len(prompts)} prompts without completions after "
                f"{self.config.sampler.retries + 1} attempts at {', '.join(server.url for server in self.servers)}"
            )
        return [found[index] for index in range(len(prompts))]

    def measure(self, policy: Policy, samples: Sequence[Sample]) -> Gap:
        """Measure the gap between the servers and the trainer, at temperature 1, on completions of any origin.

        Args:
            policy: The policy whose weights the servers received last.
            samples: Completions; every server that has the weights scores up to `MEASURED_ROWS` of them.

        Raises:
            FloatingPointError: a log-probability is not a finite number.
        """
        total, tokens, most, name = 0.0, 0, -1.0, self._student.served_name(self.model)
        servers = [server for server in self.servers if self._is_current(server)]
        measured = samples[: MEASURED_ROWS * len(servers)]
        for drawn, server in zip(measured, itertools.cycle(servers), strict=False):
            try:
                scored = server.score(name, drawn.tokens, len(drawn.prompt_ids), 0)
            except ServerLostError as error:
                self._lost(error)
                continue
            pairs = zip(scored, drawn.completion_ids, strict=True)
            theirs_N = parse_logprobs([by_id[token] for by_id, token in pairs], f"the vLLM server {server.url}")
            own_NV = plain_logits(policy.model, drawn, self.config.dtype)
            gap_N = (token_logprobs(own_NV, torch.tensor(drawn.completion_ids)) - theirs_N).abs()
            total, tokens, most = total + float(gap_N.sum()), tokens + len(gap_N), max(most, float(gap_N.max()))
        return Gap(total, tokens, most)

    def logprob_gap(self) -> Gap | None:
        """Always None: the loop measures the gap on the samples, or a `PrefetchSampler` calls `measure`."""
        return None

    def drain_log(self) -> list[str]:
        """Return the new log lines: lost servers, waits for another stage, and repeated requests."""
        lines = []
        while not self._log.empty():
            lines.append(self._log.get())
        return lines

    def close(self) -> None:
        """Close the connections and release the locks; the servers keep running."""
        self._student.close()
        for server in self.servers:
            server.close()
        # No barrier here: another rank may have failed, and a barrier would hang.
        if self.learner.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._locks.close()

    def _hold(self, lock: FileLock, url: str) -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._log.put(f"waited for another stage that samples with {url}")
            lock.acquire()
        self._locks.callback(lock.release)

    def _samples(self, prompt: list[int], answer: Sequence[Completion], group_size: int) -> list[Sample]:
        samples = [
            Sample(
                prompt,
                drawn.token_ids,
                parse_logprobs(drawn.logprobs, "a vLLM server"),
                finished=drawn.stopped or drawn.token_ids[-1] in self.ends.stop_ids,
                version=self.version,
            )
            for drawn in answer
        ]
        return samples * (group_size // len(samples))

    def _ready(self) -> list[VllmServer]:
        """Wait until at least one server has the student's weights; returns all that have them.

        Raises:
            ServerLostError: none has them in time.
        """
        deadline = time.monotonic() + self.config.sampler.start_seconds
        while True:
            ready, reasons = [], []
            for server in wait_for_any(self.servers, self.config.sampler.start_seconds, self._lost):
                try:
                    self._student.bring_up_to_date(server, self.learner.policy)
                    ready.append(server)
                except ServerLostError as error:
                    self._lost(error)
                    reasons.append(str(error))
            if ready:
                return ready
            if time.monotonic() > deadline:
                raise ServerLostError(f"no server takes the student's weights: {'; '.join(reasons)}")
            time.sleep(0.5)

    def _is_direct(self) -> bool:
        """Whether full weights need no files: all servers take them over NCCL, and this process has them until the next
        hand-over, in case a restarted server needs them again."""
        if self.config.sampler.ahead or self.learner.sharded:
            return False
        try:
            return all(takes_transfers(server) for server in self.servers)
        except ServerLostError:
            return False

    def _lost(self, error: ServerLostError) -> None:
        self._log.put(f"lost: {error}")

    def _is_current(self, server: VllmServer) -> bool:
        try:
            return self._student.is_current(server)
        except ServerLostError as error:
            self._lost(error)
            return False


def _lock_name(url: str) -> str:
    return f"server-{stable_hash(url)[:12]}"
