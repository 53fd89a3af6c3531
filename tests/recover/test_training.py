"""Training runs: an interrupted one ends where a whole one does, each has a name of its own."""

import pytest
import torch
from conftest import changed, killed_at_step
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from dha_utils import HeadPlan, fuse, pretrain
from dha_utils.measure.perplexity import perplexity
from dha_utils.recover import training
from dha_utils.recover.training import training_log


@pytest.mark.parametrize("evaluations", [5, 1])
def test_interrupted_training_ends_where_a_whole_run_does(mha, fused, blocks, tmp_path, monkeypatch, evaluations):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)

    def run(folder):
        settings = {"tokens_per_step": 64, "learning_rate": 1e-3, "evaluations": evaluations, "output_dir": folder}
        return pretrain(fused, blocks, 640, mha, validation=blocks[:2], **settings)

    whole = run(tmp_path / "whole")
    [kept] = (tmp_path / "whole").glob("*/checkpoint-10")
    assert (kept / "model.safetensors").is_file()
    with killed_at_step(fused, 6):
        run(tmp_path / "cut")
    [kept] = (tmp_path / "cut").glob("*/checkpoint-*")
    assert kept.name == "checkpoint-5"
    resumed = run(tmp_path / "cut")
    assert not changed(whole, resumed)
    log = training_log(tmp_path / "whole")
    measured = ["tokens", "perplexity"]
    assert training_log(tmp_path / "cut")[measured].equals(log[measured])
    assert not changed(whole, run(tmp_path / "whole")) and training_log(tmp_path / "whole").equals(log)


def test_a_short_run_writes_no_checkpoint(fused, blocks, tmp_path):
    runs = [pretrain(fused, blocks, 640, tokens_per_step=64, output_dir=tmp_path) for _ in range(2)]
    assert not changed(*runs) and not list(tmp_path.glob("*/checkpoint-*"))


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
