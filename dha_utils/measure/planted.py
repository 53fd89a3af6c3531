"""The exact freedoms of attention, and a checkpoint whose redundancy is known because it was planted.

Values: v_h → R v_h, o_proj_h → o_proj_h R⁻¹ for any invertible R. Keys: in every RoPE plane, read as a complex number,
k_p → c k_p and q_p → q_p / conj(c) for any c ≠ 0; c = ±1 where keys are normalised (Qwen3). Neither changes the outputs
of the model.
"""

import copy

import torch
from transformers import AutoModelForCausalLM

from ..model.dha import turned
from ..sources.families import check_source
from ..sources.precision import served_dtype
from .energies import as_planes, from_planes
from .moments import set_rows, with_bias


@torch.no_grad()
def apply_freedoms(model, seed=0):
    """A copy of a LLaMA `model` with the same logits, every key and value head turned by freedoms drawn from `seed`.

    The complex scalars have modulus 0.5 to 1.5, the R singular values 0.5 to 1.5. They are drawn on the CPU, the same for
    every device.

    Raises ValueError as `check_source` does.
    """
    check_source(model)
    model, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention, d = layer.self_attn, layer.self_attn.head_dim
        key = as_planes(with_bias(attention.k_proj).float(), d)
        modulus, angle = (torch.rand(key.shape[:2], generator=random) for _ in range(2))
        scalar = torch.polar(modulus + 0.5, angle * 2 * torch.pi).to(key.device)
        if hasattr(attention, "k_norm"):  # the norms leave only the sign free
            scalar = scalar.real.sign().to(scalar.dtype)
        query = as_planes(with_bias(attention.q_proj).float(), d).unflatten(0, (len(key), -1))
        set_rows(attention.k_proj, from_planes(key * scalar[..., None]))
        set_rows(attention.q_proj, from_planes((query / scalar.conj()[:, None, :, None]).flatten(0, 1)))

        turn = torch.stack([_well_conditioned(d, random) for _ in range(len(key))]).to(key.device)  # R of each value head
        value = with_bias(attention.v_proj).float().unflatten(0, (-1, d))
        output = attention.o_proj.weight.float().unflatten(1, (len(key), -1, d))  # [hidden, heads, queries, d]
        set_rows(attention.v_proj, (turn @ value).flatten(0, 1))
        attention.o_proj.weight.copy_((output @ torch.linalg.inv(turn)[None]).flatten(1))
    return model


def plant_redundancy(model, seed=0):
    """A multi-head LLaMA with the logits of a grouped-query `model`, whose heads look unrelated but are copies.

    Each key-value head is copied to its query heads, then every copy is turned by random freedoms. The groups to find
    are the runs of `num_attention_heads / num_key_value_heads` neighbours.

    Raises ValueError if the model has no shared heads to copy.
    """
    attention = model.model.layers[0].self_attn
    copies = attention.num_key_value_groups
    if copies == 1:
        raise ValueError("planting needs a grouped-query model (num_key_value_heads < num_attention_heads)")
    config = type(model.config)(**model.config.to_dict() | {"num_key_value_heads": model.config.num_attention_heads})
    weights = model.state_dict()
    for name, weight in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            weights[name] = weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(copies, 0).flatten(0, 1)
    planted = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)
    planted.load_state_dict(weights)
    planted.checkpoint_dtype = served_dtype(model)
    return apply_freedoms(planted.eval(), seed)


def _well_conditioned(size, random):
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=random)).Q for _ in range(2))
    return left * (torch.rand(size, generator=random) + 0.5) @ right


def enough_blocks(model, blocks):
    """The first of `blocks` [blocks, length]: over four times as many tokens as dimensions, where an identity is tested."""
    return blocks[: 1 + 4 * model.config.hidden_size // blocks.shape[1]]


@torch.no_grad()
def rope_score(model, query, key, query_position, key_position, omega=1.0):
    """q · k (both [d]) after RoPE at their positions; `omega` [d] weighs the key after RoPE, as nobody should."""

    def placed(x, position):
        cos, sin = model.model.rotary_emb(x[None, None], torch.tensor([[position]], device=x.device))
        return turned(x, cos, sin).flatten()

    return float(placed(query, query_position) @ (omega * placed(key, key_position)))
