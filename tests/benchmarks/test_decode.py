"""The speed benchmarks: what is timed caches the share that it says, and its steps are the models' own."""

from argparse import Namespace

import pytest
import torch
from decode import attention_step, throughput_case
from low_rank import LowRankAttention
from speed import kept_heads, uneven_maps, versions
from transformers import DynamicCache, LlamaConfig

from dha_utils.compare.cost import cached_numbers
from dha_utils.compare.decoding import generate_step, random_cache


@pytest.fixture
def config():
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    return LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8, head_dim=4, max_position_embeddings=64)


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_all_rivals_cache_the_same_share_to_the_byte(config, budget):
    held = {name: cached_numbers(random_cache(make(), 2, 10)) for name, make in versions(config, budget).items()}
    whole = {name: held.pop(name) for name in ("source", "source, our code")}
    assert set(whole.values()) == {2 * 10 * 2 * 8 * 4} and set(held.values()) == {int(budget * whole["source"])}
    assert set(held) == {"GQA", "DHA", "low rank"}


def test_keys_and_values_have_counts_and_groups_of_their_own(config):
    for keys, values in zip(*uneven_maps(config, 0.5)):
        assert (max(keys) + 1, max(values) + 1) == (5, 3)
        assert set(keys) == set(range(5)) and set(values) == set(range(3))


@torch.no_grad()
def test_what_is_timed_is_attention(config):
    """Against softmax(q kᵀ / √d) v, head by head, on the query and the cache that the step was given."""
    for name, make in versions(config, 0.5).items():
        model = make()
        attention, (step, _) = model.model.layers[0].self_attn, attention_step(model, 2, 10)
        query, *cached = (part for part in step.args if isinstance(part, torch.Tensor))
        if isinstance(attention, LowRankAttention):
            cached = attention.keys(*cached), attention.value_up(*cached).unflatten(-1, (-1, 4)).transpose(1, 2)
        maps = [getattr(model.config, f"{kind}_head_map", [None])[0] for kind in ("key", "value")]
        key, value = (
            states[:, groups or [h * states.shape[1] // 8 for h in range(8)]] for states, groups in zip(cached, maps)
        )
        expected = (query @ key.mT / 2).softmax(-1) @ value
        output = step()
        output = output[0] if isinstance(output, tuple) else output
        assert torch.allclose(output.transpose(1, 2), expected, atol=1e-5), name


def test_a_step_of_generate_can_be_repeated(config, monkeypatch):
    """Every time over the same context."""
    lengths, crop = [], DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, n: (crop(cache, n), lengths.append(cache.get_seq_length())))
    for make in versions(config, 0.5).values():
        model = make()
        step = generate_step(model, random_cache(model, 2, 10), 3)
        step(), step()
    assert set(lengths) == {10} and len(lengths) == 10


def test_what_fits_into_the_memory_is_the_largest_batch(config, monkeypatch):
    monkeypatch.setattr("decode.whole_models", lambda arguments, shape, budget: versions(config, budget))
    monkeypatch.setattr("decode.ProcessPoolExecutor", lambda *_: Alone())
    model = versions(config, 0.5)["source"]()
    weights, one = sum(w.numel() * 4 for w in model.parameters()), cached_numbers(random_cache(model, 1, 10)) * 4
    arguments = Namespace(memory_gib=(weights + 3.5 * one) / 2**30, new_tokens=2)
    [(_, said)] = throughput_case(arguments, "tiny", 0.5, "source", 10).values()
    assert said["batch"] == 3 and said["peak_gib"] == 1.5
    arguments.memory_gib = weights / 2**30
    assert throughput_case(arguments, "tiny", 0.5, "source", 10) == {}


class Alone:
    """In the place of a process of its own."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, *_):
        return self

    def result(self):
        return 1.5


def test_a_share_of_heads_that_there_is_not_is_refused(config):
    for budget in (0.3, 1 / 16):
        with pytest.raises(ValueError, match="heads"):
            kept_heads(config, budget)
