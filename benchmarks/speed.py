"""What `decode.py` and `prefill.py` share: random models of published shapes, DHA and its rivals, timed in turn."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from low_rank import LowRankAttention
from transformers import LlamaConfig, LlamaForCausalLM

from dha_utils.compare.cost import SHAPES
from dha_utils.compare.decoding import seconds_in_turn
from dha_utils.model.config import DhaConfig
from dha_utils.model.dha import DhaForCausalLM
from dha_utils.runs import append_rows, has_row
from dha_utils.sources.precision import as_dtype, cast_weights, dtype_name


def add_arguments(parser, study):
    """The arguments that both scripts have."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=as_dtype, default=torch.float32)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{study}.csv")


def shape_config(name, **changes):
    """The `LlamaConfig` of a shape, with `changes` (num_hidden_layers=1 for a single layer)."""
    fields = SHAPES[name] | {"max_position_embeddings": 2**17}
    return LlamaConfig(**fields | changes)


def kept_heads(config, budget):
    """Key and value heads of a layer. Raises ValueError if it is no whole number, or fewer than one of each."""
    kept = 2 * config.num_key_value_heads * budget
    if abs(kept - round(kept)) > 1e-6 or round(kept) < 2:
        raise ValueError(
            f"{budget:.3g} of {2 * config.num_key_value_heads} key and value heads a layer is {kept:.3g} heads"
        )
    return round(kept)


def uneven_maps(config, budget, seed=0):
    """(key_head_map, value_head_map) for each layer: random, ragged, three key heads to two value heads or so, never as
    many of both unless one of each is all that is kept."""
    random, kept = torch.Generator().manual_seed(seed), kept_heads(config, budget)
    keys = min(config.num_key_value_heads, kept - 1, max(round(0.6 * kept), kept // 2 + 1))
    each, maps = config.num_attention_heads // config.num_key_value_heads, ([], [])
    for _ in range(config.num_hidden_layers):
        for layers, count in zip(maps, (keys, kept - keys)):
            spare = torch.randint(count, (config.num_key_value_heads - count,), generator=random)
            groups = torch.cat([torch.arange(count), spare])
            groups = groups[torch.randperm(len(groups), generator=random)]
            layers.append(groups.repeat_interleave(each).tolist())
    return maps


def versions(config, budgets, device="cpu", dtype=torch.float32):
    """{(method, budget): function that makes its model}, weights random; of the source, the budget is 1.

    Two controls tell the kernel from the heads: "source, our code" and "GQA, our code" have the heads of source and of GQA,
    attended to as a DHA model does. GQA needs a whole number of heads at its budget, and is left out where it has none.
    """
    fields, queries = config.to_dict(), config.num_attention_heads

    def ours(key_map, value_map):
        return partial(DhaForCausalLM, DhaConfig(**fields, key_head_map=key_map, value_head_map=value_map))

    def neighbours(heads):
        return [[h * heads // queries for h in range(queries)]] * config.num_hidden_layers

    made = {"source": partial(LlamaForCausalLM, config)}
    made["source, our code"] = ours(*[neighbours(config.num_key_value_heads)] * 2)
    made = {(name, 1.0): make for name, make in made.items()}
    for budget in budgets:
        kept = kept_heads(config, budget)
        if kept % 2 == 0 and queries % (kept // 2) == 0:
            grouped = LlamaConfig(**fields | {"num_key_value_heads": kept // 2})
            made["GQA", budget] = partial(LlamaForCausalLM, grouped)
            made["GQA, our code", budget] = ours(*[neighbours(kept // 2)] * 2)
        made["DHA", budget] = ours(*uneven_maps(config, budget))
    return {key: partial(ready, make, device, dtype) for key, make in made.items()}


def low_rank_versions(config, budgets, device="cpu", dtype=torch.float32):
    """`versions` of the source and of a low-rank cache."""

    def low_rank(kept):
        model = LlamaForCausalLM(config)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn = LowRankAttention(config, index, kept * config.head_dim)
        return model

    made = {("source", 1.0): partial(LlamaForCausalLM, config)}
    made |= {("low rank", budget): partial(low_rank, kept_heads(config, budget)) for budget in budgets}
    return {key: partial(ready, make, device, dtype) for key, make in made.items()}


def ready(make, device, dtype):
    return cast_weights(make().eval().to(device), dtype)


def listed(budgets):
    """Which budgets took turns, for the name of a case: "50% + 25%", which no CSV reads as a number."""
    return " + ".join(f"{100 * budget:.4g}%" for budget in budgets)


@torch.no_grad()
def measure(arguments, case, make):
    """Append a row per method of one `case` ({column: value}), unless the CSV has it: median and quartiles of `seconds`.

    `make()`: {(method, budget): (step, {column: value})}, the function to time and what else its row says. They take turns;
    the first turn is not counted. `speedup`: the seconds of the source over those of the method, turn by turn, so that a
    machine which is slower for a while slows both.
    """
    case = case | {"device": arguments.device, "processor": processor(arguments.device)}
    case |= {"dtype": dtype_name(arguments.dtype), "threads": arguments.threads}
    if has_row(arguments.out, case):
        return
    torch.set_num_threads(arguments.threads)
    if not (made := make()):
        return
    names, steps = list(made), {name: step for name, (step, _) in made.items()}
    seconds = seconds_in_turn(steps, arguments.device, arguments.repeats)
    source = seconds[:, [names.index(("source", 1.0))]] if ("source", 1.0) in names else np.nan
    figures = quartiles("seconds", seconds) | quartiles("speedup", source / seconds)
    rows = []
    for i, (name, (_, said)) in enumerate(made.items()):
        named = case | dict(zip(("method", "budget"), name)) | said
        rows.append(named | {column: found[i] for column, found in figures.items()} | {"repeats": arguments.repeats})
    append_rows(arguments.out, rows)


def quartiles(name, measured):
    """{column: [methods]} of [repeats, methods]: lower quartile, median and upper quartile."""
    return dict(zip((f"{name}_low", name, f"{name}_high"), np.quantile(measured, [0.25, 0.5, 0.75], axis=0)))


def processor(device):
    """What was measured on: the instructions of the CPU ("AVX2"), or the name of the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()
