"""Nothing depends on the dtype, the attention backend or the device that a model happens to be in."""

import pytest
import torch
from conftest import LOW, half_plan, logits
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dha_utils import (
    HeadPlan,
    fuse,
    head_similarity,
    plan_heads,
    plant_redundancy,
    pretrain,
)
from dha_utils.fuse.refit import refit
from dha_utils.fuse.spectral import fuse_keys, fuse_values
from dha_utils.measure.energies import head_energies
from dha_utils.measure.planted import apply_freedoms
from dha_utils.measure.similarity import METRICS
from dha_utils.paper.linear import learn_fusion
from dha_utils.sources.precision import cast_weights, served_dtype


def loaded(model, folder, dtype):
    """As a user has it."""
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_fused_in_memory_is_saved_and_loaded(dtype, mha, tmp_path):
    source = loaded(mha, tmp_path / "source", dtype)
    fused = fuse(source, half_plan(source), torch.randint(0, 96, (4, 32)))
    assert fused.model.rotary_emb.inv_freq.dtype == torch.float32 and fused.dtype == dtype
    fused.save_pretrained(tmp_path / "fused")
    far = torch.randint(0, 96, (1, 120))  # rounded frequencies show far from the start
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype="auto"), far), logits(fused, far)
    )
    planted = apply_freedoms(source)
    assert planted.model.rotary_emb.inv_freq.dtype == torch.float32 and planted.dtype == dtype


@pytest.mark.parametrize("dtype", LOW)
def test_a_model_cast_after_loading_is_fused_like_one_loaded_so(dtype, mha, blocks, tmp_path, caplog):
    expected = fuse(loaded(mha, tmp_path, dtype), half_plan(mha), blocks)
    fused = fuse(mha.to(dtype), half_plan(mha), blocks)
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), expected.parameters()))
    assert "RoPE frequencies" in caplog.text


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_lossless_fusion_has_nothing_to_refit_with_any_backend(backend, mha, blocks):
    fused = fuse(mha, HeadPlan.uniform(mha.config, 4, 4), blocks)
    mha.set_attn_implementation(backend)
    refitted, errors = refit(fused, mha, blocks)
    assert (errors["before"] < 1e-9).all() and not errors["kept"].any()
    assert mha.config._attn_implementation == backend and refitted.config._attn_implementation == "sdpa"


def test_the_refit_is_the_same_from_an_eager_source(mha, blocks):
    fused = fuse(mha, half_plan(mha), blocks)
    expected, _ = refit(fused, mha, blocks)
    for model in (mha, fused):
        model.set_attn_implementation("eager")
    got, _ = refit(fused, mha, blocks)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), expected.parameters()))


@pytest.mark.parametrize("dtype", LOW)
def test_refit_and_training_keep_the_dtype_and_help(dtype, mha, tmp_path):
    blocks = torch.randint(0, 96, (32, 32), generator=torch.Generator().manual_seed(3))
    source = cast_weights(mha, dtype)
    fused = fuse(source, half_plan(source), blocks)
    refitted, errors = refit(fused, source, blocks)
    trained = pretrain(fused, blocks, 1280, source, learning_rate=1e-3, tokens_per_step=64, output_dir=tmp_path)
    target = logits(source, blocks).float()
    before = (logits(fused, blocks).float() - target).square().mean()
    for model in (refitted, trained):
        assert model.dtype == dtype and model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert (logits(model, blocks).float() - target).square().mean() < 0.9 * before
    assert errors["kept"].any() and source.dtype == fused.dtype == dtype
    learned = learn_fusion(source, half_plan(source), blocks, 128, tokens_per_step=64, output_dir=tmp_path / "learned")
    assert learned.dtype == dtype


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "q_proj", "o_proj"])
@pytest.mark.parametrize("heads", [[0], [0, 1], [0, 1, 2, 3]])
def test_pruned_heads_leave_finite_weights(name, heads, mha, blocks):
    """Slices of zeros, as pruning leaves them: of one head, of a whole group, of all."""
    for layer in mha.model.layers:
        weight = getattr(layer.self_attn, name).weight
        for head in heads:
            (weight if name != "o_proj" else weight.T).data[12 * head : 12 * head + 12] = 0
    for method in ("mean", "spectral"):
        plan = plan_heads(mha, blocks, 0.5, method, allocation="cost")
        for fused in (fuse(mha, plan, blocks, method), fuse(mha, HeadPlan.uniform(mha.config, 2, 2), blocks, method)):
            assert all(weight.isfinite().all() for weight in fused.parameters())
    for metric in METRICS:
        for kind, similarity in head_similarity(mha, blocks, metric).items():
            assert similarity.isfinite().all(), (metric, kind)
            assert torch.allclose(similarity.diagonal(dim1=1, dim2=2), torch.ones(3, 4), atol=1e-5)
    if name in ("k_proj", "v_proj") and len(heads) == 4:
        own = fuse(
            mha, HeadPlan.uniform(mha.config, 1, 4) if name == "k_proj" else HeadPlan.uniform(mha.config, 4, 1), blocks
        )
        assert torch.allclose(logits(own, blocks), logits(mha, blocks), atol=1e-5), "sharing nothing loses nothing"


