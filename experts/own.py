"""A domain in a user's own Python file: all its results are checked here, and errors name file and line.

All stages reach such a domain through `OwnDomain`, so no score, example or fingerprint passes unchecked.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from base.errors import UserError
from base.hashing import stable_hash
from base.user_code import calling, import_file
from experts.data.prompts import chat, check_text
from experts.domain import Domain, Example

# A sum of shares in float32 may be this far above 1.
ROUNDING = 1e-6
SHOWN_CHARACTERS = 80


class OwnDomain(Domain):
    """Checks every call of a user's domain.

    Args:
        inner: The domain that their `load` returned.
        file: The file that defines it.
    """

    def __init__(self, inner: Domain, file: Path) -> None:
        super().__init__(inner.name)
        self.inner = inner
        self.file = file
        self.code = hashlib.sha256(file.read_bytes()).hexdigest()

    @property
    def splits(self) -> tuple[str, ...]:
        """The inner domain's."""
        with self._calling("splits"):
            return tuple(self.inner.splits)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The inner domain's."""
        with self._calling("left_out"):
            return tuple(str(line) for line in self.inner.left_out)

    @property
    def source_space(self) -> str:
        """The inner domain's."""
        with self._calling("source_space"):
            return str(self.inner.source_space)

    def supply(self, split: str) -> int | None:
        """The inner domain's."""
        with self._calling("supply"):
            return self.inner.supply(split)

    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """The inner domain's examples.

        Raises:
            UserError: the inner domain raises, or gives another number of examples, or one that cannot be used.
        """
        with self._calling("draw"):
            drawn = list(self.inner.draw(split, count, seed))
        if len(drawn) != count:
            raise self._mistake(f"draw gives {len(drawn)} examples of split '{split}' where {count} are asked for")
        prompts: set[str] = set()
        for number, example in enumerate(drawn, 1):
            self._check_example(example, f"example {number} of split '{split}'", prompts)
        return drawn

    def score(self, example: Example, completion: str) -> float:
        """The inner domain's score as a float in [0, 1].

        Raises:
            UserError: the inner domain raises, or gives anything else.
        """
        with self._calling(f"score, {_shown(example)}"):
            value = self.inner.score(example, completion)
        return self._score(value, example)

    def score_all(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        """The inner domain's scores as floats in [0, 1]; raises as `score` does."""
        if type(self.inner).score_all is Domain.score_all:
            return [self.score(example, completion) for example, completion in pairs]
        with self._calling("score_all"):
            values = list(self.inner.score_all(pairs))
        if len(values) != len(pairs):
            raise self._mistake(f"score_all gives {len(values)} scores for {len(pairs)} completions")
        return [self._score(value, example) for value, (example, _) in zip(values, pairs, strict=True)]

    def facts(self) -> dict[str, float]:
        """The inner domain's."""
        with self._calling("facts"):
            return {str(name): float(value) for name, value in self.inner.facts().items()}

    def news(self) -> list[str]:
        """The inner domain's."""
        with self._calling("news"):
            return [str(line) for line in self.inner.news()]

    def preflight(self) -> None:
        """The inner domain's."""
        with self._calling("preflight"):
            self.inner.preflight()

    def demonstration(self, example: Example, rng: random.Random, rough: bool = False) -> str:
        """The inner domain's.

        Raises:
            UserError: it raises, or gives no text.
        """
        with self._calling(f"demonstration, {_shown(example)}"):
            text = self.inner.demonstration(example, rng, rough)
        if not isinstance(text, str) or not text.strip():
            raise self._mistake(f"demonstration gives no text but {text!r:.60}, {_shown(example)}")
        return text

    def fingerprint(self) -> str:
        """The inner domain's.

        Raises:
            UserError: it raises, or gives no text.
        """
        with self._calling("fingerprint"):
            found = self.inner.fingerprint()
        if not isinstance(found, str) or not found:
            raise self._mistake(f"fingerprint gives no text but {found!r:.60}; `stable_hash` makes one")
        return found

    def _score(self, value: Any, example: Example) -> float:
        try:
            score = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            score = math.nan
        if not -ROUNDING <= score <= 1 + ROUNDING:
            raise self._mistake(
                f"score gives {value!s:.60} ({type(value).__name__}), {_shown(example)}; "
                f"a score is a number from 0 to 1"
            )
        return min(max(score, 0.0), 1.0)

    def _check_example(self, example: Any, where: str, prompts: set[str]) -> None:
        if not isinstance(example, Example):
            raise self._mistake(f"{where} is no Example but {type(example).__name__}")
        texts = {"answer": example.answer, "source": example.source}
        texts |= {"prompt": example.prompt} if isinstance(example.prompt, str) else {}
        for field, text in texts.items():
            if not isinstance(text, str):
                raise self._mistake(f"{where}: {field} is no text but {text!r:.60}")
            # If scoring needs no gold answer, it may be empty; `demonstration` refuses to teach it.
            if not text.strip() and field != "answer":
                raise self._mistake(f"{where}: {field} is empty")
        if example.domain != self.name:
            raise self._mistake(f"{where}: domain is '{example.domain}' in place of '{self.name}'")
        try:
            for field, text in texts.items():
                check_text(text, f"{where}: {field}")
            if not isinstance(example.prompt, str):
                chat(example.prompt, f"{where}: prompt", Counter())
            json.dumps(example.meta, allow_nan=False)
        except (UserError, TypeError, ValueError, RecursionError) as error:
            what = str(error) if isinstance(error, UserError) else f"{where}: meta cannot be stored as JSON: {error}"
            raise self._mistake(what) from None
        key = stable_hash(example.prompt)
        if key in prompts:
            raise self._mistake(f"{where} has the prompt of an earlier one: {example.prompt!r:.{SHOWN_CHARACTERS}}")
        prompts.add(key)

    def _mistake(self, text: str) -> UserError:
        return UserError(f"domains.{self.name}.kind: {self.file}: {text}")

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        with calling(f"domains.{self.name}.kind", self.file, what):
            yield


def load_own(name: str, file: Path, options: Mapping[str, Any], validate: Any) -> OwnDomain:
    """Make a domain from a user's file.

    Args:
        name: The domain's key in the run file.
        file: The Python file.
        options: The options of its entry.
        validate: Converts them to the file's `Options`.

    Raises:
        UserError: the file cannot be imported, or its `load` raises or makes no domain.
    """
    key = f"domains.{name}.kind"
    module = own_module(name, file)
    with calling(key, file, "load"):
        inner = module.load(name, validate(options))
    if not isinstance(inner, Domain):
        raise UserError(f"{key}: {file}: load returned {inner!r:.60}; it must return a Domain")
    return OwnDomain(inner, file)


def own_module(name: str, file: Path) -> Any:
    """Import a user's file under a unique name, once per process.

    Raises:
        UserError: the file does not exist, raises or ends the process, or lacks `Options` or `load`.
    """
    key = f"domains.{name}.kind"
    return import_file(key, file, lambda module: _check_module(key, file, module))


def _check_module(key: str, file: Path, module: Any) -> None:
    missing = [part for part in ("Options", "load") if not hasattr(module, part)]
    if missing:
        raise UserError(
            f"{key}: {file}: a domain's file must define Options and load; this one has no {' and no '.join(missing)}"
        )
    if not (isinstance(module.Options, type) and issubclass(module.Options, BaseModel)):
        raise UserError(f"{key}: {file}: Options is not a pydantic model; let it inherit experts.domain.Options")


def _shown(example: Example) -> str:
    """An example, for a message."""
    return f"for the example {example.id} with the prompt {example.prompt!r:.{SHOWN_CHARACTERS}}"
