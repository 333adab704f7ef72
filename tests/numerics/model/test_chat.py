"""Tokens of prompts and demonstrations: what the chat template renders, and data as nothing but text."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from base.errors import UserError
from stages.model.tiny import character_tokenizer
from stages.model.tokenizers import tokenizer_difference
from stages.rows.chat import controls, decode_completions, encode_demonstration, encode_prompt, stop_ids
from stages.rows.rendering import Rendering, rendering, template_arguments
from tests.support.chats import CHATML, CHATS, CORPUS, FAMILIES, make_tokenizer

DIALOGUE = [
    {"role": "user", "content": "sort up 3 1 2:"},
    {"role": "assistant", "content": "1 2 3"},
    {"role": "user", "content": "what is the sum?"},
]
NO_THINKING = Rendering({"enable_thinking": False})


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer as SentencePiece makes them: control tokens are pieces of the model too."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(code) for code in range(33, 127)]
    raw.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {name: lambda name=name: make_tokenizer(name) for name in FAMILIES} | {
    "characters": character_tokenizer,
    "metaspace": metaspace_tokenizer,
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("prompt", ["2 + 2 =", DIALOGUE])
def test_a_demonstration_is_the_rendering_of_the_whole_chat_up_to_the_end_of_the_turn(name, prompt):
    tokenizer = make_tokenizer(name)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    prompt_ids, target = encode_demonstration(tokenizer, prompt, "the answer is 42")

    def rendered(chat, **options):
        text = tokenizer.apply_chat_template(chat, tokenize=False, **template_arguments(), **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = rendered([*messages, {"role": "assistant", "content": "the answer is 42"}])
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    assert prompt_ids == encode_prompt(tokenizer, prompt) == rendered(messages, add_generation_prompt=True)
    assert [*prompt_ids, *target] == whole[: len(prompt_ids) + len(target)]
    assert target.index(end) == len(target) - 1
    assert tokenizer.decode(whole[len(prompt_ids) + len(target) :]).strip() == ""


def test_an_empty_thought_is_learned_where_the_template_writes_it_and_not_where_the_prompt_has_it():
    tokenizer = make_tokenizer("qwen3")
    prompt, target = encode_demonstration(tokenizer, "2 + 2 =", "4")
    assert tokenizer.decode(target) == "<think>\n\n</think>\n\n4<|im_end|>"
    with rendering(NO_THINKING):
        prompt, target = encode_demonstration(tokenizer, "2 + 2 =", "4")
    assert tokenizer.decode(target) == "4<|im_end|>"
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thought = tokenizer.convert_tokens_to_ids("<think>")
    assert thought in encode_demonstration(tokenizer, "2 + 2 =", "<think>\neasy\n</think>\n\n4")[1]


def test_a_template_that_ends_turns_by_no_token_or_contradicts_itself():
    tokenizer = make_tokenizer("base")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    target = encode_demonstration(tokenizer, "2 + 2 =", "4")[1]
    assert tokenizer.decode(target) == "4\n<|endoftext|>"
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match=r"an answered prompt differently from the prompt: '12 \+ 2 =' and '24'"):
        encode_demonstration(tokenizer, "2 + 2 =", "4")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_in_data_are_text(name):
    tokenizer = TOKENIZERS[name]()
    names = controls(tokenizer).names
    ends = {*names.values()} - {tokenizer.unk_token_id}
    with rendering(NO_THINKING):
        for token in names:
            text = f"the {token} answer{token}"
            plain_prompt, plain_target = encode_demonstration(tokenizer, "the sum", "the sum")
            prompt, target = encode_demonstration(tokenizer, text, text)
            # As many control tokens as without: the template's, the tokenizer's, and the end.
            assert [i for i in prompt if i in ends] == [i for i in plain_prompt if i in ends], token
            assert [i for i in target if i in ends] == [i for i in plain_target if i in ends], token
            assert decode_completions(tokenizer, [target], stop_ids(tokenizer, None))[0].strip() == text, token
            assert text in tokenizer.decode(prompt), token


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in CHATS])
def test_marked_text_is_split_as_text_without_control_tokens_is(name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = None
    special = tokenizer.eos_token
    text = f"sort {special} up"
    target = encode_demonstration(tokenizer, "x", text)[1]
    if name == "metaspace":  # The library's own switch leaves pieces of the model as they are.
        assert (
            tokenizer.eos_token_id in tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
        assert target.count(tokenizer.eos_token_id) == 1
        return
    expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert target == [*expected, tokenizer.eos_token_id]


def test_a_prompt_keeps_bos_and_never_ends_in_eos():
    tokenizer = make_tokenizer("base")
    own = tokenizer("2 + 2 =")["input_ids"]
    assert own[-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "2 + 2 =") == own[:-1]
    assert encode_prompt(tokenizer, "2 + 2 =")[0] == tokenizer.bos_token_id
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    written = encode_prompt(tokenizer, f"2{tokenizer.eos_token}")
    assert tokenizer.eos_token_id not in written
    assert tokenizer.decode(written, skip_special_tokens=True) == "2<|endoftext|>"


def test_a_template_that_refuses_a_role_is_named_with_the_roles():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}]
    with pytest.raises(UserError, match=r"refuses messages of the roles system, user: System role not supported"):
        encode_prompt(make_tokenizer("gemma"), messages)


def test_the_date_of_a_template_is_the_runs():
    tokenizer = make_tokenizer("llama3")
    with rendering(Rendering(date="2025-02-03")):
        assert "Today Date: 03 Feb 2025" in tokenizer.decode(encode_prompt(tokenizer, "x"))
        assert "Today Date: 03 Feb 2025" in tokenizer.decode(encode_demonstration(tokenizer, "x", "y")[0])
    with rendering(Rendering({"date_string": "26 Jul 2024"}, "2025-02-03")):
        assert "Today Date: 26 Jul 2024" in tokenizer.decode(encode_prompt(tokenizer, "x"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_is_compared_by_what_it_reads(name):
    ours, theirs = make_tokenizer(name), make_tokenizer(name)
    theirs.pad_token_id = 0
    if ours.chat_template is not None:
        theirs.chat_template = "{# Written by somebody else. #}" + theirs.chat_template
    assert tokenizer_difference(ours, theirs) is None
    theirs.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    assert str(tokenizer_difference(ours, theirs)).startswith("chat_template: the same chat becomes")
    theirs.chat_template = ours.chat_template
    theirs.add_tokens(["<another>"])
    assert str(tokenizer_difference(ours, theirs)).startswith("vocabularies of")


def test_a_teacher_that_ends_its_answers_otherwise_is_refused():
    ours, theirs = make_tokenizer("base"), make_tokenizer("base")
    theirs.eos_token = "<|startoftext|>"
    assert str(tokenizer_difference(ours, theirs)).startswith("tokens: the same chat becomes")
