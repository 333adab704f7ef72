"""Rollouts one batch ahead: while the student is trained on one batch, servers draw the next with its old weights.

The weights a batch is drawn with are then one batch of updates old. Losses with an importance weight correct for it by
the sampler's log-probabilities; the exact divergences have none and see prompts continued by a slightly older student.

What was drawn tells the gap between sampler and trainer mixed with what the update moved. So the gap itself is measured
on completions of the batch before, right after the new weights were handed over.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from stages.model.policy import Policy
from stages.sampling.sampler import Gap, Request, Sample, Sampler, Sampling

Groups = list[list[Sample]]
Measure = Callable[[Policy, Sequence[Sample]], Gap]


class AheadSampler:
    """A `Sampler` that answers a step's request with what it drew during the step before.

    Args:
        inner: Draws elsewhere than in this process, so that it can while the student is updated.
        request_of: What will be asked for in a step, counted from 1; None after the last.
        settle: Returns once every process of the stage has called it.
        measure: How far `inner` is from the trainer on completions drawn before, both with the same weights.
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

    def follow(self, policy: Policy, version: int) -> None:
        """Take the policy's weights once nothing is being drawn with the old ones."""
        if self._drawing is not None:
            # A failure is told by `sample`.
            self._drawing[1].exception()
        # Another process may still be drawing with the weights that this one would replace.
        self.settle()
        self.inner.follow(policy, version)
        self._gap = self.measure(policy, self._drawn) if self._drawn is not None else None
        self._step = version + 1

    def sample(self, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int) -> Groups:
        """Arguments, result and errors as for `stages.sampling.sampler.sample`; the next step's drawing starts."""
        asked = Request(prompts, group_size, sampling, seed)
        if self._drawing is not None and self._drawing[0] == asked:
            groups, self._drawing = self._drawing[1].result(), None
        else:
            # What is being drawn for a step stays for it: a check may ask in between.
            groups = self.inner.sample(prompts, group_size, sampling, seed)
        # Only a step's own request is followed by another.
        if asked == self.request_of(self._step):
            self._drawn = [group[0] for group in groups]
            if (coming := self.request_of(self._step + 1)) is not None:
                self._drawing = (coming, self._thread.submit(self._draw, coming))
        return groups

    def _draw(self, request: Request) -> Groups:
        return self.inner.sample(request.prompts, request.group_size, request.sampling, request.seed)

    def news(self) -> list[str]:
        """The inner sampler's."""
        return self.inner.news()

    def gap(self) -> Gap | None:
        """Measured when the weights were taken; None before the second step."""
        return self._gap

    def close(self) -> None:
        """Wait for what is being drawn, and close the inner sampler."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.inner.close()
