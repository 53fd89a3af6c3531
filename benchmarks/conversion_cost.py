"""What a conversion costs: seconds and peak memory of each of its stages, and how both grow with the model's shape.

    python benchmarks/conversion_cost.py                     # random shapes, one dimension varied at a time
    python benchmarks/conversion_cost.py --cases smollm2-135m --blocks 16 --length 512
    python benchmarks/conversion_cost.py --cases tinyllama-1.1b --device cuda   # measured on an H200

The shapes have random weights and a vocabulary of 1,024; `tinyllama-1.1b` is TinyLlama's shape (arXiv 2401.02385). Every
case runs in a process of its own; its memory is the process's peak so far, weights of source and product included. Half
of the heads are kept. Cases that results/conversion_cost.csv already has are not measured again.
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from dha_utils import fuse, load_checkpoint, load_text, token_blocks
from dha_utils.fuse.refit import refit
from dha_utils.measure.energies import head_energies
from dha_utils.plan.allocate import heads_for_budget, knapsack
from dha_utils.plan.partition import group_heads, plan_of_counts
from dha_utils.plan.prices import after_refit, loss_increase
from dha_utils.runs import append_rows, has_row

HERE = Path(__file__).parent
BASE = {"layers": 8, "hidden": 512, "heads": 8, "key_value_heads": 8, "mlp": 1536}
SHAPES = {
    "base": BASE,
    **{f"layers {n}": BASE | {"layers": n} for n in (4, 16, 32)},
    **{f"heads {n}": BASE | {"heads": n, "key_value_heads": n} for n in (4, 16, 32)},
    **{f"hidden {n}": BASE | {"hidden": n, "mlp": 3 * n} for n in (256, 1024, 2048)},
    "tinyllama-1.1b": {"layers": 22, "hidden": 2048, "heads": 32, "key_value_heads": 4, "mlp": 5632},
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[name for name in SHAPES if name != "tinyllama-1.1b"])
    parser.add_argument("--blocks", type=int, default=4, help="calibration blocks")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "conversion_cost.csv")
    return parser.parse_args()


def source_model(case, blocks, length, device):
    """The checkpoint of that name with calibration text, or the random model of that shape with random tokens."""
    if case not in SHAPES:
        model, tokenizer = load_checkpoint(case, device=device)
        return model, token_blocks(tokenizer, load_text("wikipedia", "train"), length, blocks)
    shape = SHAPES[case]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_value_heads"],
        intermediate_size=shape["mlp"],
    )
    return LlamaForCausalLM(config).to(device).eval(), torch.randint(0, 1024, (blocks, length))


def convert(case, blocks, length, device):
    """The rows of one case, a row a stage."""
    rows, begin = [], time.perf_counter()
    model, text = source_model(case, blocks, length, device)
    shape = {
        "case": case,
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "heads": model.config.num_attention_heads,
        "key_value_heads": model.config.num_key_value_heads,
        "parameters": model.num_parameters(),
        "tokens": text.numel(),
        "device": device,
        "threads": torch.get_num_threads(),
    }

    def done(stage):
        nonlocal begin
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peak = host if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        rows.append(shape | {"stage": stage, "seconds": seconds, "peak_mib": peak})
        begin = time.perf_counter()

    done("load")
    energies = head_energies(model, text)
    done("statistics")
    partitions = group_heads(model, text, energies=energies)
    done("groups")
    prices = after_refit(loss_increase(model, text))
    done("rises of the loss")
    fused = fuse(
        model, plan_of_counts(partitions, knapsack(prices, heads_for_budget(model.config, 0.5))), energies=energies
    )
    done("fusion")
    refit(fused, model, text)
    done("refit")
    return rows


def main():
    arguments = parse_arguments()
    for case in tqdm(arguments.cases, "cases"):
        tokens = arguments.blocks * arguments.length
        if has_row(arguments.out, {"case": case, "tokens": tokens, "device": arguments.device}):
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows = process.submit(convert, case, arguments.blocks, arguments.length, arguments.device).result()
        append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
