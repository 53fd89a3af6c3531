"""The training loop of this package: transformers' `Trainer` with a loss of one's own, resumable."""

import math
import os
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_model
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    __version__,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..runs import fingerprint, write_whole

SAVE_SECONDS = 300  # the most that an interruption costs


class LossTrainer(Trainer):
    """A `Trainer` that trains on `loss(model, input_ids, step) -> (loss, {figures})`; evaluation keeps the LM loss."""

    loss, logged = None, {}

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.loss is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, self.logged = self.loss(model, inputs["input_ids"], self.state.global_step)
        return loss

    def log(self, logs, start_time=None):
        super().log(logs | self.logged if "loss" in logs else logs, start_time)


class _SaveByTheClock(TrainerCallback):
    """Checkpoints by the time they save, not by steps: one of all weights takes gigabytes, a step maybe milliseconds."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    on_save = on_train_begin

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= time.monotonic() - self.saved > SAVE_SECONDS


def train(
    model,
    blocks,
    tokens,
    loss=None,
    optimizer=None,
    callbacks=(),
    tokens_per_step=1024,
    seed=0,
    validation=None,
    evaluations=5,
    output_dir="runs/training",
    settings=(),
    **arguments,
):
    """Train `model` in place on `tokens` tokens of `blocks` [blocks, length], in an order that only `seed` decides.

    Returns the folder of this run: in `output_dir`, named by all that the result depends on, so that a changed run never
    resumes from another's checkpoint.

    `loss`: as `LossTrainer` takes it; None is the LM loss. `optimizer`: None is AdamW on the weights that require a
    gradient. `validation` [blocks, length]: its perplexity is measured `evaluations` times, evenly spaced, and at the
    start. `settings`: all else that the result depends on, the loss included; `arguments`: more of `TrainingArguments`.
    `output_dir` gets `log.csv` (`training_log` reads it) and, every `SAVE_SECONDS`, a checkpoint, from which the same call
    resumes.

    Raises ValueError if the tokens do not make a step, a step is not a whole number of blocks, or several devices would
    each take the tokens of a step.
    """
    length = blocks.shape[1]
    if tokens_per_step % length or tokens < tokens_per_step:
        raise ValueError(
            f"{tokens} tokens in steps of {tokens_per_step} do not fit blocks of {length}: a step must hold a whole "
            "number of blocks, and the tokens at least one step"
        )
    steps = tokens // tokens_per_step
    rates = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] if optimizer else []
    settings = [rates, tokens, tokens_per_step, seed, evaluations, *settings, arguments, torch.__version__, __version__]
    checkpoints = Path(output_dir) / fingerprint(model, blocks, validation, *settings)
    checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    every = max(1, steps // evaluations)
    set_seed(seed)
    trainer = LossTrainer(
        model,
        TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=tokens_per_step // length,
            per_device_eval_batch_size=tokens_per_step // length,
            weight_decay=0.0,
            seed=seed,
            eval_strategy="no" if validation is None else "steps",
            eval_steps=every,
            eval_on_start=validation is not None and not checkpoint,  # its log has the start
            save_strategy="no",  # but `_SaveByTheClock`
            save_total_limit=1,
            report_to="none",
            disable_tqdm="TQDM_DISABLE" in os.environ,  # else Trainer's own bar, a table in notebooks
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
            **{"logging_steps": every} | arguments,
        ),
        train_dataset=as_examples(blocks),
        eval_dataset=None if validation is None else as_examples(validation),
        optimizers=(optimizer, None),
        callbacks=[*callbacks, _SaveByTheClock()],
    )
    devices = trainer.args.train_batch_size * trainer.args.world_size * length // tokens_per_step
    if devices != 1:
        raise ValueError(f"training runs on one device, not on {devices}: show it one only (CUDA_VISIBLE_DEVICES=0)")
    trainer.loss = loss
    trainer.remove_callback(PrinterCallback)
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else None
    if state and state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
        load_model(model, f"{checkpoint}/model.safetensors")  # `Trainer` would add a step
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    log = pd.DataFrame(trainer.state.log_history).groupby("step", as_index=False).first()
    log.insert(1, "tokens", log["step"] * tokens_per_step)
    write_whole(Path(output_dir) / "log.csv", log.to_csv(index=False))
    model.config.use_cache = True  # Trainer turned it off
    model.eval()
    return checkpoints


def training_log(output_dir):
    """The log of `train` there: step, tokens, loss, perplexity on the validation blocks, and the figures of its loss."""
    log = pd.read_csv(Path(output_dir) / "log.csv")
    if "eval_loss" in log:
        log["perplexity"] = log["eval_loss"].map(math.exp)
    own = ("step", "tokens", "loss", "perplexity", "fusion_loss", "target", "multiplier", "collapsed_perplexity")
    return log[[column for column in own if column in log]]


def as_examples(blocks):
    """Blocks of tokens as the data set that a `Trainer` takes for a causal language model."""
    return [{"input_ids": block, "labels": block} for block in blocks]
