"""Prompts that are too long: refused with counts, left out, or cut, by every stage that draws them."""

import pytest

import stages.distill
import stages.rft
import stages.rl
import stages.sft
from base.errors import UserError
from base.store.journal import read
from experts.domain import Domain, Example
from stages.config.distill import DistillConfig
from stages.config.on_policy import RFTConfig, RLConfig
from stages.config.training import SFTConfig
from stages.model.policy import load_policy
from stages.rows.chat import encode_prompt
from stages.rows.lengths import Limit, fit, longer, shorten
from stages.rows.trained_on import TrainedOn
from tests.support.chats import CHATS, make_policy, make_tokenizer

SMALL = {"max_steps": 1, "examples": 6}
DRAWN = {**SMALL, "prompts_per_step": 6, "max_new_tokens": 8, "group_size": 2}
STAGES = {
    "sft": (stages.sft, SFTConfig, {**SMALL, "batch_size": 6}),
    "rl": (stages.rl, RLConfig, DRAWN),
    "rft": (stages.rft, RFTConfig, DRAWN),
    "distill": (stages.distill, DistillConfig, DRAWN),
}


class Counting(Domain):
    """Six prompts, two of them longer than a context of 128 tokens."""

    def draw(self, split, count, seed):
        texts = [f"{i} " * (3 if i < 4 else 90) + "how many?" for i in range(count)]
        return [Example(text, "3", self.name, text) for text in texts]

    def score(self, example, completion):
        return float(completion == example.answer)

    def fingerprint(self):
        return "counting"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("longer_prompts", ["refuse", "drop", "truncate"])
def test_every_stage_treats_long_prompts_as_asked_and_counts_them(
    stage, longer_prompts, checkpoint, workspace, monkeypatch
):
    module, schema, settings = STAGES[stage]
    start = checkpoint("start", 0)
    place = workspace(stage, {"start": start, "teacher/count": start}, {"count": Counting("count")})
    config = schema(**settings, longer_prompts=longer_prompts)
    if longer_prompts == "refuse":
        with pytest.raises(UserError, match=r"^domains\.count: 2 of 6 prompts .*longer_prompts: drop or truncate"):
            module.train(config, place)
        return
    module.train(config, place)
    notes = [record["text"] for record in read(place.folder / "journal.jsonl") if record["kind"] == "note"]
    ending = "dropped" if longer_prompts == "drop" else "truncated"
    assert [note for note in notes if note.startswith("domains.count: 2 of 6") and note.endswith(ending)]


@pytest.mark.parametrize("name", [*CHATS, "base"])
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_cut_keeps_its_end_its_template_and_fits(name, chat):
    tokenizer = make_tokenizer(name)
    text = "one two three four five " * 30 + "what is the sum?"
    prompt = [{"role": "user", "content": text}] if chat and name != "base" else text

    def measure(given):
        return len(encode_prompt(tokenizer, given))

    whole = measure(prompt)
    for limit in (60, whole - 1):
        cut = encode_prompt(tokenizer, shorten(prompt, limit, measure))
        assert limit - 3 <= len(cut) <= limit
        short = encode_prompt(tokenizer, "what is the sum?")
        assert tokenizer.decode(cut).endswith(tokenizer.decode(short[1:])[-16:])
        assert cut[:1] == short[:1]
    example = Example(prompt, "", "d", "s")
    assert longer([example, Example("x", "", "d", "s")], whole - 1, measure) == {0: whole}
    assert longer([example], whole, measure) == {}
    with pytest.raises(UserError, match="tokens even without its longest message"):
        shorten([{"role": "user", "content": "x"}] if name != "base" else "xy" * 9, 1 - (name == "base"), measure)


def test_a_limit_of_the_run_file_counts_beside_the_context():
    examples = [Example("ab" * 10, "", "d", "s"), Example("a", "", "d", "s")]
    assert Limit.of({"max_prompt_tokens": 9, "longer_prompts": "drop"}, 64, 8) == Limit(9, "drop")
    assert Limit.of({"max_prompt_tokens": 99}, 64, 8) == Limit(56)
    assert Limit.of({}, None, 8) == Limit(None)
    kept, lines = fit("d", examples, Limit(9, "drop"), len)
    assert kept == examples[1:]
    assert lines == ["domains.d: 1 of 2 prompts have more than 9 tokens (the longest 20): dropped"]
    with pytest.raises(UserError, match=r"domains\.d: .* longer_prompts: drop leaves none"):
        fit("d", examples[:1], Limit(9, "drop"), len)


def test_a_tokenizer_larger_than_the_embedding_is_refused_when_loaded(store, workspace):
    policy = make_policy("gpt2", padding=-2)
    place, folder = workspace("small", {}, {}), store.staging("small")
    policy.save(folder)
    small = place.commit(folder, trained_on=TrainedOn(), metrics={})
    with pytest.raises(UserError, match=r"small: its tokenizer has 2 tokens beyond the 305 rows .* id 305"):
        load_policy(small, store)
