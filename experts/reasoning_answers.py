"""Which answers of reasoning-gym's tasks are right, where its verifiers pay for others too.

Seen in reasoning-gym 0.1.25, task by task, with the gold answer cut, doubled, in a sentence and beside another answer.
Its default verifier pays len(gold) / len(answer) to whatever holds the gold, and many of the others pay for a part of
the answer; a score is how often an answer is right, so only full marks count. What follows gets full marks there for
answers that are not right.
"""

import re

# One text is right; the verifier looks for it inside the answer, or ignores what stands around it.
ONE_TEXT = frozenset(
    {
        "fraction_simplification",
        "game_of_life_halting",
        "gsm_symbolic",
        "knights_knaves",
        "letter_jumble",
        "spell_backward",
    }
)
# Several answers are right; the verifier leaves out whatever is written in other characters than these.
WRITTEN_IN = {
    "kakurasu": re.compile(r"[01\s]*"),
    "quantum_lock": re.compile(r"[A-Z→\s]*"),
    "sokoban": re.compile(r"[LRUDlrud\s]*"),
    "survo": re.compile(r"[\d\s-]*"),
}


def without_full_stop(answer: str, gold: str) -> str:
    """The answer without a full stop that ends it as a sentence."""
    return answer[:-1].rstrip() if answer.endswith(".") and not gold.endswith(".") else answer


def may_be_right(task: str, answer: str, gold: str) -> bool:
    """False for an answer to which the task's verifier could give full marks although it is wrong."""
    if task in ONE_TEXT:
        return answer.removesuffix(".").casefold().split() == gold.removesuffix(".").casefold().split()
    pattern = WRITTEN_IN.get(task)
    return pattern is None or bool(pattern.fullmatch(answer))
