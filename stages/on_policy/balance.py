"""How much each row and domain weighs in one update's loss.

Shape suffixes: N completion tokens of a row.

Without balancing, a domain of long answers dominates the gradient: with a mean over tokens its share of the loss is its
share of the tokens. The mean over domains and a budget are the published remedies (Open-MOPD; `max_domain_share`).
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.config.on_policy import OnPolicyConfig
from stages.learner.training import Learner
from stages.on_policy.shares import capped_shares


def loss_weights(
    domains: Sequence[str], lengths: Sequence[int], config: OnPolicyConfig, learner: Learner, names: Sequence[str]
) -> tuple[list[Tensor], dict[str, float]]:
    """Weights with which the sum over all processes' tokens is the mean that the config names.

    Args:
        domains: Domain of each row of this process.
        lengths: Completion tokens of each row.
        config: Normalisation and budget.
        learner: Sums over processes.
        names: All domains of the stage, in one order on every process.

    Returns:
        One vector [N] per row, and each domain's share of the loss.
    """
    by_sequence = config.loss_normalisation == "sequence"
    own: dict[str, float] = defaultdict(float)
    for domain, length in zip(domains, lengths, strict=True):
        own[domain] += 1.0 if by_sequence else float(length)
    mass = {name: total for name in names if (total := learner.global_sum(own[name])) > 0}
    wanted = dict.fromkeys(mass, 1.0) if config.loss_normalisation == "domain" else mass
    shares = capped_shares(wanted, config.max_domain_share)
    factors = {name: shares[name] / mass[name] for name in mass}
    weights = [
        torch.full((length,), factors[domain] / (length if by_sequence else 1))
        for domain, length in zip(domains, lengths, strict=True)
    ]
    return weights, shares
