"""reasoning-gym's tasks pay for the right answer alone, whatever their verifiers would give."""

import pytest

from experts.domain import TRAIN
from experts.loading import load_domain

# The default verifier, those that pay for a part, and those that give full marks to more than what is right.
DEFAULT = ("basic_arithmetic", "caesar_cipher", "maze", "syllogism", "string_manipulation", "word_sequence_reversal")
PARTIAL = ("chain_sum", "manipulate_matrix", "mini_sudoku", "products", "rectangle_count", "sentence_reordering")
PARTIAL += ("time_intervals", "tsumego", "word_sorting", "figlet_font", "game_of_life")
FULL = ("fraction_simplification", "game_of_life_halting", "gsm_symbolic", "kakurasu", "knights_knaves")
FULL += ("letter_jumble", "quantum_lock", "sokoban", "spell_backward", "survo")


def drawn(task, **options):
    domain = load_domain("logic", "reasoning", {"tasks": {task: {}}, **options})
    return domain, domain.draw(TRAIN, 3, seed=0)


@pytest.mark.parametrize("task", [*DEFAULT, *PARTIAL, *FULL])
def test_only_the_right_answer_is_paid_for(task):
    domain, examples = drawn(task)
    for example, another in zip(examples, [*examples[1:], examples[0]], strict=True):
        gold, other = example.answer, another.answer
        assert [domain.score(example, text) for text in (gold, f"\n {gold} ", f"{gold.removesuffix('.')}.")] == [
            1,
            1,
            1,
        ]
        wrong = {f"{gold} or so", f"not {gold}", f"{other} {gold}", f"{gold}\n{other}", f"it is not {gold}", ""}
        # A number may be the same with a digit less, and a line of moves solve with one less.
        wrong |= {other} if other.casefold() != gold.casefold() and task not in ("quantum_lock", "sokoban") else set()
        assert {text: domain.score(example, text) for text in wrong} == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize("task", ["spell_backward", "letter_jumble", "game_of_life_halting"])
def test_case_does_not_matter_where_the_verifier_says_so(task):
    domain, (example, *_) = drawn(task)
    assert domain.score(example, example.answer.swapcase()) == 1.0


def test_partial_credit_is_the_verifiers_own_where_it_is_asked_for():
    domain, (example, *_) = drawn("caesar_cipher", partial=True)
    answer = f"{example.answer} or so"
    assert domain.score(example, answer) == pytest.approx(len(example.answer) / len(answer))
    assert domain.score(example, example.answer) == 1.0
