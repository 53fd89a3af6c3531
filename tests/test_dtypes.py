"""Nothing depends on the dtype, the attention backend or the device that a model happens to be in."""

import json

import pytest
import torch
from conftest import SHAPES, logits, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dha_utils import (
    HeadPlan,
    cache_bytes,
    fuse,
    head_similarity,
    load_checkpoint,
    plan_heads,
    plant_redundancy,
    pretrain,
    save_checkpoint,
)
from dha_utils.checkpoints import cast_weights, served_dtype
from dha_utils.evaluation import bytes_per_token, perplexity
from dha_utils.freedoms import apply_freedoms
from dha_utils.fusion import spectral_layers
from dha_utils.linear import learn_fusion
from dha_utils.redundancy import METRICS
from dha_utils.refit import refit
from dha_utils.runs import write_whole
from dha_utils.statistics import collect_statistics

LOW = (torch.bfloat16, torch.float16)


def half_plan(model):
    return HeadPlan.uniform(model.config, 2, 1)


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


@pytest.mark.parametrize("dtype", LOW)
def test_moments_are_taken_in_float32(dtype, tmp_path):
    source = tiny_llama(**SHAPES["mha"])
    for layer in source.model.layers:
        layer.input_layernorm.weight.data.fill_(10.0)  # products of such activations overflow in float16
    blocks = torch.randint(0, 96, (1, 128))
    source.save_pretrained(tmp_path)
    low = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).float()  # the same rounded weights
    for got, expected in zip(collect_statistics(low, blocks), collect_statistics(exact, blocks)):
        assert got.plain.dtype == torch.float32
        assert torch.allclose(got.plain.trace(), expected.plain.trace(), rtol=4e-3)
    fused = fuse(low, half_plan(low), torch.randint(0, 96, (1, 1024)))
    assert all(weight.isfinite().all() for weight in fused.parameters())


def test_activations_that_are_not_finite_are_refused(mha, blocks):
    mha.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="what layer 2 attends to is not finite: the checkpoint has NaN or infinite weights"
    ):
        fuse(mha, half_plan(mha), blocks)


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


def test_a_checkpoint_keeps_its_dtype(blocks, tmp_path):
    model = tiny_llama(vocab_size=4096, num_attention_heads=6, num_key_value_heads=6, head_dim=8)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    load_checkpoint("wiki-mha")[1].save_pretrained(tmp_path / "source")
    source, tokenizer = load_checkpoint(tmp_path / "source")
    assert source.dtype == torch.float32 and served_dtype(source) == torch.bfloat16
    own = bytes_per_token(source)
    assert own == 2 * 3 * 6 * 8 * 2 and cache_bytes(source, 1) == 2 * own  # it computes in float32 here
    assert plan_heads(source, blocks, cache_bytes=own, allocation="uniform").budget == 1.0
    assert plan_heads(source, blocks, cache_bytes=own // 2, allocation="uniform").budget == 0.5
    with pytest.raises(ValueError, match="in each of 3 layers take 96 in bfloat16"):
        plan_heads(source, blocks, cache_bytes=95)
    fused = fuse(source, HeadPlan.uniform(source.config, 3, 3), blocks)
    for model in (fused, refit(fused, source, blocks)[0]):
        save_checkpoint(model, tokenizer, tmp_path / "fused")
        again, own_tokenizer = load_checkpoint(tmp_path / "fused", dtype="auto")
        assert again.dtype == torch.bfloat16 and again.config.dtype == torch.bfloat16
        assert model.dtype == torch.float32 and bytes_per_token(again) == bytes_per_token(model) == own / 2
        assert own_tokenizer("a word")["input_ids"] == tokenizer("a word")["input_ids"]
        assert perplexity(again, blocks) == pytest.approx(perplexity(model, blocks), rel=0.01)
    assert (tmp_path / "fused" / "model.safetensors").stat().st_size < (
        tmp_path / "source" / "model.safetensors"
    ).stat().st_size
    save_checkpoint(fused, tokenizer, tmp_path / "told", dtype=torch.float32)
    assert load_checkpoint(tmp_path / "told", dtype="auto")[0].dtype == torch.float32
    assert load_checkpoint(tmp_path / "told", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_folder_of_something_else_is_not_replaced(mha, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis is there and holds other things than a llama checkpoint"):
        save_checkpoint(mha, load_checkpoint("wiki-mha")[1], tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_source_is_not_replaced_by_what_is_made_of_it(mha, blocks, tmp_path):
    tokenizer = load_checkpoint("wiki-mha")[1]
    save_checkpoint(mha, tokenizer, tmp_path / "model")
    fused = fuse(mha, half_plan(mha), blocks)
    with pytest.raises(ValueError, match="holds other things than a dha checkpoint: choose another folder"):
        save_checkpoint(fused, tokenizer, tmp_path / "model")
    write_whole(tmp_path / "model" / "thesis.txt", "years of work")
    with pytest.raises(ValueError, match="holds other things than a llama checkpoint"):
        save_checkpoint(mha, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "thesis.txt").unlink()
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two renames
    save_checkpoint(mha, tokenizer, tmp_path / "model", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(mha, tokenizer, tmp_path / "empty")
    write_whole(tmp_path / "file", "precious")
    with pytest.raises(ValueError, match="holds other things than a llama checkpoint"):
        save_checkpoint(mha, tokenizer, tmp_path / "file")
    with pytest.raises(ValueError, match="the dtype must be one of float32, bfloat16 and float16, not 'fp16'"):
        load_checkpoint("wiki-mha", dtype="fp16")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.float16


def test_the_dtype_is_that_of_the_weights_where_the_config_has_none(tmp_path):
    model = tiny_llama(vocab_size=4096, num_attention_heads=4).to(torch.bfloat16)
    save_checkpoint(model, load_checkpoint("wiki-mha")[1], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    write_whole(tmp_path / "model" / "config.json", json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    loaded, _ = load_checkpoint(tmp_path / "model")
    assert served_dtype(loaded) == torch.bfloat16 and loaded.dtype == torch.float32


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


def test_dropout_of_a_model_in_training_mode_reaches_no_measurement(blocks):
    source = tiny_llama(num_attention_heads=4, attention_dropout=0.3).train()
    fused = [fuse(source, half_plan(source), blocks) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(fused[0].parameters(), fused[1].parameters()))
    assert perplexity(source, blocks) == perplexity(source, blocks) and source.training


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
    layers = spectral_layers(model, blocks)
    for layer, spectral in zip(model.model.layers, layers):
        attention = layer.self_attn
        before = attention.k_proj.weight.clone()
        fused = [
            [spectral.fuse_keys([head]), spectral.fuse_values([head])] for head in range(model.config.num_key_value_heads)
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
