"""What ends a completion: with every sampler and in every score the same tokens."""

import itertools
import json
from collections.abc import Sequence

import httpx
import pytest
import torch
from transformers import GenerationConfig

from experts.domain import Example
from experts.loading import load_domain
from stages.export import export_weights
from stages.model.policy import Policy, load_policy
from stages.model.stop_strings import StopStrings
from stages.on_policy.rollout import gather, verifiable_rewards
from stages.rows.chat import encode_prompt, encode_text
from stages.rows.trained_on import TrainedOn
from stages.sampling.sampler import sample
from stages.sampling.samples import Sampling
from stages.vllm.server import Ends, VllmServer
from tests.numerics.conftest import tiny_policy
from tests.support.chats import CHATS, FAMILIES, make_policy

SORT = load_domain("sort", "strings", {"task": "sort"})


def writes(policy: Policy, prompt: Sequence[int], written: Sequence[int]) -> Policy:
    """The policy, its decoder replaced so that greedy decoding of the prompt gives `written`, the last one for ever."""
    decoder, first = policy.model.get_decoder(), len(prompt) - 1
    inner = decoder.forward
    head_VH = policy.head_VH.data
    # With rows of one length each row is nearest to itself.
    head_VH.copy_(torch.nn.functional.normalize(head_VH, dim=-1))

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        positions = kwargs.get("position_ids")
        length = output.last_hidden_state.shape[1]
        if positions is None:
            past = kwargs.get("past_key_values")
            before = (past.get_seq_length() if past is not None else length) - length
            positions = torch.arange(before, before + length)[None]
        steps = (positions - first).clamp(0, len(written) - 1)
        targets = torch.tensor(written)[steps].expand(output.last_hidden_state.shape[:2])
        output.last_hidden_state = head_VH[targets] * 1000
        return output

    decoder.forward = forward
    return policy


def test_every_stop_of_the_generation_config_ends_a_completion_as_in_generate():
    policy = tiny_policy(0)
    prompt = encode_prompt(policy.tokenizer, "2 + 2 =")
    (four,) = policy.tokenizer("4")["input_ids"]
    policy.model.generation_config.eos_token_id = [0, 2]
    writes(policy, prompt, [four, 2, four])
    output = policy.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    theirs = output[0, len(prompt) :].tolist()
    ((drawn,),) = sample(policy, [prompt], 1, Sampling(16, temperature=0.0), 0)
    assert theirs == [four, 2]
    assert drawn.completion_ids == theirs
    assert drawn.finished
    example = Example("2 + 2 =", "4", "sort", "x")
    rollout = gather(policy, [example], [[drawn]], 1, 1, on_policy=True)
    assert rollout.completions == ["4"]
    assert verifiable_rewards(rollout, {"sort": SORT}) == [1.0]


