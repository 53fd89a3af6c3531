"""What a conversion costs: seconds and peak memory of `convert`, and how both grow with the model's shape.

    python benchmarks/conversion_cost.py                     # random shapes, one dimension varied at a time
    python benchmarks/conversion_cost.py --cases smollm2-135m --blocks 16 --length 512
    python benchmarks/conversion_cost.py --cases llama-2-7b --layers 4 --blocks 32 --length 512

Random weights in bfloat16 are written in shards to a temporary folder, which is deleted after, and read one layer at a
time; `llama-2-7b` has the shape of arXiv 2307.09288, `--layers` of it. Every case runs in a process of its own; its memory
is that process's peak so far, by the operating system, everything included. Half of the heads are kept, every layer is
refitted. Cases that the CSV already has are not measured again.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from dha_utils import convert, load_text, token_blocks
from dha_utils.runs import append_rows, has_row, peak_gib
from dha_utils.sources.checkpoints import DATA, find_checkpoint, load_tokenizer
from dha_utils.sources.output import write_index

HERE = Path(__file__).parent
BASE = {"layers": 8, "hidden": 512, "heads": 8, "key_value_heads": 8, "mlp": 1536, "vocabulary": 4096}
SHAPES = {
    "base": BASE,
    **{f"layers {n}": BASE | {"layers": n} for n in (4, 16, 32)},
    **{f"heads {n}": BASE | {"heads": n, "key_value_heads": n} for n in (4, 16, 32)},
    **{f"hidden {n}": BASE | {"hidden": n, "mlp": 3 * n} for n in (256, 1024)},
    "llama-2-7b": {"layers": 32, "hidden": 4096, "heads": 32, "key_value_heads": 32, "mlp": 11008, "vocabulary": 32000},
}
STAGES = {"plan_layers": "pricing", "convert_layers": "converting", "finish": "writing the rest"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[name for name in SHAPES if name != "llama-2-7b"])
    parser.add_argument("--layers", type=int, help="fewer layers of a shape")
    parser.add_argument("--blocks", type=int, default=8, help="calibration blocks")
    parser.add_argument("--length", type=int, default=256, help="tokens per block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "conversion_cost.csv")
    return parser.parse_args()


def random_checkpoint(folder, shape):
    """A LLaMA of that shape with random weights in bfloat16, one shard per layer; the tokenizer is any."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_value_heads"],
        intermediate_size=shape["mlp"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    shards = {}
    for name, weight in weights.items():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = weight.shape
    for place, (_, shapes) in enumerate(shards.items()):
        shard = {name: torch.ones(s) if len(s) == 1 else 0.02 * torch.randn(s) for name, s in shapes.items()}
        save_file({name: w.bfloat16() for name, w in shard.items()}, folder / f"model-{place:05d}.safetensors")
    write_index(folder, sorted(path.name for path in folder.glob("*.safetensors")))
    config.save_pretrained(folder)
    load_tokenizer("austen-mha", DATA / "austen-mha", config).save_pretrained(folder)


def measured(case, layers, blocks, length, device):
    """The rows of one case, one row per stage."""
    rows, module = [], import_module("dha_utils.convert")

    def timed(stage, function):
        def run(*arguments, **named):
            begin = time.perf_counter()
            result = function(*arguments, **named)
            rows.append({"stage": stage, "seconds": time.perf_counter() - begin, "peak_gib": peak_gib()})
            return result

        return run

    for name, stage in STAGES.items():
        setattr(module, name, timed(stage, getattr(module, name)))
    with tempfile.TemporaryDirectory() as scratch:
        source = case
        if case in SHAPES:
            source = Path(scratch) / "source"
            source.mkdir()
            random_checkpoint(source, SHAPES[case] | ({"layers": layers} if layers else {}))
            text = torch.randint(0, SHAPES[case]["vocabulary"], (blocks, length))
        else:
            folder, config = find_checkpoint(case)
            text = token_blocks(load_tokenizer(case, folder, config), load_text("wikipedia", "train"), length, blocks)
        whole = timed("convert", convert)
        out = whole(source, text, Path(scratch) / "out", budget=0.5, device=device)
        config = json.loads((out / "config.json").read_text())
    shape = {
        "case": case,
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "key_value_heads": config["source_num_key_value_heads"],
        "mlp": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "tokens": text.numel(),
        "length": length,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    return [shape | row for row in rows]


def main():
    arguments = parse_arguments()
    for case in tqdm(arguments.cases, "cases"):
        tokens, fewer = arguments.blocks * arguments.length, {"layers": arguments.layers} if arguments.layers else {}
        run = {"case": case, "tokens": tokens, "length": arguments.length, "device": arguments.device}
        if has_row(arguments.out, run | {"threads": torch.get_num_threads()} | fewer):
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            wanted = case, arguments.layers, arguments.blocks, arguments.length, arguments.device
            append_rows(arguments.out, process.submit(measured, *wanted).result())


if __name__ == "__main__":
    main()
