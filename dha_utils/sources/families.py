"""The model families whose attention is LLaMA's, and how each becomes an exact `LlamaForCausalLM` on loading."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from .precision import restore_frequencies

SUPPORTED = "LLaMA 1 to 3, Mistral, Qwen2, Qwen2.5 and Qwen3, with attention over the whole context"
AS_LLAMA = ("mistral", "qwen2")  # the same computation, and the same names of weights
NORMED = ("qwen3",)  # a LLaMA whose queries and keys are normalised: `fuse/normed.py` says what that changes
# of these families, beyond the settings that a LLaMA has
NOT_LLAMAS = ("model_type", "architectures", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def llama_config(config, name):
    """The `LlamaConfig` of a supported `config`; that of a LLaMA, DHA or Qwen3 model itself. `name`: of the checkpoint.

    Raises ValueError if the family, or a feature of it, is not supported.
    """
    if config.model_type not in ("llama", "dha", *AS_LLAMA, *NORMED):
        raise ValueError(f"{name!r} is a {config.model_type!r} model: supported are {SUPPORTED}")
    if has_window(config):
        raise ValueError(f"{name!r} attends through a sliding window: supported are {SUPPORTED}")
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{name!r} turns only a part of each head by RoPE: supported are {SUPPORTED}")
    if config.model_type not in AS_LLAMA:
        return config
    settings = {key: value for key, value in config.to_dict().items() if key not in NOT_LLAMAS}
    llama = LlamaConfig(
        **settings | {"attention_bias": config.model_type == "qwen2", "source_model_type": config.model_type}
    )
    llama._commit_hash = getattr(config, "_commit_hash", None)
    return llama


def has_window(config):
    """Whether some tokens of the context are out of sight of others."""
    if config.model_type == "mistral":
        return (config.sliding_window or config.max_position_embeddings) < config.max_position_embeddings
    return bool(getattr(config, "use_sliding_window", False)) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    )


def without_weights(config, name):
    """Whether a weight of the LLaMA with this `config` stands for nothing in its family: Qwen2's o_proj has no bias."""
    return getattr(config, "source_model_type", None) == "qwen2" and name.endswith("o_proj.bias")


def check_source(model):
    """Raises ValueError unless `model` is a plain LLaMA or Qwen3, with its own heads and weights that can be multiplied."""
    if model.config.model_type == "dha":
        raise ValueError("this is a 'dha' model already: give the LLaMA checkpoint that it was made from")
    layers = model.model.layers if isinstance(model, LlamaForCausalLM | Qwen3ForCausalLM) else []
    projections = [getattr(layer.self_attn, name) for layer in layers for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    odd = {type(part).__name__ for part in projections or [model] if type(part) is not nn.Linear}
    odd |= {type(part).__name__ for part in model.modules() if type(part).__module__.split(".")[0] == "peft"}
    if odd:
        raise ValueError(
            f"this model is made of {', '.join(sorted(odd))}: give a plain LlamaForCausalLM (load_checkpoint makes one of "
            "Mistral and Qwen2) or Qwen3ForCausalLM, adapters merged (merge_and_unload), weights not quantised"
        )
    restore_frequencies(model)
