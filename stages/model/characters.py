"""The characters, keywords and chat form of the models that are pretrained here. Free of torch.

`stages.model.tiny` makes their tokenizer of it.
"""

import re

from experts.domain import Prompt

PAD, EOS, USER, ASSISTANT, UNKNOWN = "<pad>", "<end>", "<user>", "<assistant>", "<unk>"
# One token each: they save positions in code, the lab's longest text.
KEYWORDS = ("def ", "return ", "lambda ", " if ", " else ", " for ", " in ", " and ", " or ", "not ", "max(", "min(")
CHARACTERS = (*(chr(code) for code in range(32, 127)), "\n")
PIECE = "|".join(word.replace("(", r"\(") for word in KEYWORDS) + r"|[\s\S]"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ('" + USER + "' if message['role'] == 'user' else '" + ASSISTANT + "') "
    "+ message['content'] }}{% if message['role'] == 'assistant' %}{{ '" + EOS + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def text_tokens(text: str) -> int:
    """Tokens of a text."""
    return len(re.findall(PIECE, text))


def prompt_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt in the chat form, up to where the completion begins."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ends = sum(message["role"] == "assistant" for message in messages)
    return sum(1 + text_tokens(message["content"]) for message in messages) + ends + 1


def written(text: str) -> str:
    """What a model that writes this text is read as having written."""
    return "".join(letter for letter in text if letter in CHARACTERS)
