"""Recovery on tiny models: the loss falls, only what may move moves, an interrupted run ends where a whole one does."""

import shutil

import pytest
import torch
from conftest import killed_at_step, logits, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from dha_utils import HeadPlan, fuse, pretrain, save_checkpoint, training
from dha_utils.evaluation import perplexity, scored_tokens, token_losses
from dha_utils.runs import append_rows, has_row, record_metrics, require, rows_with, write_run, write_whole
from dha_utils.training import training_log


@pytest.fixture
def fused(mha, blocks):
    return fuse(mha, HeadPlan.uniform(mha.config, 2, 1), blocks)


def changed(before, after):
    pairs = zip(before.named_parameters(), after.named_parameters())
    return {name for (name, old), (_, new) in pairs if not torch.equal(old, new)}


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


@pytest.mark.parametrize("evaluations, seconds, saved", [(5, 300, 4), (1, 0, 5)])
def test_interrupted_training_ends_where_a_whole_run_does(
    mha, fused, blocks, tmp_path, monkeypatch, evaluations, seconds, saved
):
    monkeypatch.setattr(training, "SAVE_SECONDS", seconds)

    def run(folder):
        settings = {"tokens_per_step": 64, "learning_rate": 1e-3, "evaluations": evaluations, "output_dir": folder}
        return pretrain(fused, blocks, 640, mha, validation=blocks[:2], **settings)

    whole = run(tmp_path / "whole")
    [kept] = (tmp_path / "whole").glob("*/checkpoint-10")
    assert (kept / "model.safetensors").is_file()
    with killed_at_step(fused, 6):
        run(tmp_path / "cut")
    [kept] = (tmp_path / "cut").glob("*/checkpoint-*")
    assert kept.name == f"checkpoint-{saved}"
    resumed = run(tmp_path / "cut")
    assert not changed(whole, resumed)
    log = training_log(tmp_path / "whole")
    measured = ["tokens", "perplexity"]
    assert training_log(tmp_path / "cut")[measured].equals(log[measured])
    assert not changed(whole, run(tmp_path / "whole")) and training_log(tmp_path / "whole").equals(log)


CHANGES = {
    "nothing": {},
    "model": {"model": 1},
    "blocks": {"blocks": 1},
    "tokens": {"tokens": 192},
    "teacher": {"teacher": None},
    "another teacher": {"teacher": 1},
    "trainable": {"trainable": "all"},
    "learning_rate": {"learning_rate": 1e-4},
    "tokens_per_step": {"tokens_per_step": 32},
    "seed": {"seed": 1},
    "validation": {"validation": 1},
    "no validation": {"validation": None},
    "evaluations": {"evaluations": 1},
    "lora": {"trainable": "lora"},
    "lora_rank": {"trainable": "lora", "lora_rank": 4},
}


def test_each_argument_makes_another_run(mha, fused, blocks, tmp_path):
    """In one folder, none resumes from another's checkpoint, or finds its log; the same call again finds its own."""
    other = {"model": fuse(mha, HeadPlan.uniform(mha.config, 2, 1), method="mean"), "blocks": blocks.flip(0)}
    other |= {"teacher": other["model"], "validation": blocks[2:4]}
    settings = {"model": fused, "blocks": blocks, "tokens": 128, "teacher": mha, "validation": blocks[:2]}
    settings |= {"tokens_per_step": 64, "output_dir": tmp_path, "evaluations": 2}
    for change in [*CHANGES.values(), {}]:
        changed = {name: other[name] if value == 1 and name in other else value for name, value in change.items()}
        trained = pretrain(**settings | changed)
        if (settings | changed)["validation"] is not None:
            measured = perplexity(trained, (settings | changed)["validation"])
            assert training_log(tmp_path)["perplexity"].iloc[-1] == pytest.approx(measured, rel=1e-4)
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == len(CHANGES)


def test_runs_are_named_by_content():
    def name(**changes):
        return training.fingerprint(tiny_llama(**{"num_attention_heads": 4} | changes), torch.arange(6), {"a": 1})

    assert name() == name() != name(seed=1)
    assert (
        len({name(), name(num_attention_heads=2), training.fingerprint(torch.arange(6)), training.fingerprint({"a": 1})})
        == 4
    )
    assert training.fingerprint(torch.arange(6)) != training.fingerprint(torch.arange(6).view(2, 3))


