"""Train `wiki-mha`, the small multi-head LLaMA of this repository, on the train split of the bundled Wikipedia text.

    python data/train_wiki_mha.py                     # about 90 minutes on one core; run again to resume
    python data/train_wiki_mha.py --steps 20 --out runs/try --work-dir runs/try-work

The tokenizer sees the train split only. Checkpoints are chosen on the calibration split, so that the validation split
stays unseen. The text is short (0.8 M tokens) and soon learned by heart: hence the dropout and the weight decay.
"""

import argparse
import math
from pathlib import Path

import pandas as pd
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import dropout
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from dha_utils.sources.text import load_text, token_blocks

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "wiki-mha", help="where model, tokenizer and log go")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/train-wiki-mha"), help="checkpoints, to resume")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.2, help="after embedding, attention and MLP")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE: nothing is ever unknown."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def random_blocks(tokenizer, texts, count, length, seed):
    """`count` blocks that start anywhere in the text: no two epochs cut it alike."""
    tokens = token_blocks(tokenizer, texts, length=1).flatten()
    starts = torch.randint(len(tokens) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return [as_example(tokens[start : start + length]) for start in starts]


def as_example(block):
    return {"input_ids": block, "labels": block}


def add_dropout(model, p):
    """LLaMA has none of its own on the residual stream: hooks add it for training and leave the weights' names alone."""
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda module, inputs, output: dropout(output, p, module.training))


def bits_per_byte(tokenizer, texts, blocks, loss):
    """Loss in nats a token -> bits a byte, which no choice of vocabulary can flatter."""
    tokens = len(token_blocks(tokenizer, texts, length=1))
    return loss / math.log(2) * tokens / sum(len(text.encode()) for text in texts)


def main():
    arguments = parse_arguments()
    set_seed(arguments.seed)
    train, calibration = load_text("wikipedia", "train"), load_text("wikipedia", "calibration")
    tokenizer = train_tokenizer(train, arguments.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    add_dropout(model, arguments.dropout)
    held_out = token_blocks(tokenizer, calibration, arguments.length)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.work_dir),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=arguments.weight_decay,
            adam_beta2=0.98,
            seed=arguments.seed,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=100,
            save_steps=100,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=random_blocks(
            tokenizer, train, arguments.steps * arguments.batch_size, arguments.length, arguments.seed
        ),
        eval_dataset=[as_example(block) for block in held_out],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(arguments.work_dir)))
    model.config.use_cache = True  # Trainer turned it off
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    log = pd.DataFrame(trainer.state.log_history).groupby("step", as_index=False).first()
    log["eval_bits_per_byte"] = bits_per_byte(tokenizer, calibration, held_out, log["eval_loss"])
    columns = ["step", "epoch", "learning_rate", "grad_norm", "loss", "eval_loss", "eval_bits_per_byte"]
    log[columns].round(6).to_csv(arguments.out / "training_log.csv", index=False)


if __name__ == "__main__":
    main()
