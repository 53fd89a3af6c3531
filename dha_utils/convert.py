"""The whole conversion, one layer at a time, for a model of any size: a LLaMA checkpoint in, a DHA checkpoint out.

First walk (`plan_layers`): the heads of each layer are measured and grouped, every number of them is priced, and heads are
allocated. Second walk (`convert_layers`): each layer is fused, fitted to the source and written. Both keep their streams on
the disk from time to time: a conversion that was killed goes on from there, to the same bits.
"""

import copy
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from transformers import __version__

from .compare.card import model_card, model_name
from .fuse.layer import FusedLayer, dha_config, fuse_layer, fused_attention
from .fuse.model import check_plan
from .fuse.refit import refit_layer, round_weights
from .measure.energies import HeadEnergies
from .measure.moments import layer_moments
from .measure.perplexity import stream_losses
from .measure.stream import after_layer, attention_backend, each_block, first_stream
from .measure.walk import Walk
from .plan.allocate import fitted_and_measured, heads_for_increase, knapsack, target_heads
from .plan.head_plan import HeadPlan
from .plan.partition import plan_of_counts
from .plan.prices import MEASURED_TOKENS, PriceWalk, after_refit, head_grid
from .runs import expand, find, fingerprint, write_whole
from .sources.families import check_source
from .sources.output import check_disk, is_finished, put_in_place, work_folder, write_index, write_weights
from .sources.precision import as_dtype, dtype_name, served_dtype
from .sources.shards import open_checkpoint
from .sources.text import repeating

TEXTS = ("calibration", "validation")


def convert(
    source,
    blocks,
    out,
    budget=None,
    cache_bytes=None,
    max_increase=None,
    plan=None,
    dtype=None,
    device=None,
    *,
    tokenizer=None,
    validation=None,
    refit=True,
    seed=0,
    text="",
    replace=False,
):
    """The folder `out` of a DHA checkpoint made from `source`, with its tokenizer and a model card; no training.

    `source`: a name or path as of `load_checkpoint`, of which one layer at a time is read, or a LLaMA in memory (with its
    `tokenizer`). `blocks` [blocks, length]: calibration tokens. The target is one of `budget`, `cache_bytes` and
    `max_increase` (as of `plan_heads`), or a `plan`. `dtype`: of the weights written; None is the source's. `device`: None
    is CUDA or MPS if there is one. `validation` [blocks, length]: measured before and after, for the model card. `refit`:
    whether each layer is fitted to the source after its fusion. `text`: its name, for the model card. `replace`: whether
    another DHA checkpoint in `out` may be replaced, once the new one is whole.

    A conversion that was killed goes on where it was if it is started again. Raises ValueError if `out` holds anything
    else, the source cannot be read, the target cannot be met, or the disk is too small.
    """
    named = isinstance(source, str | Path)
    if named:
        model, own = open_checkpoint(source, device)
        tokenizer = tokenizer or own
    else:
        model = source
        if device is not None and torch.device(device).type != model.device.type:
            raise ValueError(f"a model in memory is converted where it is, on {model.device}: leave device out")
    check_source(model)
    dtype, out = as_dtype(dtype or served_dtype(model)), expand(out)
    target = {"budget": budget, "cache_bytes": cache_bytes, "max_increase": max_increase, "plan": plan and asdict(plan)}
    target = {name: value for name, value in target.items() if value is not None}
    check_request(model, blocks, plan, target)
    check_blocks(model, blocks, "calibration")
    if validation is not None:
        check_blocks(model, validation, "validation")
    request = target | {
        "source": model_name(str(source) if named else model.name_or_path),
        "source_content": model.shards.fingerprint() if named else fingerprint(model),
        "tokenizer": tokenizer and fingerprint(sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)),
        "text": Path(text).name if find(text).exists() else text,
        "text_content": fingerprint(blocks, validation),
        "calibration_tokens": blocks.numel(),
        "dtype": dtype_name(dtype),
        "refit": refit,
        "seed": seed,
        "device": model.device.type,
        "versions": f"dha-utils {version('dha-utils')}, torch {torch.__version__}, transformers {__version__}",
    }
    if is_finished(out, request, replace):
        return out
    work = work_folder(out, request, replace)
    if (work / "conversion.json").is_file():  # written last: only the name is missing
        return put_in_place(work, out)
    check_disk(work, model, dtype, model.config.hidden_size * largest_streams(model, blocks, validation))
    write_whole(work / "request.json", json.dumps(request))
    plan = plan or plan_layers(model, blocks, work, **target)
    record = convert_layers(model, blocks, plan, work, dtype, validation, refit, seed)
    finish(model, tokenizer, work, dtype, {"request": request, "plan": asdict(plan)} | record)
    return put_in_place(work, out)


