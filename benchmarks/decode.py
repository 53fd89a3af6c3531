"""The seconds of decoding: source, GQA and DHA, and a low-rank cache of the same size, over contexts and batches.

    python benchmarks/decode.py                                     # a CPU, float32; 20 minutes on two cores
    python benchmarks/decode.py --part attention --shape SmolLM2-135M --budgets 0.5 --threads 1 --repeats 200 \
        --cases 1x512 1x1024 1x2048 1x4096                          # of the study beyond_the_paper
    python benchmarks/decode.py --part generate --shape Llama-3.2-1B --layers 4 --dtype bfloat16 --cases 8x4096
    python benchmarks/decode.py --device cuda --dtype bfloat16 --part throughput --shape LLaMA-2-7B --budgets 0.25 \
        --memory-gib 60 --context 8192

Four parts. *attention*: the attention of one layer from one new token to the cache, projections left out; source and GQA
by transformers' SDPA. *low_rank*: the same of the source and of a low-rank cache, which is so much slower that it would
leave nothing of the others in the processor's caches. *generate*: tokens of `generate` on a whole model over a
`DynamicCache`. *throughput*: the same with the largest batch of which weights and cache fit into --memory-gib, beside the
source with its own, and the peak memory of a process that does nothing else (a GPU needs three times that memory). Weights,
cache and tokens are random: their values do not matter here, and the length of what is generated is fixed. All of a case
are timed in turn in one process; cases that the CSV has are not timed again.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
from low_rank import LowRankAttention
from speed import add_arguments, listed, low_rank_versions, measure, shape_config, versions
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dha_utils.compare.cost import cache_bytes, cached_numbers
from dha_utils.compare.decoding import generate_step, random_cache
from dha_utils.model.dha import DhaAttention
from dha_utils.runs import peak_gib

PARTS = ("attention", "low_rank", "generate", "throughput")


def size(text):
    """(batch, context) of "8x4096"."""
    batch, context = map(int, text.split("x"))
    return batch, context


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "decode")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shape", help="default: LLaMA-2-7B and Llama-3-8B for a layer, SmolLM2-135M for a whole model")
    parser.add_argument("--layers", type=int, help="of a whole model, if not all")
    parser.add_argument("--budgets", type=float, nargs="+", help="default: 0.5 and 0.25; of SmolLM2-135M 0.5 and 1/3")
    parser.add_argument("--cases", type=size, nargs="+", help="BATCHxCONTEXT, 8x4096")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096, help="of throughput")
    parser.add_argument("--memory-gib", type=float, default=2.0, help="of throughput")
    return parser.parse_args()


def step_bytes(model, cache):
    """{column: bytes} that a step over a cache reads, and those of the keys that it has to rebuild."""
    config, keys = model.config, cache.layers[0].keys
    rebuilt = 0
    if isinstance(model.model.layers[0].self_attn, LowRankAttention):
        width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        rebuilt = len(keys) * keys.shape[2] * width * model.dtype.itemsize
    return {"cache_bytes": cached_numbers(cache) * model.dtype.itemsize, "rebuilt_bytes": rebuilt}


def attention_step(model, batch, context):
    """(the attention of the first layer from one token to `context` cached ones, {column: value})."""
    attention, cache = model.model.layers[0].self_attn, random_cache(model, batch, context)
    heads, d = model.config.num_attention_heads, model.config.head_dim
    query = torch.randn(batch, heads, 1, d).to(model.lm_head.weight)
    key, value = cache.layers[0].keys, cache.layers[0].values
    said = step_bytes(model, cache) | {"weight_bytes": 0}
    if isinstance(attention, DhaAttention):
        return partial(attention._decode, query, key, value, None), said
    if isinstance(attention, LowRankAttention):  # its products are part of attending
        said["weight_bytes"] = sum(up.weight.numel() * up.weight.itemsize for up in (attention.key_up, attention.value_up))
        return partial(attention.decode, query, key[:, 0]), said
    attend = partial(sdpa_attention_forward, attention, query, key, value, None, scaling=attention.scaling, is_causal=False)
    return attend, said


def whole_step(model, batch, context, new_tokens):
    """(`generate` of `new_tokens` over a cache of `context`, {column: value})."""
    cache = random_cache(model, batch, context)
    said = step_bytes(model, cache) | {"weight_bytes": weight_bytes(model), "batch": batch}
    return generate_step(model, cache, new_tokens), said


def weight_bytes(model):
    """Bytes of the weights that a step reads: all but the embeddings, of which it reads a row."""
    return sum(w.numel() * w.element_size() for w in {*model.model.layers.parameters(), model.lm_head.weight})


def attention_case(arguments, part, shape, budgets, batch, context):
    small = {"num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 32}
    made = low_rank_versions if part == "low_rank" else versions
    models = made(shape_config(shape, **small), budgets, arguments.device, arguments.dtype)
    return {name: attention_step(make(), batch, context) for name, make in models.items()}


def whole_models(arguments, shape, budgets):
    layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    return versions(shape_config(shape, **layers), budgets, arguments.device, arguments.dtype)


def generate_case(arguments, shape, budgets, batch, context):
    models = whole_models(arguments, shape, budgets)
    return {name: whole_step(make(), batch, context, arguments.new_tokens) for name, make in models.items()}


def throughput_case(arguments, shape, rival, context):
    """The source and one (method, budget), each with its own largest batch; empty if not even one sequence of each fits."""
    made, steps = whole_models(arguments, shape, [rival[1]]), {}
    for name in (("source", 1.0), rival):
        model = made[name]()
        resident = sum(w.numel() * w.element_size() for w in model.parameters())
        batch = int((arguments.memory_gib * 2**30 - resident) // (cache_bytes(model, 1) * context))
        if batch < 1:
            return {}
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            peak = alone.submit(decoding_peak, arguments, shape, name, batch, context).result()
        step, said = whole_step(model, batch, context, arguments.new_tokens)
        steps[name] = step, said | {"peak_gib": peak}
    return steps


def decoding_peak(arguments, shape, name, batch, context):
    """GiB that decoding takes at most, if this process does nothing else."""
    torch.set_num_threads(arguments.threads)
    model = whole_models(arguments, shape, [name[1]])[name]()
    with torch.no_grad():
        whole_step(model, batch, context, arguments.new_tokens)[0]()
    return peak_gib()


def default_budgets(shape):
    return [0.5, 1 / 3] if shape == "SmolLM2-135M" else [0.5, 0.25]


def main():
    arguments = parse_arguments()
    whole = arguments.shape or "SmolLM2-135M"
    budgets = arguments.budgets or default_budgets(whole)
    generated = {"shape": whole, "layers": arguments.layers or shape_config(whole).num_hidden_layers}
    generated |= {"new_tokens": arguments.new_tokens}
    for part in [name for name in ("attention", "low_rank") if name in arguments.part]:
        shapes = [arguments.shape] if arguments.shape else ["LLaMA-2-7B", "Llama-3-8B"]
        sizes = arguments.cases or [(1, 512), (1, 4096), (1, 16384), (8, 512), (8, 4096), (32, 1024)]
        for shape, (batch, context) in product(shapes, sizes):
            tried = arguments.budgets or default_budgets(shape)
            case = {"part": part, "shape": shape, "layers": 1, "budgets": listed(tried)}
            case |= {"batch": batch, "context": context}
            measure(arguments, case, partial(attention_case, arguments, part, shape, tried, batch, context))
    if "generate" in arguments.part:
        for batch, context in arguments.cases or [(1, 512), (1, 4096), (8, 4096)]:
            case = {"part": "generate", "budgets": listed(budgets), "batch": batch, "context": context} | generated
            measure(arguments, case, partial(generate_case, arguments, whole, budgets, batch, context))
    if "throughput" in arguments.part:
        for rival in list(whole_models(arguments, whole, budgets))[1:]:
            case = {"part": "throughput", "context": arguments.context, "memory_gib": arguments.memory_gib} | generated
            case |= {"rival": rival[0], "budgets": listed(rival[1:])}
            measure(arguments, case, partial(throughput_case, arguments, whole, rival, arguments.context))


if __name__ == "__main__":
    main()