def test_training_and_planting_keep_the_served_dtype_and_exact_frequencies(gqa, blocks, tmp_path):
    low = gqa.bfloat16()
    assert low.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    trained = pretrain(low, blocks, 64, tokens_per_step=32, output_dir=tmp_path)
    assert trained.dtype == torch.bfloat16 and trained.model.rotary_emb.inv_freq.dtype == torch.float32
    learned = learn_fusion(low, half_plan(low), blocks, 64, tokens_per_step=32, output_dir=tmp_path)
    planted = plant_redundancy(low)
    for model in (trained, learned, planted):
        assert served_dtype(model) == torch.bfloat16
    high = cast_weights(low, torch.float32)
    high.checkpoint_dtype = torch.bfloat16  # as from load_checkpoint
    for model in (
        plant_redundancy(high),
        learn_fusion(high, half_plan(high), blocks, 64, tokens_per_step=32, output_dir=tmp_path),
    ):
        assert model.dtype == torch.float32 and served_dtype(model) == torch.bfloat16


def test_the_errors_of_a_low_precision_refit_are_those_of_what_is_returned(mha, tmp_path):
    blocks = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(3))
    source = cast_weights(mha, torch.bfloat16)
    refitted, errors = refit(fuse(source, half_plan(source), blocks), source, blocks)
    again = refit(refitted, source, blocks, epochs=0, layer_epochs=0)[1]
    assert again["before"].unstack()["attention"].tolist() == pytest.approx(
        errors["after"].unstack()["layer"].tolist(), rel=1e-4
    )


def test_frozen_models_are_refitted_and_learned_all_the_same(mha, blocks, tmp_path):
    frozen = mha.requires_grad_(False)
    fused = fuse(frozen, half_plan(frozen), blocks).requires_grad_(False)
    assert refit(fused, frozen, blocks)[1]["kept"].any()
    learned = learn_fusion(frozen, half_plan(frozen), blocks, 64, tokens_per_step=32, output_dir=tmp_path)
    assert not torch.equal(learned.model.embed_tokens.weight, frozen.model.embed_tokens.weight)


def test_freedoms_are_drawn_for_any_device(gqa):
    """A device without data stands in for one that is not here."""
    turned = apply_freedoms(gqa.to("meta"))
    assert turned.model.layers[0].self_attn.k_proj.weight.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_whole_way_on_a_gpu(gqa, blocks, tmp_path):
    expected = fuse(gqa, HeadPlan.uniform(gqa.config, 2, 1), blocks)
    source = gqa.to("cuda")
    planted = plant_redundancy(source)
    assert torch.allclose(logits(planted, blocks.cuda()), logits(source, blocks.cuda()), atol=1e-3)
    plan = plan_heads(planted, blocks, 0.5, allocation="uniform")
    assert plan.key_groups == plan.value_groups == [[[0, 1], [2, 3], [4, 5]]] * 3
    fused = fuse(source, HeadPlan.uniform(gqa.config, 2, 1), blocks)
    assert fused.device.type == "cuda" and torch.allclose(
        logits(fused, blocks.cuda()).cpu(), logits(expected, blocks), atol=1e-3
    )
    plan_heads(source, blocks, 0.5)
    refitted, _ = refit(fused, source, blocks)
    pretrain(refitted, blocks, 128, source, tokens_per_step=64, output_dir=tmp_path)


def test_the_spectral_path_itself_is_lossless_for_single_heads(model, blocks):
    """`fuse` passes single heads by: here the closed form makes each of them anew, in another gauge."""
    d, queries = model.config.head_dim, model.config.num_attention_heads // model.config.num_key_value_heads
    expected = logits(model, blocks)
    energies = head_energies(model, blocks)
    for layer, spectral in zip(model.model.layers, energies):
        attention = layer.self_attn
        before = attention.k_proj.weight.clone()
        fused = [
            [fuse_keys(attention, spectral, [head]), fuse_values(attention, spectral, [head])]
            for head in range(model.config.num_key_value_heads)
        ]
        for head, ((key, query, planes), (value, columns)) in enumerate(fused):
            assert planes.tolist() == list(range(d // 2))
            rows, query_rows = slice(head * d, head * d + d), slice(head * queries * d, (head + 1) * queries * d)
            for projection, chosen, made in (
                (attention.k_proj, rows, key),
                (attention.q_proj, query_rows, query),
                (attention.v_proj, rows, value),
            ):
                width = projection.in_features
                projection.weight.data[chosen] = made[:, :width].float()
                if projection.bias is not None:
                    projection.bias.data[chosen] = made[:, width].float()
            attention.o_proj.weight.data[:, query_rows] = columns.float()
        assert (attention.k_proj.weight - before).norm() > 0.01 * before.norm()
    assert torch.allclose(logits(model, blocks), expected, atol=1e-4)
