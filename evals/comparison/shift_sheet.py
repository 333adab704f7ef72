"""Schemas and readers of `shift.json` and `cosines.json`: a checkpoint's distance from the run's start. Free of torch.

Shape suffixes: `N` examples, `G` independent ones.
"""

from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import Field, ValidationError, model_validator

from base.errors import UserError
from evals.statistics.units import by_unit
from stages.config.training import Positive, Share, StrictModel

SHIFT_FILE = "shift.json"
COSINES_FILE = "cosines.json"
# Measures of a domain, and measures of the weights.
DOMAIN_MEASURES = ("kl_start", "kl_policy", "entropy", "length", "repetition")
WEIGHT_MEASURES = ("changed_bfloat16", "changed_float32", "rounded_away", "relative_norm")

Sheet = TypeVar("Sheet", bound=StrictModel)


class ExampleShift(StrictModel):
    """One prompt: a completion by the start and one by the checkpoint; divergences in nats, mean over its tokens."""

    id: str = Field(description="The example's.")
    source: str = Field(description="The unit the example is made from; see `evals.statistics.units`.")
    kl_start: float = Field(description="KL(start || checkpoint) on the start's completion.")
    start_tokens: Positive = Field(description="Tokens of that completion.")
    kl_policy: float = Field(description="KL(checkpoint || start) on the checkpoint's completion.")
    entropy: float = Field(description="The checkpoint's entropy on its completion.")
    tokens: Positive = Field(description="Tokens of that completion.")


class DomainShift(StrictModel):
    """One domain: means over the tokens of all completions, in nats."""

    kl_start: float = Field(description="KL(start || checkpoint) along the start's completions.")
    kl_policy: float = Field(description="KL(checkpoint || start) along the checkpoint's completions.")
    entropy: float = Field(description="The checkpoint's entropy along its completions.")
    length: float = Field(description="Mean tokens of the checkpoint's completions, EOS included.")
    repetition: float | None = Field(description="Their compression ratio; none where all are too short to compress.")
    examples: Annotated[list[ExampleShift], Field(min_length=1)] = Field(description="Each example.")

    @property
    def kl_start_N(self) -> np.ndarray:
        """Values by example whose mean is `kl_start`, for its interval.

        A mean over tokens is a ratio r = Σ kl·n / Σ n of sums over examples; these are its linearisation,
        r + (kl - r)·n / mean(n), whose variance is the delta method's.
        """
        tokens_N = np.array([example.start_tokens for example in self.examples], dtype=float)
        kl_N = np.array([example.kl_start for example in self.examples])
        ratio = float(np.sum(kl_N * tokens_N) / np.sum(tokens_N))
        values_N: np.ndarray = ratio + (kl_N - ratio) * tokens_N / np.mean(tokens_N)
        return values_N

    @property
    def kl_start_G(self) -> np.ndarray:
        """`kl_start_N` as one value for each independent example; see `evals.statistics.units.by_unit`."""
        return by_unit(self.kl_start_N, [example.source for example in self.examples])


class WeightChange(StrictModel):
    """The change of some of the weights."""

    weights: Positive = Field(description="How many.")
    changed_bfloat16: Share = Field(description="Share that differs by more than 1e-5, both rounded to bfloat16.")
    changed_float32: Share = Field(description="Share that differs by more than 1e-5 in float32.")
    relative_norm: float = Field(ge=0, description="Norm of the difference, relative to that of the start's weights.")

    @property
    def rounded_away(self) -> float:
        """Share changed in float32 minus the share changed in bfloat16."""
        return self.changed_float32 - self.changed_bfloat16


class WeightShift(WeightChange):
    """The change of all weights and of their parts; a tied head is counted once, among the embeddings."""

    embeddings: WeightChange | None = Field(description="Input embeddings.")
    layers: list[WeightChange] = Field(description="Decoder layers, in order.")
    head: WeightChange | None = Field(description="The output head; none where it is tied.")
    rest: WeightChange | None = Field(description="Weights in no other part, such as the last norm.")


class ShiftSheet(StrictModel):
    """`shift.json`."""

    domains: dict[str, DomainShift] = Field(min_length=1, description="By domain.")
    weights: WeightShift = Field(description="The weights.")

    def values(self) -> dict[tuple[str, str], float]:
        """(measure, domain, or "" for the weights) -> value; measures that could not be computed are absent."""
        found = {
            (name, domain): getattr(self.domains[domain], name) for name in DOMAIN_MEASURES for domain in self.domains
        }
        found |= {(name, ""): getattr(self.weights, name) for name in WEIGHT_MEASURES}
        return {key: value for key, value in found.items() if value is not None}


class CosineSheet(StrictModel):
    """`cosines.json`: cosines between the experts' task vectors (weights less the start's)."""

    experts: list[str] = Field(min_length=2, description="Their names.")
    cosines: list[list[Annotated[float, Field(ge=-1.001, le=1.001)] | None]] = Field(
        description="One row per expert, in that order; none where a task vector is zero."
    )

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        if {len(self.cosines), *map(len, self.cosines)} != {len(self.experts)}:
            raise ValueError(f"cosines: a row and a column for each of {len(self.experts)} experts")
        return self

    def values(self) -> dict[tuple[str, str], float]:
        """(expert, another) -> cosine, each pair once, in order."""
        pairs = [(i, j) for i in range(len(self.experts)) for j in range(i + 1, len(self.experts))]
        found = {(self.experts[i], self.experts[j]): self.cosines[i][j] for i, j in pairs}
        return {pair: value for pair, value in found.items() if value is not None}


def read_shift(folder: Path) -> ShiftSheet:
    """Read and check the sheet in a shift artifact's folder.

    Raises:
        UserError: the sheet is missing or malformed; the message names the file and the place in it.
    """
    return _read(folder / SHIFT_FILE, ShiftSheet)


def read_cosines(folder: Path) -> CosineSheet:
    """Read and check the sheet in a cosines artifact's folder; errors as for `read_shift`."""
    return _read(folder / COSINES_FILE, CosineSheet)


def _read(path: Path, schema: type[Sheet]) -> Sheet:
    try:
        return schema.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: the sheet does not exist") from None
    except ValidationError as error:
        first: Any = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {f'{place}: ' if place else ''}{first['msg']}") from None