def test_several_devices_are_refused(fused, blocks, tmp_path, monkeypatch):
    """`Trainer` gives each device a batch: the tokens of a step would be counted once and trained twice."""
    monkeypatch.setattr(TrainingArguments, "train_batch_size", property(lambda self: 2 * self.per_device_train_batch_size))
    with pytest.raises(
        ValueError, match=r"training runs on one device, not on 2: show it one only \(CUDA_VISIBLE_DEVICES=0\)"
    ):
        pretrain(fused, blocks, 128, tokens_per_step=64, output_dir=tmp_path)


def test_the_number_of_threads_makes_no_other_run(blocks):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2**15, hidden_size=64, num_attention_heads=1, num_hidden_layers=0))
    threads, names = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            names.add(training.fingerprint(model, blocks))
    finally:
        torch.set_num_threads(threads)
    assert len(names) == 1


def test_bad_training_requests_are_refused(fused, blocks, tmp_path):
    with pytest.raises(ValueError, match="10 tokens in steps of 1024 do not fit blocks of 32"):
        pretrain(fused, blocks, 10, output_dir=tmp_path)
    with pytest.raises(ValueError, match="cannot train 'mlp' weights"):
        pretrain(fused, blocks, 1024, trainable="mlp", output_dir=tmp_path)


def test_perplexity_counts_its_tokens(mha, blocks):
    with torch.no_grad():
        expected = torch.stack([mha(block[None], labels=block[None]).loss for block in blocks]).mean().exp().item()
    assert perplexity(mha, blocks) == pytest.approx(expected, rel=1e-5)
    assert scored_tokens(blocks) == token_losses(mha, blocks).numel() == 6 * 31


def test_run_folder_keeps_to_one_run(tmp_path):
    run = write_run(tmp_path / "run", {"model": "a", "budget": 0.5})
    assert write_run(tmp_path / "run", {"model": "a", "budget": 0.5}) == run
    with pytest.raises(ValueError, match="holds a run with model 'a', not 'b': choose another run_dir"):
        write_run(tmp_path / "run", {"model": "b", "budget": 0.5})
    with pytest.raises(ValueError, match="run 02_head_clusters first"):
        require(run, "plan.json", "02_head_clusters")
    (tmp_path / "other").mkdir()
    write_whole(tmp_path / "other" / "thesis.txt", "precious")
    with pytest.raises(ValueError, match="something else than a run"):
        write_run(tmp_path / "other", {"model": "a"})
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_metrics_of_a_stage_replace_its_earlier_ones(tmp_path):
    record_metrics(tmp_path, "source", [{"method": "source", "perplexity": 9.0}])
    record_metrics(tmp_path, "trained", [{"method": "x", "perplexity": 8.0}])
    record_metrics(tmp_path, "source", [{"method": "source", "perplexity": 7.0}])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert sorted(lines) == sorted(["stage,method,perplexity", "trained,x,8.0", "source,source,7.0"])


def test_a_measured_row_is_found_again(tmp_path):
    path, run = tmp_path / "rows.csv", {"method": "mean", "budget": 1 / 3, "seed": 1}
    assert not has_row(path, run)
    append_rows(path, [run | {"perplexity": 23.456789}])
    assert has_row(path, run) and rows_with(path, run)["perplexity"].tolist() == [23.4568]
    assert not has_row(path, run | {"seed": 2}) and not has_row(path, run | {"budget": 0.333})


def test_rows_without_seconds_leave_those_of_others_as_they_were(tmp_path):
    for seconds in (6, None, None):
        append_rows(tmp_path / "rows.csv", [{"seed": 0, "seconds": seconds}])
    assert (tmp_path / "rows.csv").read_text().split() == ["seed,seconds", "0,6", "0,", "0,"]


def test_a_model_is_replaced_whole(fused, tmp_path):
    class Tokenizer:
        def save_pretrained(self, path):
            (path / "tokenizer.json").write_text("{}")

    for _ in range(2):
        save_checkpoint(fused, Tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.rmtree(tmp_path / "model")