def check_request(model, blocks, plan, target):
    """Raises ValueError for anything that can be known to be wrong before the first layer."""
    if len(target) != 1:
        raise ValueError(f"give one of budget, cache_bytes, max_increase and plan, not {' and '.join(target) or 'none'}")
    if len(blocks) < 4:
        raise ValueError(f"a conversion needs at least 4 calibration blocks, not {len(blocks)}")
    if plan:
        check_plan(plan, model)
    elif target.get("max_increase", 1) <= 0:
        raise ValueError(f"the largest acceptable increase is a share above 0, not {target['max_increase']}")
    elif "max_increase" not in target:
        target_heads(model, None, None, **target)


def check_blocks(model, blocks, name):
    """Raises ValueError unless `blocks` are tokens [blocks, length] of this model, within its context."""
    config = model.config
    if blocks.dim() != 2 or blocks.is_floating_point() or not blocks.numel():
        raise ValueError(
            f"the {name} blocks must be whole numbers [blocks, length], not {list(blocks.shape)} {blocks.dtype}"
        )
    if blocks.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"{name} blocks of {blocks.shape[1]} tokens exceed the context of {config.max_position_embeddings}"
        )
    if blocks.min() < 0 or blocks.max() >= config.vocab_size:
        raise ValueError(f"the {name} blocks have token {int(blocks.max())}, the model knows {config.vocab_size}")


def largest_streams(model, blocks, validation):
    """The most tokens whose states a walk keeps on the disk."""
    pricing = blocks.numel() + (1 + 2 * len(head_grid(model.config.num_key_value_heads))) * MEASURED_TOKENS
    return max(pricing, 2 * (blocks.numel() + (0 if validation is None else validation.numel())))


def plan_layers(model, blocks, work, budget=None, cache_bytes=None, max_increase=None):
    """The `HeadPlan` for one target, by the prices of each layer alone (`loss_increase`), as a refit leaves them."""
    if (work / "plan.json").is_file():
        return HeadPlan.load(work / "plan.json")
    blocks, held_out = (blocks, None) if max_increase is None else fitted_and_measured(blocks)
    pricing, walk = PriceWalk(model, blocks), Walk(work / "pricing.safetensors")
    pricing.streams = walk.streams or pricing.streams
    for index, layer in walk.bar(model, "pricing"):
        partitions, divergence = pricing.price(index, layer)
        walk.add([partitions, divergence.tolist()], pricing.streams)
    walk.save(pricing.streams)
    partitions, divergences = zip(*walk.rows)
    prices = after_refit(pricing.prices([torch.tensor(divergence) for divergence in divergences]))

    def counts(heads):
        return knapsack(prices, heads)

    if max_increase is None:
        heads = target_heads(model, None, None, budget, cache_bytes)
    else:
        heads = heads_for_increase(
            model, blocks, held_out, max_increase, counts, partitions=partitions, memory=work / "increases.json"
        )
    plan = plan_of_counts(partitions, counts(heads))
    plan.save(work / "plan.json")
    return plan


