"""Checks the data as tokens before any training: whether prompts fit, and whether the tokenizer can write the answers.

Models made here are character-level and need no tokenizer; an import's tokenizer is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from base.errors import UserError
from base.store.checkpoint import Store
from experts.domain import TRAIN, Domain, Example, Prompt
from experts.loading import load_domain
from flows.engines.shapes import origin
from flows.plan.nodes import Node, StageGraph
from stages.model import characters
from stages.rows.lengths import Limit, fit

# Number of a domain's gold answers that are encoded and decoded.
LOOKED_AT = 200
SHOWN = 80
# Kinds of domains whose scores cost money or time.
UNSCORED_KINDS = ("judge",)

Draws = Mapping[tuple[str, str], Sequence[Example]]


class Reader(Protocol):
    """A model's reading and writing of tokens.

    Attributes:
        context: Tokens of a prompt and its completion together; None if unknown.
        fault: Why the tokenizer cannot be used with the model; None if it can.
    """

    context: int | None
    fault: str | None

    def prompt(self, prompt: Prompt) -> int:
        """The number of tokens of a prompt."""

    def demonstration(self, prompt: Prompt, answer: str) -> tuple[int, int]:
        """Numbers of tokens of a prompt and of its answer, its end included."""

    def written(self, answer: str) -> tuple[int, str]:
        """The number of tokens of an answer, its end included, and the text that they decode to."""


class Characters:
    """The reader of models that are pretrained here."""

    fault: str | None = None

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.context: int | None = config["model"]["max_length"]

    def prompt(self, prompt: Prompt) -> int:
        """The number of tokens of a prompt."""
        return characters.prompt_tokens(prompt)

    def demonstration(self, prompt: Prompt, answer: str) -> tuple[int, int]:
        """Numbers of tokens of a prompt and of its answer, its end included."""
        return characters.prompt_tokens(prompt), characters.text_tokens(answer) + 1

    def written(self, answer: str) -> tuple[int, str]:
        """The number of tokens of an answer, its end included, and the text that they decode to."""
        return characters.text_tokens(answer) + 1, characters.written(answer)


class Imported:
    """The reader of an imported checkpoint.

    Args:
        tokenizer: Its tokenizer.
        files: Reads a JSON file of the checkpoint; empty if there is none.
    """

    def __init__(self, tokenizer: Any, files: Callable[[str], Mapping[str, Any]]) -> None:
        from stages.model.tokenizers import tokens_beyond

        config = files("config.json")
        shape = {**config, **config.get("text_config", {})}
        self.tokenizer = tokenizer
        self.context: int | None = shape.get("max_position_embeddings", shape.get("n_positions"))
        self.eos = files("generation_config.json").get("eos_token_id", shape.get("eos_token_id"))
        rows = shape.get("vocab_size")
        self.fault = None if rows is None else tokens_beyond(tokenizer.get_vocab(), rows)
        if tokenizer.eos_token_id is None:
            self.fault = "its tokenizer has no EOS token, so a completion could never end"

    def prompt(self, prompt: Prompt) -> int:
        """The number of tokens of a prompt."""
        from stages.rows.chat import encode_prompt

        return len(encode_prompt(self.tokenizer, prompt))

    def demonstration(self, prompt: Prompt, answer: str) -> tuple[int, int]:
        """Numbers of tokens of a prompt and of its answer, its end included."""
        from stages.rows.chat import encode_demonstration

        asked, target = encode_demonstration(self.tokenizer, prompt, answer)
        return len(asked), len(target)

    def written(self, answer: str) -> tuple[int, str]:
        """The number of tokens of an answer, its end included, and the text that they decode to, up to an end token."""
        from stages.rows.chat import decode_completions, encode_text, stop_ids

        stops = stop_ids(self.tokenizer, self.eos)
        ids = [*encode_text(self.tokenizer, answer), int(self.tokenizer.eos_token_id)]
        end = next(at for at, token in enumerate(ids) if token in stops)
        return len(ids), decode_completions(self.tokenizer, [ids[: end + 1]], stops)[0]


class TokenCheck:
    """Checks the domains of the nodes that will run, each once per tokenizer and limit.

    Args:
        graph: The run.
        store: The store, which may have the imports already.
        draws: Examples by domain and split.
        tokenizer_of: An origin's tokenizer; None if it is in a file that is not read yet.
    """

    def __init__(
        self, graph: StageGraph, store: Store, draws: Draws, tokenizer_of: Callable[[Node, Store], Any]
    ) -> None:
        self.graph, self.store, self.draws, self.tokenizer_of = graph, store, draws, tokenizer_of
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._readers: dict[str, Reader | None] = {}
        self._domains: dict[str, Domain] = {}
        self._done: set[tuple[Any, ...]] = set()

    def look(self, node: Node, key: str) -> None:
        """Check a node; `key` is the run file's key of its config."""
        reader = self._reader(origin(self.graph, node)) if node.domains and "examples" in node.config else None
        if reader is None:
            return
        split, config = str(node.config.get("split", TRAIN)), node.config
        for domain in node.domains:
            examples = self.draws.get((domain, split), ())[: int(config["examples"])]
            limits = tuple(config.get(name) for name in ("max_new_tokens", "max_prompt_tokens", "longer_prompts"))
            done = (id(reader), domain, split, node.stage in ("sft", "pretrain"), *limits)
            if not examples or done in self._done:
                continue
            self._done.add(done)
            try:
                self._lengths(node, reader, domain, examples)
            except UserError as error:
                text = str(error)
                self.problems.append(f"{key}: {text}" if text.startswith("domains.") else f"domains.{domain}: {text}")
                continue
            if (id(reader), domain) not in self._done:
                self._done.add((id(reader), domain))
                self._answers(reader, domain, examples)
            if config.get("max_new_tokens"):
                self.warnings += _long_answers(reader, f"{key}: domains.{domain}", examples, config["max_new_tokens"])

    def _lengths(self, node: Node, reader: Reader, domain: str, examples: Sequence[Example]) -> None:
        """Check that prompts fit, with their answers if these are learned.

        Raises:
            UserError: they do not fit, or the template refuses them.
        """
        fit(
            domain, examples, Limit.of(node.config, reader.context, node.config.get("max_new_tokens", 1)), reader.prompt
        )
        if node.stage not in ("sft", "pretrain") or reader.context is None:
            return
        sizes = [sum(reader.demonstration(example.prompt, example.answer)) for example in examples]
        long = [size for size in sizes if size > reader.context]
        if long and Limit.of(node.config, None, 0).longer == "refuse":
            raise UserError(
                f"domains.{domain}: {len(long)} of {len(sizes)} prompts with their answers do not fit a context of "
                f"{reader.context} tokens (the longest have {max(long)}); shorten them, or set longer_prompts: drop or "
                f"truncate"
            )

    def _answers(self, reader: Reader, domain: str, examples: Sequence[Example]) -> None:
        """Check for gold answers that the model cannot write exactly: training on them earns no reward."""
        looked = [example for example in examples[:LOOKED_AT] if reader.written(example.answer)[1] != example.answer]
        entry = self.graph.config.domains[domain]
        if looked and entry.options.get("kind", entry.kind) not in UNSCORED_KINDS:
            scorer = self._domains.setdefault(domain, load_domain(domain, entry.kind, entry.options))
            read = scorer.score_all([(example, reader.written(example.answer)[1]) for example in looked])
            gold = scorer.score_all([(example, example.answer) for example in looked])
            looked = [example for example, ours, best in zip(looked, read, gold, strict=True) if ours < best]
        if not looked:
            return
        total, first = len(examples[:LOOKED_AT]), looked[0].answer
        text = (
            f"domains.{domain}: {len(looked)} of {total} gold answers are changed by the model's tokenizer, so "
            f"they would not get the full score, for example {first[:SHOWN]!r}, "
            f"read back as {reader.written(first)[1][:SHOWN]!r}"
        )
        (self.problems if len(looked) == total else self.warnings).append(text)

    def _reader(self, first: Node) -> Reader | None:
        if first.key not in self._readers:
            self._readers[first.key] = reader = self._make(first)
            if reader is not None and reader.fault:
                self.problems.append(f"{first.name}: {reader.fault}")
        return self._readers[first.key]

    def _make(self, first: Node) -> Reader | None:
        if first.stage == "pretrain":
            return Characters(first.config)
        tokenizer = self.tokenizer_of(first, self.store)
        if tokenizer is None:
            return None
        artifact = self.store.find(first.key)
        folder = artifact.path if artifact is not None else Path(str(first.config["location"]))
        hub = artifact is None and first.config["kind"] == "hub"

        def files(name: str) -> Mapping[str, Any]:
            path: Path | None = folder / name
            if hub:
                from flows.plan.templates import of_hub

                path = of_hub(first.config["location"], first.config["revision"], name)
            return {} if path is None or not path.is_file() else dict(json.loads(path.read_text()))

        return Imported(tokenizer, files)


def _long_answers(reader: Reader, place: str, examples: Sequence[Example], limit: int) -> Iterator[str]:
    """Yield a message if gold answers are longer than any completion may be."""
    sizes = [reader.written(example.answer)[0] for example in examples[:LOOKED_AT]]
    if long := [size for size in sizes if size > limit]:
        yield (
            f"{place}: {len(long)} of {len(sizes)} gold answers are longer than max_new_tokens {limit} (the longest "
            f"has {max(long)} tokens)"
        )
