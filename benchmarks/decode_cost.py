"""One decoding step of one attention layer: source, DHA with half of the heads, and a low-rank cache of the same size.

    python benchmarks/decode_cost.py                # the shape of smollm2-135m, several contexts

A low-rank cache must rebuild every key of the context at every step, because RoPE stands between cache and score; its
values need not be rebuilt (the attention weights meet the cache first). All three are timed in turn in one process;
seconds are medians with quartiles of torch.utils.benchmark. Writes results/decode_cost.csv.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dha_utils import HeadPlan
from dha_utils.fuse.layer import head_map
from dha_utils.model.config import DhaConfig
from dha_utils.model.dha import DhaAttention
from dha_utils.runs import write_whole

HERE = Path(__file__).parent


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-value-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "decode_cost.csv")
    return parser.parse_args()


def attention(arguments, key_heads, value_heads):
    """A DHA attention layer that shares contiguous heads; with all key-value heads it is the source's."""
    shape = {
        "hidden_size": arguments.heads * arguments.head_dim,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.key_value_heads,
        "head_dim": arguments.head_dim,
        "num_hidden_layers": 1,
    }
    plan = HeadPlan.uniform(LlamaConfig(**shape), key_heads, value_heads)
    queries = arguments.heads // arguments.key_value_heads
    maps = [[head_map(groups, queries)] for groups in (plan.key_groups[0], plan.value_groups[0])]
    return DhaAttention(DhaConfig(**shape, key_head_map=maps[0], value_head_map=maps[1]), 0).eval()


def dha_step(arguments, context, key_heads, value_heads):
    """A function that attends from one new token to a cache of `context` tokens."""
    layer, batch, dim = attention(arguments, key_heads, value_heads), arguments.batch_size, arguments.head_dim
    query = torch.randn(batch, arguments.heads, 1, dim)
    key, value = (torch.randn(batch, count, context, dim) for count in (key_heads, value_heads))
    return lambda: layer._decode(query, key, value, None)


def low_rank_step(arguments, context, rank):
    """The same from a cache [batch, context, rank] of which keys and values are linear maps."""
    full, batch, dim = arguments.key_value_heads, arguments.batch_size, arguments.head_dim
    layer = attention(arguments, full, full)
    query, cache = torch.randn(batch, arguments.heads, 1, dim), torch.randn(batch, context, rank)
    to_keys, to_values = (torch.randn(rank, full * dim) for _ in range(2))
    config = LlamaConfig(hidden_size=arguments.heads * dim, num_attention_heads=arguments.heads, head_dim=dim)
    cos, sin = LlamaRotaryEmbedding(config)(cache, torch.arange(context)[None])
    per_head = to_values.view(rank, -1, dim).transpose(0, 1)[layer.value_groups.group]  # [heads, rank, d]

    def step():
        key = (cache @ to_keys).view(batch, context, -1, dim).transpose(1, 2)
        key = apply_rotary_pos_emb(key, key, cos, sin)[1]
        scores = layer.key_groups.ungroup(layer.key_groups.grouped(query) @ key.transpose(2, 3)) * layer.scaling
        mixed = scores.softmax(-1) @ cache  # [batch, heads, rank]
        return (mixed.unsqueeze(2) @ per_head).transpose(1, 2)

    return step


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    full = arguments.key_value_heads
    half = max(1, round(full / 2))
    kept = [half, full - half]  # key and value heads, half of all
    rows = []
    for context in tqdm(arguments.contexts, "contexts"):
        steps = {
            "source": dha_step(arguments, context, full, full),
            "DHA": dha_step(arguments, context, *kept),
            "low rank": low_rank_step(arguments, context, sum(kept) * arguments.head_dim),
        }
        for name, step in steps.items():
            with torch.no_grad():
                timer = Timer("step()", globals={"step": step}, num_threads=arguments.threads)
                timed = timer.blocked_autorange(min_run_time=arguments.seconds)
            figures = {"seconds": timed.median, "quartiles": timed.iqr, "threads": arguments.threads}
            size = 2 * full if name == "source" else sum(kept)
            rows.append({"method": name, "context": context, "cached_numbers": size * arguments.head_dim, **figures})
    table = pd.DataFrame(rows)
    source = table[table["method"] == "source"].set_index("context")["seconds"]
    table["times_the_source"] = table["seconds"] / table["context"].map(source)
    write_whole(arguments.out, table.to_csv(index=False, float_format="%.4g"))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
