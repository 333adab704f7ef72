"""Which answers of reasoning-gym's tasks are right, where its verifiers pay for others too.

Seen in reasoning-gym 0.1.25, task by task, with the gold answer cut, doubled, in a sentence and beside another answer.
Its default verifier pays len(gold) / len(answer) to whatever holds the gold, and many of the others pay for a part of
the answer; a score is how often an answer is right, so only full marks count. What follows gets full marks there for
answers that are not right.
"""

import ast
import re
from fractions import Fraction

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
_NUMBER = r"-?\d+(?:\.\d+)?(?:/\d+)?"
WRITTEN_IN = {
    # Of a longer list of coordinates the first two count there, and NaN is at no distance.
    "advanced_geometry": re.compile(rf"\(?\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)?|{_NUMBER}\s*°?"),
    "complex_arithmetic": re.compile(r"[\dij\s.+*()-]*"),
    "kakurasu": re.compile(r"[01\s]*"),
    "quantum_lock": re.compile(r"[A-Z→\s]*"),
    "sokoban": re.compile(r"[LRUDlrud\s]*"),
    "survo": re.compile(r"[\d\s-]*"),
    # The number of days is the first word there, and a minus sign is lost.
    "time_intervals": re.compile(r"(?:\d+\s+days?)?,?\s*(?:\d+(?::\d+)+(?:\.\d+)?)?"),
}
# Lists in which the verifier overlooks what is too much.
AS_LONG_AS_GOLD = frozenset({"cryptarithm", "word_sorting"})
# A probability, short, so that no exponent fills the memory.
_PROBABILITY = re.compile(r"\d{0,40}\.?\d{1,40}(?:[eE]-?\d{1,3}|\s?/\s?\d{1,40})?")
# The verifier gives full marks to the first digits of a probability.
PROBABILITIES = frozenset({"coin_flip"})


def without_full_stop(answer: str, gold: str) -> str:
    """The answer without a full stop that ends it as a sentence."""
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

    The verifier takes any four numbers within its range, and cuts a fraction off.
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
