"""Second moments: in float32 whatever the dtype, finite, without dropout."""

import pytest
import torch
from conftest import LOW, SHAPES, half_plan, tiny_llama
from transformers import LlamaForCausalLM

from dha_utils import (
    fuse,
)
from dha_utils.measure.moments import collect_moments
from dha_utils.measure.perplexity import perplexity


@pytest.mark.parametrize("dtype", LOW)
def test_moments_are_taken_in_float32(dtype, tmp_path):
    source = tiny_llama(**SHAPES["mha"])
    for layer in source.model.layers:
        layer.input_layernorm.weight.data.fill_(10.0)  # products of such activations overflow in float16
    blocks = torch.randint(0, 96, (1, 128))
    source.save_pretrained(tmp_path)
    low = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).float()  # the same rounded weights
    for got, expected in zip(collect_moments(low, blocks), collect_moments(exact, blocks)):
        assert got.plain.dtype == torch.float32
        assert torch.allclose(got.plain.trace(), expected.plain.trace(), rtol=4e-3)
    fused = fuse(low, half_plan(low), torch.randint(0, 96, (1, 1024)))
    assert all(weight.isfinite().all() for weight in fused.parameters())


def test_activations_that_are_not_finite_are_refused(mha, blocks):
    mha.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="the attention of layer 2 is not finite: the checkpoint has NaN or infinite weights"
    ):
        fuse(mha, half_plan(mha), blocks)


def test_dropout_of_a_model_in_training_mode_reaches_no_measurement(blocks):
    source = tiny_llama(num_attention_heads=4, attention_dropout=0.3).train()
    fused = [fuse(source, half_plan(source), blocks) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(fused[0].parameters(), fused[1].parameters()))
    assert perplexity(source, blocks) == perplexity(source, blocks) and source.training
