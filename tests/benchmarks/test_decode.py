"""The speed benchmarks: what is timed caches the share that it says, and its steps are the models' own."""

import pytest
import torch
from decode import attention_step, generate_step, numbers, random_cache
from speed import uneven_maps, versions
from transformers import LlamaConfig


@pytest.fixture
def config():
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
    return LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8, head_dim=4, max_position_embeddings=64)


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_all_rivals_cache_the_same_share_to_the_byte(config, budget):
    held = {name: numbers(random_cache(make(), 2, 10)) for name, make in versions(config, budget).items()}
    assert held == {"source": held["source"]} | dict.fromkeys(("GQA", "DHA", "low rank"), int(budget * held["source"]))


def test_keys_and_values_have_counts_and_groups_of_their_own(config):
    for keys, values in zip(*uneven_maps(config, 0.5)):
        assert (max(keys) + 1, max(values) + 1) == (5, 3)
        assert set(keys) == set(range(5)) and set(values) == set(range(3))


def test_a_step_attends_for_every_query_head(config):
    for make in versions(config, 0.5).values():
        model = make()
        step, said = attention_step(model, 2, 10)
        output = step()
        output = output[0] if isinstance(output, tuple) else output
        assert output.numel() == 2 * config.num_attention_heads * config.head_dim and torch.isfinite(output).all()
        assert said["cache_bytes"] == numbers(random_cache(model, 2, 10)) * 4


def test_a_step_of_generate_can_be_repeated(config):
    for make in versions(config, 0.5).values():
        step, said = generate_step(make(), 2, 10, 3)
        step(), step()
        assert said["weight_bytes"] > 0 and said["new_tokens"] == 3