@pytest.mark.parametrize("name", CHATS)
def test_the_templates_end_of_turn_and_the_tokenizers_eos_end_a_completion(name):
    for token in {FAMILIES[name].end, FAMILIES[name].special[0]}:
        policy = make_policy(name)
        tokenizer = policy.tokenizer
        prompt = encode_prompt(tokenizer, "2 + 2 =")
        stop = tokenizer.convert_tokens_to_ids(token)
        (four,) = tokenizer("4", add_special_tokens=False)["input_ids"]
        writes(policy, prompt, [four, stop, four])
        ((drawn,),) = sample(policy, [prompt], 1, Sampling(16, temperature=0.0), 0)
        assert drawn.completion_ids == [four, stop], token
        assert drawn.finished


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_rows_beyond_the_tokenizer_are_never_drawn_and_leave_log_probabilities_alone(temperature, top_p):
    policy = make_policy("llama3", padding=5)
    rows = list(range(len(policy.tokenizer), len(policy.tokenizer) + 5))
    assert list(policy.barred_ids) == rows
    prompt = encode_prompt(policy.tokenizer, "2 + 2 =")
    with torch.no_grad():
        # Every position wants them most: hidden states become their direction.
        policy.head_VH[rows] = policy.model.model.norm.weight / 4
        policy.model.model.norm.register_forward_hook(lambda module, args, output: output.abs())
    groups = sample(policy, [prompt], 4, Sampling(16, temperature, top_p), 0)
    tokens = [token for drawn in groups[0] for token in drawn.completion_ids]
    assert len(tokens) >= 16
    assert not {*tokens} & {*rows}
    with torch.no_grad():
        (drawn,) = groups[0][:1]
        hidden_TH = policy.model.model(torch.tensor([drawn.tokens])).last_hidden_state[0]
        logprobs_NV = (hidden_TH[len(prompt) - 1 : -1] @ policy.head_VH.T / (temperature or 1.0)).log_softmax(-1)
    assert int(logprobs_NV[0].argmax()) in rows
    expected_N = logprobs_NV.gather(1, torch.tensor(drawn.completion_ids)[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs_N, expected_N, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_generates_and_is_exported_with_the_stops_of_its_template(store, workspace, tmp_path):
    place = workspace("start", {}, {})
    folder = store.staging("start")
    policy = make_policy("chatml_base")
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy.save(folder)
    start = place.commit(folder, trained_on=TrainedOn(), metrics={})
    loaded = load_policy(start, store)
    assert set(loaded.stop_ids) == {policy.eos_id, end}
    assert loaded.model.generation_config.eos_token_id == list(loaded.stop_ids)
    export_weights(start, store, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == list(loaded.stop_ids)


def test_vllm_is_asked_for_every_stop_and_never_for_what_is_no_token():
    asked: list[dict] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        choice = {"index": 0, "token_ids": [4, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "stop_reason": 2}
        return httpx.Response(200, json={"choices": [choice]})

    server = VllmServer("http://127.0.0.1:9", 1.0)
    server._client = httpx.Client(base_url=server.url, transport=httpx.MockTransport(answer))
    server.complete("m", [1, 3], 1, Sampling(8), 0, Ends((0, 2), (7, 8)))
    server.complete("m", [1, 3], 1, Sampling(8), 0, Ends((0,)))
    assert [body["stop_token_ids"] for body in asked] == [[0, 2], [0]]
    assert [body["logit_bias"] for body in asked] == [{"7": -100.0, "8": -100.0}, None]
    assert all(body["ignore_eos"] for body in asked)
    assert asked[0]["stop"] == []
    server.complete("m", [1, 3], 1, Sampling(8, stop=("Q:",)), 0, Ends((0,)))
    assert asked[-1]["stop"] == ["Q:"]


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma"])
@pytest.mark.parametrize(
    ("text", "stop", "seen"),
    [
        ("42\nQuestion: 5", ("\nQuestion:",), "42"),
        ("42 é Ende ü", ("Ende", "ü"), "42 é "),
        ("été", ("é",), ""),
        ("no stop", ("Question:",), "no stop"),
    ],
)
def test_a_stop_string_ends_a_completion_and_is_not_scored(name, text, stop, seen):
    policy = make_policy(name)
    tokenizer = policy.tokenizer
    prompt, ids = encode_prompt(tokenizer, "2 + 2 ="), encode_text(tokenizer, text)
    written = tokenizer.decode(ids)
    writes(policy, prompt, [*ids, policy.eos_id])
    plain, cut = (
        sample(policy, [prompt], 1, Sampling(64, temperature=0.0, stop=strings), 0)[0][0] for strings in ((), stop)
    )
    assert plain.completion_ids == [*ids, policy.eos_id]
    assert cut.finished
    # Up to the token that completes it, and no further.
    assert cut.completion_ids == plain.completion_ids[: len(cut.completion_ids)]
    rollout = gather(policy, [Example("2 + 2 =", "42", "sort", "x")], [[cut]], 1, 1, on_policy=True, stop=stop)
    assert rollout.completions == [seen]
    found = [string for string in stop if string in written]
    assert (len(cut.completion_ids) < len(plain.completion_ids)) == bool(found)
    if found:
        assert not any(string in tokenizer.decode(cut.completion_ids[:-1]) for string in stop)


@pytest.mark.parametrize(
    ("text", "stop"), [("42\nQuestion: 5", "\nQuestion:"), ("été", "té"), ("no stop", "yes"), ("", "a")]
)
def test_a_drawn_completion_is_cut_where_its_sampler_would_have_ended_it(text, stop):
    tokenizer = make_policy("llama3").tokenizer
    ids, stops = encode_text(tokenizer, text), StopStrings(tokenizer, [stop])
    length = stops.length(ids)
    assert (length is not None) == (stop in text)
    if length is not None:
        assert stop in tokenizer.decode(ids[:length])
        assert stop not in tokenizer.decode(ids[: length - 1])


def test_rows_of_a_batch_end_each_at_its_own_stop_string():
    policy = make_policy("llama3")
    prompts = [encode_prompt(policy.tokenizer, f"{n} + 2 =") for n in range(6)]
    free = sample(policy, prompts, 3, Sampling(24, temperature=0.0), 0)
    texts = policy.texts(one.completion_ids for group in free for one in group)
    stop = tuple(text[3:5] for text in texts[::3] if len(text) > 5)[:2]
    assert stop
    cut = sample(policy, prompts, 3, Sampling(24, temperature=0.0, stop=stop), 0)
    for whole, part in zip(itertools.chain(*free), itertools.chain(*cut), strict=True):
        assert part.completion_ids == whole.completion_ids[: len(part.completion_ids)]
        text = policy.texts([whole.completion_ids])[0]
        assert part.finished == (whole.finished or any(string in text for string in stop))
    assert sum(len(one.completion_ids) for group in cut for one in group) < sum(
        len(one.completion_ids) for group in free for one in group
    )
