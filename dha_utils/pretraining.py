"""Recovery: continued pre-training (DHA §4.4) by transformers' `Trainer`, on the LM loss or on the source's logits."""

import copy
import hashlib
import json
import math
import os
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import kl_div
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .runs import write_whole

TRAINABLE = ("attention", "all")


def pretrain(
    model,
    blocks,
    tokens,
    teacher=None,
    trainable="attention",
    learning_rate=5e-4,
    tokens_per_step=1024,
    seed=0,
    validation=None,
    evaluations=5,
    output_dir="runs/pretraining",
):
    """A copy of `model` (DHA, or the LLaMA source as a control) trained on `tokens` tokens of `blocks` [blocks, length].

    The blocks are drawn in an order that only `seed` decides, so that every model with the same seed sees the same text.
    With a `teacher` the loss is KL(teacher ‖ model) a token, without it the LM loss. `trainable`: the "attention"
    weights or "all". AdamW, linear warm-up over a tenth of the steps, then cosine decay of `learning_rate`.
    `validation` [blocks, length]: its perplexity is measured `evaluations` times, evenly spaced, and at the start.

    `output_dir` gets `log.csv` (`training_log` reads it) and checkpoints, from which the same call resumes.

    Raises ValueError if the tokens do not make a step, or a step is not a whole number of blocks.
    """
    length = blocks.shape[1]
    if trainable not in TRAINABLE:
        raise ValueError(f"cannot train {trainable!r} weights: choose one of {', '.join(TRAINABLE)}")
    if tokens_per_step % length or tokens < tokens_per_step:
        raise ValueError(
            f"{tokens} tokens in steps of {tokens_per_step} do not fit blocks of {length}: a step must hold a whole "
            "number of blocks, and the tokens at least one step"
        )
    steps = tokens // tokens_per_step
    settings = [tokens, teacher is not None, trainable, learning_rate, tokens_per_step, seed, evaluations]
    checkpoints = Path(output_dir) / _fingerprint(model, blocks, settings)
    set_seed(seed)
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trainable == "all" or ".self_attn." in name
    every = max(1, steps // evaluations)
    trainer = _DistillationTrainer(
        model,
        TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=tokens_per_step // length,
            per_device_eval_batch_size=tokens_per_step // length,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(steps / 10),
            weight_decay=0.0,
            seed=seed,
            logging_steps=every,
            eval_strategy="no" if validation is None else "steps",
            eval_steps=every,
            eval_on_start=validation is not None,
            save_steps=every,
            save_total_limit=1,
            report_to="none",
            disable_tqdm="TQDM_DISABLE" in os.environ,  # else Trainer's own bar, a table in notebooks
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
        ),
        train_dataset=as_examples(blocks),
        eval_dataset=None if validation is None else as_examples(validation),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.teacher = teacher
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    log = pd.DataFrame(trainer.state.log_history).groupby("step", as_index=False).first()
    log.insert(1, "tokens", log["step"] * tokens_per_step)
    write_whole(Path(output_dir) / "log.csv", log.to_csv(index=False))
    model.config.use_cache = True  # Trainer turned it off
    return model.requires_grad_(True).eval()


def training_log(output_dir):
    """What `pretrain` logged there: step, tokens, loss, and perplexity on the validation blocks."""
    log = pd.read_csv(Path(output_dir) / "log.csv")
    if "eval_loss" in log:
        log["perplexity"] = log["eval_loss"].map(math.exp)
    return log[[c for c in ("step", "tokens", "loss", "perplexity") if c in log]]


def as_examples(blocks):
    """Blocks of tokens as the data set that a `Trainer` takes for a causal language model."""
    return [{"input_ids": block, "labels": block} for block in blocks]


class _DistillationTrainer(Trainer):
    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        with torch.no_grad():
            target = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits.log_softmax(-1)
        loss = kl_div(outputs.logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


def _fingerprint(model, blocks, settings):
    """Names a training run by all it depends on, so that a changed run never resumes from another's checkpoint."""
    weights = [parameter.detach().double().abs().sum().item() for parameter in model.parameters()]
    text = json.dumps([settings, weights, blocks.shape, blocks.double().sum().item(), model.config.to_dict()], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
