"""Names for the parts of a step in what the pretended device counts."""

import contextlib
from collections.abc import Iterator

import stages.distill
import stages.learner.supervised
import stages.on_policy.loop
import stages.sampling.sampler
import stages.teachers.scoring
from stages.learner.training import Learner
from tests.vcuda.device import record


@contextlib.contextmanager
def _phase(name: str) -> Iterator[None]:
    before, record.phase = record.phase, name
    try:
        yield
    finally:
        record.phase = before


def label() -> None:
    """Wrap the parts of a step, for the rest of the process."""
    loop, sampler = stages.on_policy.loop, stages.sampling.sampler
    parts = [(sampler._Batch, "_prefill", "prefill"), (sampler._Batch, "_decode", "decode")]
    parts += [(loop, "accumulate", "update"), (stages.learner.supervised, "accumulate", "update")]
    parts += [(Learner, name, name) for name in ("update", "save", "resume")]
    parts += [(stages.teachers.scoring.TeacherPool, "score", "teachers"), (stages.distill, "preflight", "preflight")]
    for owner, name, phase in parts:
        setattr(owner, name, _phase(phase)(getattr(owner, name)))
