"""The domains on which an expert is scored: its own, those it teaches, and a shared panel. Free of torch.

Scoring each of E experts on its own and all others' domains takes E x E evaluations, more than all training together.
"""

from collections.abc import Iterable

from flows.run_file.schema import RunConfig

# With up to this number of experts each is scored on every domain.
FEW_EXPERTS = 8
# Size of the default panel with more experts.
PANEL_DOMAINS = 4


def panel(config: RunConfig) -> list[str]:
    """The domains on which every expert is scored.

    Args:
        config: The run; `evaluate.expert_panel` names them. By default all with up to `FEW_EXPERTS` experts, else the
            first `PANEL_DOMAINS` that no expert trains, which show forgetting.
    """
    scored = config.domain_names(config.evaluate.domains)
    asked = config.evaluate.expert_panel
    if asked is not None:
        return scored if asked == "all" else list(asked)
    if len(config.experts) <= FEW_EXPERTS:
        return scored
    trained = {expert.domain for expert in config.experts.values()}
    return [domain for domain in scored if domain not in trained][:PANEL_DOMAINS]


def scored_domains(config: RunConfig, runs: Iterable[RunConfig]) -> dict[str, list[str]]:
    """The domains each expert is scored on, in the run's order.

    Args:
        config: The run.
        runs: The run and its variants, because an expert may teach other domains in each.

    Returns:
        Domains by expert: its own, those it teaches, and the panel, restricted to `evaluate.domains`.
    """
    shared = panel(config)
    wanted = {name: {expert.domain, *shared} for name, expert in config.experts.items()}
    for run in runs:
        for domain, weights in run.teachers().items():
            for teacher in weights.keys() & wanted.keys():
                wanted[teacher].add(domain)
    scored = config.domain_names(config.evaluate.domains)
    return {name: [domain for domain in scored if domain in own] for name, own in wanted.items()}
