"""Sizes that vLLM is started with."""

from types import SimpleNamespace

from stages.vllm.settings import cpu_cache_bytes, needed_context


def test_the_context_has_room_for_the_longest_prompt_its_completion_and_a_token_to_score():
    assert needed_context(131_072, 2000, 1000) == 3001
    assert needed_context(131_072, 10, 10) == 512
    assert needed_context(2048, 2000, 1000) == 2048
    assert needed_context(None, 2000, 1000) == 3001
    assert needed_context(131_072, None, 1000) == 131_072
    assert needed_context(None, None, 1000) is None


def test_the_cache_on_a_cpu_has_room_for_the_engine_s_context_not_for_the_model_s():
    shape = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64,
        max_position_embeddings=131_072,
    )  # fmt: skip
    sizes = {context: cpu_cache_bytes(shape, "bfloat16", 2, 64, 0.5, context) for context in (None, 4096)}
    # Keys and values of two layers and two heads of 16 in bfloat16; two blocks of 128 tokens beside.
    assert sizes[4096] == 2 * 2 * 2 * 16 * 2 * (4096 + 256)
    assert sizes[None] == 2 * 2 * 2 * 16 * 2 * (131_072 + 256)
