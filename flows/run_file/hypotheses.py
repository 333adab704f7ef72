"""Checks the names in the run file's hypotheses: each must be a checkpoint or a domain of the run. Free of torch."""

from collections.abc import Iterator

from base.errors import nearest
from flows.run_file.rounds import round_prefix
from flows.run_file.schema import BASE, BASELINES, COLD_START, STUDENT, VARIANTS, RunConfig


def hypothesis_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for each checkpoint or domain in a hypothesis that the run does not have."""
    checkpoints = checkpoint_names(config)
    measured = [*config.domain_names(config.evaluate.domains), *config.evaluate.harness_domains]
    for key, hypothesis in config.hypotheses.items():
        for name, test in hypothesis.tests.items():
            place = f"hypotheses.{key}.tests.{name}"
            for checkpoint in test.checkpoints:
                if checkpoint not in checkpoints:
                    yield f"{place}: unknown checkpoint '{checkpoint}'{nearest(checkpoint, checkpoints)}"
            for domain in [*(test.domains or []), *(test.fit.x_domains if test.fit else [])]:
                if domain not in measured:
                    yield f"{place}: '{domain}' is not a scored domain{nearest(domain, measured)}"


def checkpoint_names(config: RunConfig) -> list[str]:
    """The checkpoints that a hypothesis may compare; `teacher` is a domain's own teacher."""
    names = [BASE, *([COLD_START] if config.cold_start else []), *(f"experts/{name}" for name in config.experts)]
    if config.merge is None:
        return names
    rounds = [round_prefix(number, config.merge.rounds) for number in range(1, config.merge.rounds)]
    alone = [name for name, expert in config.experts.items() if not expert.checkpoint and not expert.start_from]
    names += [f"{earlier}{own}" for earlier in rounds for own in (*(f"experts/{name}" for name in alone), STUDENT)]
    baselines = [f"{BASELINES}{name}" for name in config.merge.baselines.named]
    return [*names, STUDENT, *(f"{VARIANTS}{name}" for name in config.merge.variants), *baselines, "teacher"]
