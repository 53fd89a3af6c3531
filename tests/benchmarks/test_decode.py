"""The speed benchmarks: what is timed caches the share that it says, and its steps are the models' own."""

from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from decode import attention_step, throughput_case
from low_rank import LowRankAttention
from speed import kept_heads, listed, low_rank_versions, measure, uneven_maps, versions
from transformers import DynamicCache, LlamaConfig

from dha_utils.compare.cost import cached_numbers
from dha_utils.compare.decoding import generate_step, random_cache


@pytest.fixture
def config():
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    return LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8, head_dim=4, max_position_embeddings=64)


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_all_rivals_cache_the_same_share_to_the_byte(config, budget):
    made = versions(config, [budget]) | low_rank_versions(config, [budget])
    held = {name: cached_numbers(random_cache(make(), 2, 10)) for name, make in made.items()}
    whole = 2 * 10 * 2 * 8 * 4
    assert held == {name: int(name[1] * whole) for name in held}
    assert [name for name, share in held if share < 1] == ["GQA", "GQA, our code", "DHA", "low rank"]
    assert {name for name, share in held if share == 1} == {"source", "source, our code"}


def test_keys_and_values_have_counts_and_groups_of_their_own(config):
    for budget, counts in ((0.5, (5, 3)), (0.25, (3, 1)), (0.125, (1, 1))):
        for keys, values in zip(*uneven_maps(config, budget)):
            assert (set(keys), set(values)) == tuple(set(range(count)) for count in counts)


@torch.no_grad()
def test_what_is_timed_is_attention(config):
    """Against softmax(q kᵀ / √d) v, head by head, on the query and the cache that the step was given."""
    for name, make in (versions(config, [0.5, 0.25]) | low_rank_versions(config, [0.5])).items():
        model = make()
        attention, (step, _) = model.model.layers[0].self_attn, attention_step(model, 2, 10)
        query, *cached = (part for part in step.args if isinstance(part, torch.Tensor))
        if isinstance(attention, LowRankAttention):
            cached = attention.keys(*cached), attention.value_up(*cached).unflatten(-1, (-1, 4)).transpose(1, 2)
        maps = [getattr(model.config, f"{kind}_head_map", [None])[0] for kind in ("key", "value")]
        key, value = (
            states[:, groups or [h * states.shape[1] // 8 for h in range(8)]] for states, groups in zip(cached, maps)
        )
        if isinstance(attention, LowRankAttention):  # rebuilding is part of attending, and reads these
            assert attention_step(model, 2, 10)[1]["weight_bytes"] == 4 * 2 * attention.key_up.weight.numel()
        expected = (query @ key.mT / 2).softmax(-1) @ value
        output = step()
        output = output[0] if isinstance(output, tuple) else output
        assert torch.allclose(output.transpose(1, 2), expected, atol=1e-5), name


def test_a_step_of_generate_can_be_repeated(config, monkeypatch):
    """Every time over the same context."""
    lengths, crop = [], DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, n: (crop(cache, n), lengths.append(cache.get_seq_length())))
    for make in (versions(config, [0.5]) | low_rank_versions(config, [0.5])).values():
        model = make()
        step = generate_step(model, random_cache(model, 2, 10), 3)
        step(), step()
    assert set(lengths) == {10} and len(lengths) == 2 * 6


def test_what_fits_into_the_memory_is_the_largest_batch(config, monkeypatch):
    monkeypatch.setattr("decode.whole_models", lambda arguments, shape, budgets: versions(config, budgets))
    monkeypatch.setattr("decode.ProcessPoolExecutor", lambda *_: Alone())
    model = versions(config, [])["source", 1.0]()
    weights, one = sum(w.numel() * 4 for w in model.parameters()), cached_numbers(random_cache(model, 1, 10)) * 4
    arguments = Namespace(memory_gib=(weights + 3.5 * one) / 2**30, new_tokens=2)
    made = throughput_case(arguments, "tiny", ("DHA", 0.5), 10)
    assert [name for name in made] == [("source", 1.0), ("DHA", 0.5)]
    assert [said["batch"] for _, said in made.values()][0] == 3 and made["DHA", 0.5][1]["batch"] >= 7
    assert {said["peak_gib"] for _, said in made.values()} == {1.5}
    arguments.memory_gib = weights / 2**30
    assert throughput_case(arguments, "tiny", ("DHA", 0.5), 10) == {}


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


def test_a_slow_turn_of_the_machine_slows_all(config, monkeypatch, tmp_path):
    """The source's median second is 1, DHA's 2, but in every turn DHA is the faster; and nothing is measured twice."""
    turns = np.array([[1.0, 0.5], [4.0, 2.0], [1.0, 2.0], [8.0, 4.0], [1.0, 0.5]])
    monkeypatch.setattr("speed.seconds_in_turn", lambda *_: turns)
    arguments = Namespace(device="cpu", dtype=torch.float32, threads=1, repeats=5, out=tmp_path / "decode.csv")
    made = {("source", 1.0): (None, {"cache_bytes": 2}), ("DHA", 0.5): (None, {"cache_bytes": 1})}
    for _ in range(2):
        measure(arguments, {"part": "attention", "budgets": listed([0.5])}, lambda: made)
    source, dha = pd.read_csv(arguments.out).to_dict("records")
    assert (source["speedup"], source["seconds"], source["budget"]) == (1, 1, 1)
    assert (dha["speedup"], dha["seconds"], dha["budget"]) == (2, 2, 0.5)
    assert dha["speedup_low"] <= 2 <= dha["speedup_high"] and dha["processor"] and listed([0.5, 1 / 3]) == "50% + 33.33%"


def test_a_share_of_heads_that_there_is_not_is_refused(config):
    for budget in (0.3, 1 / 16):
        with pytest.raises(ValueError, match="heads"):
            kept_heads(config, budget)