def convert_layers(model, blocks, plan, work, dtype, validation, refit, seed):
    """Writes every layer of the DHA model into `work`, a file each; returns the record of the conversion, by name."""
    walk, random = Walk(work / "converting.safetensors"), torch.Generator().manual_seed(seed)
    first = {name: first_stream(model, text) for name, text in zip(TEXTS, (blocks, validation)) if text is not None}
    starts = {"source": torch.float32, "fused": dtype}  # embeddings as they are, and as they are written
    streams = walk.streams or {
        f"{who} {name}": first[name][0].to(start).float() for who, start in starts.items() for name in first
    }
    random.set_state(streams.pop("random", random.get_state()))
    for index, layer in walk.bar(model, "converting"):
        rope, pair = first["calibration"][1], {f"{who} calibration": streams[f"{who} calibration"] for who in starts}
        fused = fused_layer(model, layer, plan, index, pair["source calibration"], rope)
        with attention_backend("sdpa", model):
            new, errors, carried = copy.deepcopy(layer).requires_grad_(True).eval(), {}, {}
            new.self_attn = fused_attention(model.config, fused)
            if refit:
                errors, *behind = refit_layer(layer, new, *pair.values(), rope, random, dtype)
                carried = dict(zip(pair, behind))
            else:
                round_weights(new, dtype)
            for name in streams.keys() - carried.keys():
                its_layer, its_rope = layer if name.startswith("source") else new, first[name.split()[1]][1]
                carried[name] = each_block(after_layer, its_layer, streams[name], its_rope)
        streams = carried
        weights = {f"model.layers.{index}.{name}": weight for name, weight in new.state_dict().items()}
        write_weights(work / file_of(model, index + 1), weights, dtype)
        layout = {name: getattr(fused, name) for name in ("key_head_map", "value_head_map", "key_frequencies")}
        walk.add({"layout": layout, "errors": errors}, streams | {"random": random.get_state()})
    record = {"layers": walk.rows, "length": blocks.shape[1], "repeating": int(repeating(blocks).sum())}
    if validation is not None:
        losses = {w: stream_losses(model, streams[f"{w} validation"], validation, kept) for w, kept in starts.items()}
        record["losses"] = {who: loss.mean(1).tolist() for who, loss in losses.items()}
        record["validation"] = list(validation.shape)
    walk.save(streams | {"random": random.get_state()})
    return record


def fused_layer(model, layer, plan, index, stream, rope_cos_sin):
    """The `FusedLayer` of the groups of one layer, by spectral fusion on the stream that enters it in the source."""
    with attention_backend("eager", model):
        moments, _ = layer_moments(layer, stream, rope_cos_sin)
    energies = HeadEnergies.measure(layer.self_attn, model.model.rotary_emb, moments)
    return fuse_layer(layer.self_attn, plan.key_groups[index], plan.value_groups[index], energies)


def file_of(model, place):
    """The name of a file of weights: place 0 holds all that is no layer, place 1 the first layer."""
    return f"model-{place + 1:05d}-of-{len(model.model.layers) + 1:05d}.safetensors"


def finish(model, tokenizer, work, dtype, record):
    """The rest of the checkpoint: embeddings and head, index, config, tokenizer, model card and record."""
    tied = model.config.tie_word_embeddings
    head = {key: weight for key, weight in model.state_dict().items() if ".layers." not in key}
    write_weights(work / file_of(model, 0), {k: w for k, w in head.items() if not (tied and k == "lm_head.weight")}, dtype)
    config = dha_config(model.config, [FusedLayer(**row["layout"], weights={}) for row in record["layers"]])
    config.dtype, config.architectures = dtype, ["DhaForCausalLM"]
    config.save_pretrained(work)
    model.generation_config.save_pretrained(work)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    write_index(work, [file_of(model, place) for place in range(len(record["layers"]) + 1)])
    write_whole(work / "README.md", model_card(model, config, record))
    for left in [work / "plan.json", work / "increases.json", *work.glob("*ing.safetensors"), *work.glob(".*.partial")]:
        left.unlink(missing_ok=True)
    write_whole(work / "conversion.json", json.dumps(record))  # last: from here on it is whole
    (work / "request.json").unlink()


def conversion_errors(folder):
    """The table of errors of a conversion with refit, one row per layer and stage, as `refit` returns it."""
    layers = json.loads((Path(folder) / "conversion.json").read_text())["layers"]
    rows = {(index, stage): error for index, layer in enumerate(layers) for stage, error in layer["errors"].items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["layer", "stage"])
