"""Stop strings: texts that end a completion, for example of a base model's few-shot prompt. Free of torch."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens before a stop string on which its decoding may depend, such as one after which a leading space is left out.
CONTEXT = 4


class StopStrings:
    """Finds the end of a completion while its tokens are drawn.

    Args:
        tokenizer: Decodes the tokens.
        strings: Each of them ends a completion; none is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token is at least one byte of text, or no text.
        self.window = max((len(text.encode()) for text in self.strings), default=0) + CONTEXT

    def ended(self, tails: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each row's last token completed a stop string.

        Args:
            tails: The last `window` tokens of each row, or all of a shorter row.
        """
        texts = self.tokenizer.batch_decode([list(tail) for tail in tails], skip_special_tokens=True)
        return [any(string in text for string in self.strings) for text in texts]

    def length(self, completion: Sequence[int]) -> int | None:
        """Number of tokens up to the one that completes a stop string, inclusive; None if none does."""
        tails = [completion[max(0, end - self.window) : end] for end in range(1, len(completion) + 1)]
        ended = self.ended(tails) if tails else []
        return ended.index(True) + 1 if True in ended else None


def before_stop(text: str, strings: Sequence[str]) -> str:
    """A completion's text up to the first stop string."""
    ends = [at for string in strings if (at := text.find(string)) >= 0]
    return text[: min(ends, default=len(text))]
