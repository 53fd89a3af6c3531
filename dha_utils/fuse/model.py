"""From a `HeadPlan` to a DHA model without training: the shared heads of each group, by mean pooling or spectral fusion.

The paper's learned linear fusion (DHA §4.2), which trains, is `paper/linear.py`.
"""

import copy
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ..measure.energies import head_energies
from ..plan.head_plan import HeadPlan
from ..sources.families import check_source
from ..sources.precision import served_dtype
from .layer import dha_config, fuse_layer

METHODS = ("mean", "spectral")


def fuse(model, plan, blocks=None, method="spectral", free_frequencies=True, energies=None):
    """The DHA model of `plan`, made from a LLaMA `model` (multi-head or grouped-query) without any training.

    `method="mean"`: weights averaged over each group, as in GQA (Ainslie et al. 2023, §2.1). `method="spectral"`: the
    closed form of `fuse/spectral.py`, from `blocks` of calibration tokens [blocks, length], or from their
    `energies` (`head_energies`). `free_frequencies=False` keeps the standard RoPE planes.

    Raises ValueError if the method is unknown, its calibration is missing, the plan is of another shape, or the model is
    a DHA model already.
    """
    check_method(method)
    check_plan(plan, model)
    if method == "spectral" and energies is None:
        energies = head_energies(model, blocks, free_frequencies)
    fused_layers = [
        fuse_layer(layer.self_attn, plan.key_groups[i], plan.value_groups[i], energies[i] if energies else None)
        for i, layer in enumerate(model.model.layers)
    ]
    return assemble(model, fused_layers)


def assemble(model, fused_layers):
    """The DHA model with the attention of `fused_layers`, one `FusedLayer` per layer, and all else from `model`."""
    # Made as from_pretrained makes it: .to(dtype) would round RoPE's frequencies, a GPU would compute others
    fused = AutoModelForCausalLM.from_config(dha_config(model.config, fused_layers), dtype=model.dtype).to(model.device)
    weights, own = model.state_dict(), fused.state_dict()
    weights = {name: weight for name, weight in weights.items() if name in own and ".self_attn." not in name}
    for i, layer in enumerate(fused_layers):
        weights |= {f"model.layers.{i}.self_attn.{name}": weight for name, weight in layer.weights.items()}
    fused.load_state_dict(weights)
    fused.generation_config = copy.deepcopy(model.generation_config)
    fused.checkpoint_dtype = served_dtype(model)
    return fused.eval()


def check_method(method):
    if method not in METHODS:
        raise ValueError(
            f"there is no fusion method {method!r} without training: choose one of {', '.join(METHODS)}; the paper's "
            "linear fusion is dha_utils.paper.linear.learn_fusion"
        )


def check_plan(plan, model):
    check_source(model)
    config = model.config
    shape = (len(plan.key_groups), plan.source_heads)
    if shape != (config.num_hidden_layers, config.num_key_value_heads):
        raise ValueError(
            f"the plan is for {shape[0]} layers of {shape[1]} key-value heads, the model has "
            f"{config.num_hidden_layers} of {config.num_key_value_heads}: make a plan for this model"
        )


@torch.no_grad()
def to_llama(model):
    """The plain grouped-query `LlamaForCausalLM` with the outputs of a DHA `model`, for tools that know no DHA.

    Its query heads stand in another order, those of a group side by side.

    Raises ValueError unless every layer has the same number of key heads, as many value heads, both shared by the same
    query heads, in groups of one size, and standard RoPE planes: as from `fuse(model, HeadPlan.uniform(config, n, n),
    free_frequencies=False)`.
    """
    if model.config.model_type != "dha":
        raise ValueError(f"this is a {model.config.model_type!r} model: to_llama takes a DHA model")
    config, d = model.config, model.config.head_dim
    maps, kept = list(zip(config.key_head_map, config.value_head_map)), config.num_key_value_heads
    pairs = [Counter(zip(keys, values)) for keys, values in maps]  # (key head, value head): how many query heads
    plain = all(len(pair) == kept and len(set(pair.values())) == 1 for pair in pairs)
    if set(sum(config.head_counts(), ())) != {kept} or not plain or config.key_frequencies or config.query_key_norm:
        raise ValueError(
            "a plain LLaMA cannot hold this model: it has one number of key and value heads in all layers, shared by the "
            "same query heads in groups of one size, with standard RoPE planes; fuse with HeadPlan.uniform(config, n, n), "
            f"where n divides {config.source_num_key_value_heads}, and free_frequencies=False"
        )
    own = ("model_type", "architectures", "key_head_map", "value_head_map", "key_frequencies", "source_num_key_value_heads")
    settings = {name: value for name, value in config.to_dict().items() if name not in own}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=model.dtype).to(model.device)
    weights = model.state_dict()
    for index, (keys, values) in enumerate(maps):
        queries = sorted(range(len(keys)), key=keys.__getitem__)
        order = {"q_proj": queries, "v_proj": [values[keys.index(key)] for key in range(kept)]}
        for name in weights:
            layer, projection = f"layers.{index}.self_attn.", name.split(".")[-2]
            if layer in name and projection in order:
                weights[name] = weights[name].unflatten(0, (-1, d))[order[projection]].flatten(0, 1)
            elif layer in name and name.endswith("o_proj.weight"):
                weights[name] = weights[name].unflatten(1, (-1, d))[:, queries].flatten(1)
    llama.load_state_dict(weights)
    llama.generation_config = copy.deepcopy(model.generation_config)
    llama.checkpoint_dtype = served_dtype(model)
    return llama.eval()


def grouped_query(model, blocks):
    """The LLaMA `model` itself if it shares heads; else a grouped-query LLaMA made by fusing its neighbours, two by two.

    The fusion is spectral with the standard RoPE planes, so that a plain `LlamaForCausalLM` can hold the result.
    """
    config = model.config
    if config.num_key_value_heads < config.num_attention_heads:
        return model
    kept = next(n for n in range(config.num_key_value_heads // 2, 0, -1) if config.num_key_value_heads % n == 0)
    return to_llama(fuse(model, HeadPlan.uniform(config, kept, kept), blocks, free_frequencies=False))
