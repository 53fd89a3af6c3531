"""Recovery on tiny models: the loss falls, only what may move moves."""

import pytest
import torch
from conftest import changed, logits

from dha_utils import pretrain
from dha_utils.measure.perplexity import perplexity
from dha_utils.recover.training import training_log


def test_distillation_draws_the_model_to_its_teacher(mha, fused, blocks, tmp_path):
    before = (logits(fused, blocks) - logits(mha, blocks)).square().mean()
    trained = pretrain(fused, blocks, 2560, mha, learning_rate=5e-3, tokens_per_step=64, output_dir=tmp_path)
    after = (logits(trained, blocks) - logits(mha, blocks)).square().mean()
    assert after < 0.5 * before
    names = changed(fused, trained)
    assert names and all(".self_attn." in name for name in names)
    assert type(trained) is type(fused) and not trained.training


def test_lora_trains_adapters_on_the_attention_and_merges_them(mha, fused, blocks, tmp_path):
    def run(folder):
        return pretrain(
            fused, blocks, 640, mha, "lora", 1e-2, tokens_per_step=64, validation=blocks, output_dir=folder, lora_rank=4
        )

    trained = run(tmp_path)
    log = training_log(tmp_path)
    assert log["perplexity"].iloc[-1] < log["perplexity"].iloc[0]
    assert log["perplexity"].iloc[-1] == pytest.approx(perplexity(trained, blocks), rel=1e-4)
    names = changed(fused, trained)
    assert type(trained) is type(fused) and trained.state_dict().keys() == fused.state_dict().keys()
    assert len(names) == 4 * len(fused.model.layers) and all("_proj.weight" in name for name in names)
    moved = (trained.state_dict()[name] - fused.state_dict()[name] for name in names)
    assert all(torch.linalg.matrix_rank(change, rtol=1e-3) <= 4 for change in moved)
    assert not changed(trained, run(tmp_path))


def test_lm_loss_on_all_weights_and_the_source_as_control(mha, fused, blocks, tmp_path):
    for name, model in (("fused", fused), ("source", mha)):
        folder = tmp_path / name
        trained = pretrain(
            model,
            blocks,
            640,
            trainable="all",
            learning_rate=1e-2,
            tokens_per_step=64,
            validation=blocks,
            output_dir=folder,
        )
        log = training_log(folder)
        assert log["tokens"].tolist() == [0, 128, 256, 384, 512, 640]
        assert log["perplexity"].iloc[0] == pytest.approx(perplexity(model, blocks), rel=1e-4)
        assert log["perplexity"].iloc[-1] == pytest.approx(perplexity(trained, blocks), rel=1e-4)
        assert log["perplexity"].iloc[-1] < 0.9 * log["perplexity"].iloc[0]
        assert len(changed(model, trained)) == len(list(model.parameters()))
