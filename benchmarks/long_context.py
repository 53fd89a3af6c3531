"""Where fewer heads may hurt first: late positions, copying, a needle in a long text; before and after recovery.

    python benchmarks/long_context.py                      # smollm2-135m at 67, 50 and 33 %; two hours on one core
    python benchmarks/long_context.py --repeated 0.25      # calibrated, and trained, on blocks of which a quarter repeat

For the source, for DHA at each budget, refitted and then trained on the source's logits (`recovery.py`'s way), and for a
low-rank cache of the same size, refitted on the same blocks:
*position*: the LM loss by place in texts of --context tokens; *copy*: the loss on the second half of a
passage that is repeated after `place` tokens; *needle*: the loss on a number of five digits that is asked for at the end of
a text which has named it at `place`, a share of its length. A row a block of text (position) or draw (copy, needle); the
same texts for all models. Rows that the CSV already has are not measured again.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from inputs import add_inputs, parsed
from low_rank import low_rank_model, uniform_ranks, whitened_svd
from recovery import RUNS, refitted_start
from tqdm import tqdm

from dha_utils import load_checkpoint, load_text, pretrain, repeat_passages, token_blocks
from dha_utils.fuse.refit import refit
from dha_utils.measure.moments import collect_moments
from dha_utils.measure.perplexity import token_losses
from dha_utils.runs import append_rows, has_row
from dha_utils.sources.text import drawn

EDGES = [1, 16, 64, 256, *(512 << n for n in range(12))]  # of the positions that a row is the mean of
LAGS = [64, 256, 1024]
DEPTHS = [0.1, 0.5, 0.9]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "smollm2-135m", "long_context")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2 / 3, 0.5, 1 / 3])
    parser.add_argument("--calibration-blocks", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens a block of calibration and training")
    parser.add_argument("--tokens", type=int, default=40960, help="of the recovery")
    parser.add_argument("--repeated", type=float, default=0.0, help="share of the blocks that say a passage twice")
    parser.add_argument(
        "--context", type=int, default=8192, help="tokens a text of the positions (fewer, if the model reads fewer)"
    )
    parser.add_argument("--texts", type=int, default=2, help="so long")
    parser.add_argument("--draws", type=int, default=4, help="of copies and needles")
    parser.add_argument("--needle-length", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    return parsed(parser)


def by_position(model, blocks):
    """One row a block [length] and span of positions: the mean loss of the tokens there."""
    rows = []
    for draw, losses in enumerate(token_losses(model, block[None])[0] for block in blocks):
        for low, high in zip(EDGES, EDGES[1:]):
            if low <= len(losses):
                rows.append(
                    {"task": "position", "place": low, "draw": draw, "loss": losses[low - 1 : high - 1].mean().item()}
                )
    return rows


def by_copy(model, blocks):
    """The loss on a passage [n] of text that the model has read n tokens before."""
    rows = []
    for lag in LAGS:
        for draw, block in enumerate(blocks):
            losses = token_losses(model, block[:lag].repeat(2)[None])[0]
            rows.append({"task": "copy", "place": lag, "draw": draw, "loss": losses[lag:].mean().item()})
    return rows


def by_needle(model, tokenizer, blocks):
    """The loss on a number named at some depth of a text, asked for at its end; as often as there are `blocks`."""
    rows, random = [], torch.Generator().manual_seed(0)
    for draw, block in enumerate(blocks):
        number = str(torch.randint(10000, 100000, (1,), generator=random).item())
        needle, question = (
            tokenizer(said, add_special_tokens=False, return_tensors="pt").input_ids[0]
            for said in (
                f" The secret number is {number}. Remember it.",
                f" What is the secret number? The secret number is {number}",
            )
        )
        last = tokenizer(f" {number}", add_special_tokens=False).input_ids
        asked = sum(bool(tokenizer.decode(token).strip()) for token in last)  # some have the space for themselves
        for depth in DEPTHS:
            before = int(depth * len(block))
            whole = torch.cat([block[:before], needle, block[before:], question])
            losses = token_losses(model, whole[None])[0]
            rows.append({"task": "needle", "place": depth, "draw": draw, "loss": losses[-asked:].mean().item()})
    return rows


def refitted_low_rank(source, calibration, budget):
    cut = low_rank_model(source, whitened_svd(source, collect_moments(source, calibration)), uniform_ranks(source, budget))
    return refit(cut, source, calibration)[0]


def models(arguments, source, tokenizer, training):
    """Yields ({budget, stage}, function that makes the model); a start is made once, a recovery resumes."""
    share = arguments.repeated
    text = repeat_passages(training, share)
    calibration = repeat_passages(drawn(training, arguments.calibration_blocks, seed=0), share)  # as `refitted_start`'s
    yield {"budget": 1.0, "stage": "source", "calibration_tokens": 0, "tokens": 0, "repeated": 0.0}, lambda: source
    for budget in arguments.budgets:
        start = partial(refitted_start, arguments, source, tokenizer, training, budget, repeated=share)

        def recovered(start=start, budget=budget):
            folder = RUNS / f"long-{Path(arguments.model).name}-{budget:.4g}-{arguments.tokens}"
            return pretrain(start(), text, arguments.tokens, source, learning_rate=2e-4, output_dir=folder)

        read = arguments.calibration_blocks * arguments.length
        made = {"budget": round(budget, 4), "calibration_tokens": read, "repeated": share}
        yield made | {"stage": "refitted", "tokens": 0}, start
        yield made | {"stage": "recovered", "tokens": arguments.tokens}, recovered
        rival = partial(refitted_low_rank, source, calibration, budget)
        yield made | {"stage": "low rank, refitted", "tokens": 0}, rival


def main():
    arguments = parse_arguments()
    source, tokenizer = load_checkpoint(arguments.model, device=arguments.device)
    longest, context = max(2 * max(LAGS), arguments.needle_length + 64), source.config.max_position_embeddings
    if longest > context:
        raise SystemExit(f"a repeated passage and a needle's text have up to {longest} tokens, the model reads {context}")
    context = min(context, arguments.context)
    training = token_blocks(tokenizer, load_text(arguments.text, "train"), arguments.length)
    unseen = partial(token_blocks, tokenizer, load_text(arguments.text, "validation"))
    long, short = unseen(context, arguments.texts), unseen(max(LAGS), arguments.draws)
    hay = unseen(arguments.needle_length, arguments.draws)
    setting = {"model": Path(arguments.model).name, "text": arguments.text, "draws": arguments.draws}
    setting |= {"texts": arguments.texts, "needle_length": arguments.needle_length, "length": arguments.length}
    setting |= {"context": context}
    setting["device"] = arguments.device
    for named, make in tqdm(list(models(arguments, source, tokenizer, training)), "models"):
        named = setting | named
        if not has_row(arguments.out, named):
            model = make()
            rows = by_position(model, long) + by_copy(model, short) + by_needle(model, tokenizer, hay)
            append_rows(arguments.out, [named | row for row in rows])


if __name__ == "__main__":
    main()
