"""Rejects wrong answers to which verifiers of reasoning-gym give full marks.

Seen in reasoning-gym 0.1.25, task by task, with the gold answer cut, doubled, in a sentence and beside another answer.
Its default verifier gives len(gold) / len(answer) to any text that contains the gold, and many others give credit for a
part of the answer. A score is how often an answer is right, so only full marks count. The tasks below give full marks
to wrong answers.
"""

import ast
import re
from fractions import Fraction

# One text is right; the verifier searches for it inside the answer, or ignores the text around it.
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
# Several answers are right; the verifier ignores all other characters than these.
_NUMBER = r"-?\d+(?:\.\d+)?(?:/\d+)?"
WRITTEN_IN = {
    # The verifier takes the first two of a longer list of coordinates, and a distance of NaN as 0.
    "advanced_geometry": re.compile(rf"\(?\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)?|{_NUMBER}\s*°?"),
    "complex_arithmetic": re.compile(r"[\dij\s.+*()-]*"),
    "kakurasu": re.compile(r"[01\s]*"),
    "quantum_lock": re.compile(r"[A-Z→\s]*"),
    "sokoban": re.compile(r"[LRUDlrud\s]*"),
    "survo": re.compile(r"[\d\s-]*"),
    # The verifier takes the first word as the number of days, and ignores a minus sign.
    "time_intervals": re.compile(r"(?:\d+\s+days?)?,?\s*(?:\d+(?::\d+)+(?:\.\d+)?)?"),
}
# Lists in which the verifier ignores superfluous entries.
AS_LONG_AS_GOLD = frozenset({"cryptarithm", "word_sorting"})
# A probability of limited length, so that no exponent fills the memory.
_PROBABILITY = re.compile(r"\d{0,40}\.?\d{1,40}(?:[eE]-?\d{1,3}|\s?/\s?\d{1,40})?")
# The verifier gives full marks to the first digits of a probability.
PROBABILITIES = frozenset({"coin_flip"})


def without_full_stop(answer: str, gold: str) -> str:
    """The answer without a full stop that ends a sentence."""
    return answer[:-1].rstrip() if answer.endswith(".") and not gold.endswith(".") else answer


def may_be_right(task: str, answer: str, gold: str) -> bool:
    """False for an answer to which the task's verifier could give full marks although it is wrong."""
    if task in ONE_TEXT:
        return answer.removesuffix(".").casefold().split() == gold.removesuffix(".").casefold().split()
    if task in AS_LONG_AS_GOLD:
        return answer.count(",") == gold.count(",")
    if task in PROBABILITIES:
        return _is_near(answer, gold)
    if task == "puzzle24":
        return _makes_24(answer, gold)
    if task == "time_intervals" and (":" in answer) != (":" in gold):
        return False
    pattern = WRITTEN_IN.get(task)
    return pattern is None or bool(pattern.fullmatch(answer))


def _is_near(answer: str, gold: str) -> bool:
    """Whether two numbers or fractions differ by at most 1e-4 and by at most a hundredth of the right one."""
    if not _PROBABILITY.fullmatch(answer):
        return False
    try:
        given, right = Fraction(answer.replace(" ", "")), Fraction(gold)
    except ZeroDivisionError:
        return False
    return abs(given - right) <= min(Fraction(1, 10_000), abs(right) / 100)


def _makes_24(answer: str, gold: str) -> bool:
    """Whether a formula is 24 exactly and uses each number of the gold formula once.

    The verifier accepts any four numbers within its range, and truncates fractions.
    """
    if sorted(re.findall(r"\d+", answer)) != sorted(re.findall(r"\d+", gold)):
        return False
    try:
        return _worked_out(ast.parse(answer.strip(), mode="eval").body) == 24
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _worked_out(node: ast.expr) -> Fraction:
    """The value of sums, differences, products and quotients of integers; raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_worked_out(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _worked_out(node.left), _worked_out(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
    raise ValueError("not a sum, difference, product or quotient")
