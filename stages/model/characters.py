"""The characters, keywords and chat form of the models that are pretrained from scratch. Free of torch.

`stages.model.tiny` builds their tokenizer from these.
"""

import re

from experts.domain import Prompt

PAD, EOS, USER, ASSISTANT, UNKNOWN = "<pad>", "<end>", "<user>", "<assistant>", "<unk>"
# One token each: they shorten code, the lab's longest text.
KEYWORDS = ("def ", "return ", "lambda ", " if ", " else ", " for ", " in ", " and ", " or ", "not ", "max(", "min(")
CHARACTERS = (*(chr(code) for code in range(32, 127)), "\n")
PIECE = "|".join(word.replace("(", r"\(") for word in KEYWORDS) + r"|[\s\S]"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ('" + USER + "' if message['role'] == 'user' else '" + ASSISTANT + "') "
    "+ message['content'] }}{% if message['role'] == 'assistant' %}{{ '" + EOS + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def text_tokens(text: str) -> int:
    """Number of tokens of a text."""
    return len(re.findall(PIECE, text))


def prompt_tokens(prompt: Prompt) -> int:
    """Number of tokens of a prompt in the chat form, up to the beginning of the completion."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ends = sum(message["role"] == "assistant" for message in messages)
    return sum(1 + text_tokens(message["content"]) for message in messages) + ends + 1


def written(text: str) -> str:
    """The text as a model with this tokenizer can write it: without other characters."""
    return "".join(letter for letter in text if letter in CHARACTERS)
