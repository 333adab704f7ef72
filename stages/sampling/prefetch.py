"""Prefetched rollouts: while the student is trained on one batch, servers draw the next batch with its old weights.

The weights that draw a batch are then one batch of updates old. Losses with an importance weight correct for this with
the sampler's log-probabilities. The exact divergences have no such weight, so their prompts are continued by a slightly
older student.

On prefetched samples the gap between sampler and trainer includes the effect of the update. So the gap itself is
measured on completions of the previous batch, right after the new weights were sent.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from stages.model.policy import Policy
from stages.sampling.sampler import Request, Sampler
from stages.sampling.samples import Gap, Sample, Sampling

Groups = list[list[Sample]]
Measure = Callable[[Policy, Sequence[Sample]], Gap]


class PrefetchSampler:
    """A `Sampler` that answers a step's request with samples drawn during the previous step.

    Args:
        inner: Draws outside of this process, so that it can draw while the student is updated.
        request_of: The request of a step, counted from 1; None after the last step.
        settle: Returns once every process of the stage has called it.
        measure: Measures the gap between `inner` and the trainer on earlier completions, both with the same weights.
    """

    def __init__(
        self,
        inner: Sampler,
        request_of: Callable[[int], Request | None],
        settle: Callable[[], None],
        measure: Measure,
    ) -> None:
        self.inner = inner
        self.measure = measure
        self.request_of = request_of
        self.settle = settle
        self._step = 0
        self._drawing: tuple[Request, Future[Groups]] | None = None
        self._drawn: list[Sample] | None = None
        self._gap: Gap | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    @property
    def context(self) -> int | None:
        """The context of the inner sampler."""
        return self.inner.context

    def update_weights(self, policy: Policy, version: int) -> None:
        """Send the policy's weights to the inner sampler once no draw with the old weights is running."""
        if self._drawing is not None:
            # Only waits; `sample` raises the failure.
            self._drawing[1].exception()
        # Another process may still draw with the weights that this one would replace.
        self.settle()
        self.inner.update_weights(policy, version)
        self._gap = self.measure(policy, self._drawn) if self._drawn is not None else None
        self._step = version + 1

    def sample(self, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int) -> Groups:
        """Arguments, result and errors as for `stages.sampling.sampler.sample`; starts the next step's draw."""
        request = Request(prompts, group_size, sampling, seed)
        if self._drawing is not None and self._drawing[0] == request:
            groups, self._drawing = self._drawing[1].result(), None
        else:
            # A check may sample in between: a batch that is being drawn is kept for its step.
            groups = self.inner.sample(prompts, group_size, sampling, seed)
        # Only a step's own request starts the next draw.
        if request == self.request_of(self._step):
            self._drawn = [group[0] for group in groups]
            if (upcoming := self.request_of(self._step + 1)) is not None:
                self._drawing = (upcoming, self._thread.submit(self._draw, upcoming))
        return groups

    def _draw(self, request: Request) -> Groups:
        return self.inner.sample(request.prompts, request.group_size, request.sampling, request.seed)

    def drain_log(self) -> list[str]:
        """The new log lines of the inner sampler."""
        return self.inner.drain_log()

    def logprob_gap(self) -> Gap | None:
        """The gap measured when the inner sampler received the weights; None before the second step."""
        return self._gap

    def close(self) -> None:
        """Wait for the running draw, and close the inner sampler."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.inner.close()
