"""What serving costs, from shapes: against models of those shapes, and by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dha_utils.compare.cost import SHAPES, bytes_per_token, serving, shape_bytes


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_of_a_shape_are_those_of_its_model(name):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], dtype="bfloat16"))
    norms = sum(w.numel() for w in model.parameters() if w.dim() == 1)
    weights, per_token = shape_bytes(SHAPES[name])
    assert weights == 2 * (sum(w.numel() for w in model.parameters()) - norms)
    assert per_token == 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim


def test_bytes_of_a_token_are_those_of_its_cache(gqa):
    shape = {name: getattr(gqa.config, name) for name in SHAPES["LLaMA-2-7B"]}
    assert shape_bytes(shape, 4)[1] == bytes_per_token(gqa)


def test_serving_by_hand():
    """10 GB of weights, 2 GB of cache a request, 17 GB: three requests; a step reads 16 GB."""
    served = serving(10e9, 2e6, 1000, memory_gb=17, bandwidth_gb_s=32, price_per_hour=3.6)
    assert served["requests"] == 3 and served["tokens a second, at most"] == pytest.approx(6)
    assert served["price of a million tokens, at least"] == pytest.approx(1000 / 6)


def test_a_model_that_does_not_fit_serves_nobody():
    served = serving(30e9, 2e6, 1000, memory_gb=24, bandwidth_gb_s=600, price_per_hour=1)
    assert (
        served["requests"] == 0
        and served["tokens a second, at most"] == 0
        and math.isnan(served["price of a million tokens, at least"])
    )
