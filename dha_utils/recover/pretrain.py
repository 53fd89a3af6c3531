"""Recovery: continued pre-training (DHA §4.4) on the LM loss, or on the source's logits."""

import copy
import math

import torch
from torch.nn.functional import kl_div

from ..runs import fingerprint
from ..sources.precision import cast_weights

TRAINABLE = ("attention", "all", "lora")


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
    lora_rank=16,
):
    """A copy of `model` (DHA, or the LLaMA source as a control) trained on `tokens` tokens of `blocks` [blocks, length].

    The blocks are drawn in an order that only `seed` decides, so that every model with the same seed sees the same text.
    With a `teacher` the loss is KL(teacher ‖ model) a token, without it the LM loss. `trainable`: the "attention"
    weights, "all", or "lora": adapters of rank `lora_rank` on the attention weights (peft), merged in the end, for people
    with little memory; they want about ten times the `learning_rate`. AdamW, linear warm-up over a tenth of the steps,
    then cosine decay of `learning_rate`.
    `validation` [blocks, length]: its perplexity is measured `evaluations` times, evenly spaced, and at the start.

    Trained in float32, in which small steps are not lost, and given back in the dtype of `model`.

    `output_dir` gets `log.csv` (`training_log` reads it) and checkpoints, from which the same call resumes.

    Raises ValueError as `train` does, or if there is no such part to train.
    """
    from .training import train  # here: transformers' Trainer imports datasets and peft where they are installed

    if trainable not in TRAINABLE:
        raise ValueError(f"cannot train {trainable!r} weights: choose one of {', '.join(TRAINABLE)}")
    dtype, model = model.dtype, cast_weights(copy.deepcopy(model), torch.float32)
    if trainable == "lora":
        from peft import LoraConfig, LoraModel
        from transformers import set_seed

        set_seed(seed)
        adapters = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        tuner = LoraModel(model, adapters, "default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trainable == "all" or (".lora_" if trainable == "lora" else ".self_attn.") in name
    train(
        model,
        blocks,
        tokens,
        loss=distillation(teacher) if teacher is not None else None,
        tokens_per_step=tokens_per_step,
        seed=seed,
        validation=validation,
        evaluations=evaluations,
        output_dir=output_dir,
        settings=[teacher is not None and fingerprint(teacher), trainable, lora_rank],
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(tokens // tokens_per_step / 10),
    )
    if trainable == "lora":
        model = tuner.merge_and_unload()
    return cast_weights(model, dtype).requires_grad_(True)


def distillation(teacher):
    """KL(teacher ‖ model) in nats a token, as a loss for `train`."""

    cast_weights(teacher, teacher.dtype).eval()  # its own dtype, exact frequencies, no dropout

    def loss(model, input_ids, step):
        with torch.no_grad():  # before the model: its activations do not exist yet
            target = teacher(input_ids=input_ids, use_cache=False).logits.float().log_softmax(-1)
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
        return kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean(), {}

    return loss
