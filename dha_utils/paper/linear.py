"""The paper's fusion: learn how each query head mixes its key and value head from those of its group (DHA §4.2).

    k_h = Σ_j ω_hj ⊙ k_j,   v_h = Σ_j ω'_hj ⊙ v_j,   j over the source's heads in the group of h

ω starts at the identity, so the model is unchanged. While it trains, a growing price on L_fusion draws the rows of ω
within a group together; once they agree, all query heads of the group use one head, and that head is built.
"""

import copy
import logging

import torch
from torch import nn
from transformers import TrainerCallback

from ..fuse.layer import FusedLayer, head_map, own_norms, query_heads, weights_by_name
from ..fuse.model import assemble, check_plan
from ..measure.moments import with_bias
from ..measure.perplexity import perplexity
from ..recover.training import train
from ..sources.families import check_source
from ..sources.precision import cast_weights, served_dtype

HINGES = ("sum", "term")


log = logging.getLogger(__name__)


class MixedHeads(nn.Module):
    """k_proj (or v_proj) followed by ω [heads, key-value heads, d, or 1 if not `per_dimension`]: a head per query head.

    Mixing the outputs of k_proj is mixing its weights. It happens before RoPE: there any ω collapses exactly; after it,
    the two dimensions of a plane would have to share a value, or the mixed key would not turn as one.
    """

    def __init__(self, projection, heads, head_dim, per_dimension=True):
        super().__init__()
        self.projection, self.head_dim = projection, head_dim
        sources = projection.out_features // head_dim
        own = torch.eye(sources).repeat_interleave(heads // sources, 0).to(projection.weight)
        self.omega = nn.Parameter(own[..., None].repeat(1, 1, head_dim if per_dimension else 1))
        self.register_buffer(
            "allowed_sources", torch.ones_like(own)[..., None], persistent=False
        )  # which j a query head may mix

    def forward(self, hidden_states):
        heads = self.projection(hidden_states).unflatten(-1, (-1, self.head_dim))
        omega = (self.omega * self.allowed_sources).expand(-1, -1, self.head_dim)
        return torch.einsum("hjd,...jd->...hd", omega, heads).flatten(-2)


def with_omega(model, plan=None, per_dimension=True):
    """A float32 copy of a LLaMA `model` with ω at the identity: the same logits. Without a `plan`, every head may mix all.

    Raises ValueError as `check_source` does.
    """
    check_source(model)
    dtype, model = served_dtype(model), cast_weights(copy.deepcopy(model), torch.float32).requires_grad_(True)
    model.checkpoint_dtype = dtype
    config = model.config
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        groups = (None, None) if plan is None else (plan.key_groups[index], plan.value_groups[index])
        for name, its_groups in zip(("k_proj", "v_proj"), groups):
            mixed = MixedHeads(getattr(attention, name), config.num_attention_heads, attention.head_dim, per_dimension)
            if its_groups is not None:
                owner = torch.tensor(head_map(its_groups, attention.num_key_value_groups))
                mixed.allowed_sources[:] = (owner[:, None] == owner[:: attention.num_key_value_groups])[..., None]
            setattr(attention, name, mixed)
        attention.num_key_value_groups = 1  # each query head has its own now
    return model


def omegas(model):
    """The ω of each layer of a `with_omega` model: [(key ω, value ω)], each [heads, key-value heads, d or 1]."""
    return [(layer.self_attn.k_proj.omega, layer.self_attn.v_proj.omega) for layer in model.model.layers]


def fusion_terms(model, plan):
    """L_fusion of each group (Eq. 6-7), [groups of all layers]: (1/g) Σ_{h<h'} Σ_j ‖ω_hj − ω_h'j‖², mean over d.

    g is the number of query heads in the group. Computed as Σ_h Σ_j ‖ω_hj − mean_h ω_hj‖², which is the same.
    """
    terms = []
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, pair in enumerate(omegas(model)):
        for omega, groups in zip(pair, (plan.key_groups[layer], plan.value_groups[layer])):
            for group in groups:
                rows = omega[query_heads(group, queries)]
                terms.append((rows - rows.mean(0)).square().mean(-1).sum())
    return torch.stack(terms)


@torch.no_grad()
def collapse(model, plan):
    """The `DhaForCausalLM` of a `with_omega` model: each group's ω averaged over its query heads, and its heads built.

    The same logits if the rows of ω agree within every group of `plan`.
    """
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    fused_layers = []
    for layer, key_groups, value_groups in zip(model.model.layers, plan.key_groups, plan.value_groups):
        attention = layer.self_attn
        rows = {"q_proj": with_bias(attention.q_proj)}
        for name, groups in (("k_proj", key_groups), ("v_proj", value_groups)):
            mixed = getattr(attention, name)
            heads = with_bias(mixed.projection).unflatten(0, (-1, attention.head_dim))  # [j, d, n]
            omega = mixed.omega * mixed.allowed_sources
            means = torch.stack([omega[query_heads(group, queries)].mean(0) for group in groups])
            rows[name] = (means[..., None] * heads).sum(1).flatten(0, 1)
        maps = [head_map(groups, queries) for groups in (key_groups, value_groups)]
        standard = [list(range(attention.head_dim // 2))] * len(key_groups)
        weights = weights_by_name(attention, rows, attention.o_proj.weight) | own_norms(attention, len(key_groups))
        fused_layers.append(FusedLayer(*maps, standard, weights))
    return assemble(model, fused_layers)


def learn_fusion(
    model,
    plan,
    blocks,
    tokens,
    per_dimension=True,
    hinge="sum",
    base=1.0,
    warm_up=0.4,
    tolerance=1e-3,
    learning_rate=1e-4,
    omega_learning_rate=1e-2,
    multiplier_learning_rate=1.0,
    tokens_per_step=2048,
    seed=0,
    validation=None,
    evaluations=10,
    output_dir="runs/linear",
):
    """The DHA model of `plan`, its heads fused by learning on at most `tokens` tokens of `blocks` (DHA §4.2, Eq. 8).

    max_λ min_{θ,ω} L_lm + λ · max(L_fusion − t, 0), over all weights θ and ω; stops at L_fusion < `tolerance`. Left open
    by the paper: the target t = L_0 · base^s · (1 − s/k) starts at L_0, L_fusion at the identity (72 for 8 heads
    in groups of 4 and 6 layers: a target that starts at 1 would be a jump), with k the share `warm_up` of the steps;
    `base` 1 makes it a line. k leaves time for the last part to close: of 195 steps on a model of 5.8 M weights at
    25 %, a share of 0.6 ends at 0.0017, one of 0.4 is below 0.001 after 134. `hinge`: "sum", the maximum of the sum,
    as Eq. 8 is printed; "term", each group held to its own target. `per_dimension=False`: one ω for a head and a
    source head instead of one a dimension. λ starts at 0 and ascends by AdamW. The paper's rates for θ and ω, cosine
    to a tenth; its 1e-2 for λ lets L_fusion stall (0.07 after 400 steps on the same model: the rest falls with the
    square of λ), so λ is a hundred times faster.

    `output_dir` gets `log.csv` (with fusion_loss, target, multiplier λ, collapsed_perplexity) and checkpoints; the same
    call resumes. Raises ValueError as `train` does, or if the plan is for another model or the hinge unknown.
    """
    check_plan(plan, model)
    if hinge not in HINGES:
        raise ValueError(f"there is no hinge {hinge!r}: choose one of {', '.join(HINGES)}")
    mixed = with_omega(model, plan, per_dimension)
    mixed.multiplier = nn.Parameter(torch.zeros((), device=model.device))
    with torch.no_grad():
        start = fusion_terms(mixed, plan)
    steps = tokens // tokens_per_step

    def target(step):
        return base**step * max(0.0, 1 - step / (warm_up * steps)) * start

    def figures(terms, step):
        values = {"fusion_loss": terms.sum(), "target": target(step).sum(), "multiplier": mixed.multiplier}
        return {name: value.item() for name, value in values.items()}

    def loss(model, input_ids, step):
        terms = fusion_terms(model, plan)
        excess = terms - target(step)
        violation = excess.clamp(min=0).sum() if hinge == "term" else excess.sum().clamp(min=0)
        lm = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return lm + model.multiplier * violation, figures(terms, step)

    train(
        mixed,
        blocks,
        tokens,
        loss,
        omega_optimizer(mixed, learning_rate, omega_learning_rate, multiplier_learning_rate),
        [_StopWhenFused(plan, tolerance, validation, figures)],
        tokens_per_step,
        seed,
        validation,
        evaluations,
        output_dir,
        settings=[plan.key_groups, plan.value_groups, hinge, base, warm_up, tolerance],
        **paper_schedule(learning_rate),
    )
    left = fusion_terms(mixed, plan).sum().item()
    if left >= tolerance:
        log.warning(
            "L_fusion is still %.2g, not below %g: averaging ω will move the model, give more tokens", left, tolerance
        )
    return cast_weights(collapse(mixed, plan), model.dtype)


def omega_optimizer(model, learning_rate, omega_learning_rate, multiplier_learning_rate=0.0):
    """AdamW: the weights θ and ω descend, each at its rate, the multiplier λ ascends."""
    parameters = dict(model.named_parameters())
    multiplier = [parameters.pop(name) for name in list(parameters) if name == "multiplier"]
    omega = [parameters.pop(name) for name in list(parameters) if name.endswith(".omega")]
    groups = [
        {"params": list(parameters.values()), "lr": learning_rate},
        {"params": omega, "lr": omega_learning_rate},
        # quick to forget the large violations of the start, or the small ones of the end would not raise it any more
        {"params": multiplier, "lr": multiplier_learning_rate, "maximize": True, "betas": (0.9, 0.9)},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def paper_schedule(learning_rate):
    """`TrainingArguments` of the paper's search and fusion: cosine to a tenth; no clipping, λ's slope would rule it."""
    return {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "max_grad_norm": 0.0,
    }


class _StopWhenFused(TrainerCallback):
    def __init__(self, plan, tolerance, validation, figures):
        self.plan, self.tolerance, self.validation, self.figures = plan, tolerance, validation, figures

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            terms = fusion_terms(model, self.plan)
        fused = terms.sum() < self.tolerance
        if fused or state.global_step == state.max_steps:
            state.log_history.append({"step": state.global_step, **self.figures(terms, state.global_step)})
        if fused:
            control.should_training_stop = control.should_log = True
            control.should_evaluate = self.validation is not None

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            figures = self.figures(fusion_terms(model, self.plan), state.global_step)
        collapsed = perplexity(collapse(model, self.plan), self.validation)
        state.log_history.append({"step": state.global_step, **figures, "collapsed_perplexity": collapsed})
