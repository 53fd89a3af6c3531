"""The speed of decoding: models in turn, all sequences counted."""

from functools import partial

import numpy as np
import pytest
import torch

from dha_utils.compare import decoding
from dha_utils.compare.decoding import decoding_speed, generate_step, random_cache, seconds_in_turn


def test_models_take_turns_and_the_first_is_not_counted(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])

    def step(name, *seconds):
        left = iter(seconds)
        return lambda: (order.append(name), clock.__setitem__(0, clock[0] + next(left)))

    seconds = seconds_in_turn({"a": step("a", 9, 1, 2), "b": step("b", 8, 3, 4)}, "cpu", 2)
    assert sorted(order) == ["a"] * 3 + ["b"] * 3 and seconds.tolist() == [[1, 3], [2, 4]]


def test_no_model_always_comes_after_the_same_one():
    """A step finds in the processor's caches what the one before it left."""
    order = []
    seconds_in_turn({name: partial(order.append, name) for name in "abc"}, "cpu", 20)
    turns = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"} and len(set(turns)) == 6


def test_the_tokens_of_all_sequences_are_counted(mha, monkeypatch):
    monkeypatch.setattr(decoding, "seconds_in_turn", lambda steps, *_: np.array([[2.0, 1.0]] * 3))
    speed = decoding_speed({"slow": mha, "fast": mha}, context=6, batch_size=3, new_tokens=4)
    assert speed["tokens a second"].to_dict() == {"slow": 6, "fast": 12}


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_step_generates_over_the_whole_cache(mha, batch_size):
    cache = random_cache(mha, batch_size, 7)
    assert cache.layers[0].keys.shape[::2] == (batch_size, 7)
    step = generate_step(mha, cache, 3)
    for _ in range(2):
        step()
        assert cache.get_seq_length() == 7 + 3
