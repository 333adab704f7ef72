"""Splits a total by weights. Pure and free of torch."""

from collections.abc import Mapping


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split `total` in proportion to the weights, by largest remainder."""
    scale = total / sum(weights.values())
    counts = {name: int(weight * scale) for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: counts[name] - weights[name] * scale)
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def without_prompts(per_step: int, weights: Mapping[str, float]) -> list[str]:
    """A message for each domain that gets no prompt when a step's prompts are split by weight."""
    return [
        f"prompts_per_step {per_step} leaves no prompt for domain '{name}' of {len(weights)}; raise it, or the "
        f"domain's weight of {weights[name]:g}"
        for name, count in apportion(per_step, weights).items()
        if count == 0
    ]


def capped_shares(wanted: Mapping[str, float], cap: float) -> dict[str, float]:
    """Shares of 1 in proportion to `wanted`, none above `cap`; the excess goes to the others in proportion.

    With fewer than 1 / cap domains the shares cannot all stay below the cap; they are equal then.
    """
    if cap * len(wanted) <= 1.0:
        return dict.fromkeys(wanted, 1.0 / len(wanted)) if wanted else {}
    shares: dict[str, float] = {}
    free = dict(wanted)
    while True:
        scale = (1.0 - cap * len(shares)) / sum(free.values())
        over = [name for name, value in free.items() if value * scale > cap]
        if not over:
            return {name: shares.get(name, wanted[name] * scale) for name in wanted}
        for name in over:
            shares[name] = cap
            del free[name]
