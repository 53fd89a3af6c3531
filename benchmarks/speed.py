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

TIED = ("SmolLM2-135M", "Llama-3.2-1B")  # embeddings and head are one


def add_arguments(parser, study):
    """The arguments that both scripts have."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=as_dtype, default=torch.float32)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{study}.csv")


def shape_config(name, **changes):
    """The `LlamaConfig` of a shape, with `changes` (num_hidden_layers=1 for a single layer)."""
    fields = SHAPES[name] | {"tie_word_embeddings": name in TIED, "max_position_embeddings": 2**17}
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
    """(key_head_map, value_head_map) for each layer: random, ragged, about three key heads to two value heads."""
    random, kept = torch.Generator().manual_seed(seed), kept_heads(config, budget)
    keys = min(config.num_key_value_heads, kept - 1, round(0.6 * kept))
    each, maps = config.num_attention_heads // config.num_key_value_heads, ([], [])
    for _ in range(config.num_hidden_layers):
        for layers, count in zip(maps, (keys, kept - keys)):
            spare = torch.randint(count, (config.num_key_value_heads - count,), generator=random)
            groups = torch.cat([torch.arange(count), spare])
            groups = groups[torch.randperm(len(groups), generator=random)]
            layers.append(groups.repeat_interleave(each).tolist())
    return maps


def versions(config, budget, device="cpu", dtype=torch.float32):
    """{method: function that makes its model}, weights random. GQA needs a whole number of heads at this budget.

    "source, our code" is the control: all heads of the source, attended to as a DHA model does.
    """
    kept, fields = kept_heads(config, budget), config.to_dict()
    key_map, value_map = uneven_maps(config, budget)

    def low_rank():
        model = LlamaForCausalLM(config)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn = LowRankAttention(config, index, kept * config.head_dim)
        return model

    own = [[h * config.num_key_value_heads // config.num_attention_heads for h in range(config.num_attention_heads)]]
    own = own * config.num_hidden_layers
    made = {
        "source": partial(LlamaForCausalLM, config),
        "source, our code": lambda: DhaForCausalLM(DhaConfig(**fields, key_head_map=own, value_head_map=own)),
        "GQA": lambda: LlamaForCausalLM(LlamaConfig(**fields | {"num_key_value_heads": kept // 2})),
        "DHA": lambda: DhaForCausalLM(DhaConfig(**fields, key_head_map=key_map, value_head_map=value_map)),
        "low rank": low_rank,
    }
    if kept % 2 or config.num_attention_heads % (kept // 2):
        del made["GQA"]

    def ready(make):
        return cast_weights(make().eval().to(device), dtype)

    return {name: partial(ready, make) for name, make in made.items()}


@torch.no_grad()
def measure(arguments, case, make):
    """Append a row per method of one `case` ({column: value}), unless the CSV has it: median and quartiles of `seconds`.

    `make()`: {method: (step, {column: value})}, the function to time and what else its row says. The methods take turns;
    the first turn is not counted.
    """
    dtype = dtype_name(arguments.dtype)
    case = case | {"device": arguments.device, "dtype": dtype, "threads": arguments.threads}
    if has_row(arguments.out, case):
        return
    torch.set_num_threads(arguments.threads)
    if not (made := make()):
        return
    seconds = seconds_in_turn({name: step for name, (step, _) in made.items()}, arguments.device, arguments.repeats)
    quartiles = np.quantile(seconds, [0.25, 0.5, 0.75], axis=0).T
    append_rows(
        arguments.out,
        [
            case
            | {"method": name}
            | said
            | dict(zip(("low", "seconds", "high"), measured))
            | {"repeats": arguments.repeats}
            for (name, (_, said)), measured in zip(made.items(), quartiles)
        ],
    )
