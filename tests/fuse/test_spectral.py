"""The closed form: never worse than mean pooling on its own metric, its cost what it loses, its gauge balanced."""

import pytest
import torch

from dha_utils import HeadPlan, fuse
from dha_utils.fuse.spectral import fuse_keys, fuse_values
from dha_utils.measure.energies import as_planes, head_energies, key_and_query_planes, plane_coherence
from dha_utils.measure.moments import EVERY


def test_spectral_beats_mean_pooling_on_its_own_metric(mha, blocks):
    """The closed form is the optimum of its metric: no other shared head, the mean among them, can cost less."""
    for layer in head_energies(mha, blocks):
        for group in ((0, 1), (1, 3), (0, 1, 2, 3)):
            g, heads = len(group), list(group)
            lost, _ = layer.value_cost(group)
            rows = layer.rows(group)
            metric = torch.block_diag(*layer.value_metric[heads])
            residual = metric @ (torch.eye(g * 12) - torch.eye(12).repeat(g, g) / g).double()  # v_h − v̄
            assert 0 <= lost <= float((residual @ layer.value_energy[rows][:, rows] @ residual.T).trace()) * (1 + 1e-5)
            lost, _ = layer.key_cost(group)
            weight = layer.query_weight[heads].T.to(layer.key_energy.dtype)
            keys = layer.key_energy[:, heads][:, :, heads] / (weight[:, :, None] * weight[:, None])  # E[conj(k_h) k_h']
            residual = (torch.eye(g) - 1 / g).to(keys.dtype)  # k_h − k̄
            left = (residual @ keys @ residual).diagonal(dim1=1, dim2=2).real
            assert 0 <= lost <= float((left * weight.real**2).sum()) * (1 + 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("free", [True, False])
def test_the_energy_that_a_fusion_loses_is_what_it_was_said_to_cost(mha, blocks, free):
    """Measured token by token on the calibration text, from the fused weights, for keys and for values."""
    energies = head_energies(mha, blocks, free)
    mha.set_attn_implementation("eager")
    output = mha(blocks, output_attentions=True, output_hidden_states=True)
    hidden = plane_coherence(mha.model.rotary_emb, 32)
    for index, (layer, spectral) in enumerate(zip(mha.model.layers, energies)):
        attention, group = layer.self_attn, [0, 2, 3]
        x = layer.input_layernorm(output.hidden_states[index]).double()
        weights = output.attentions[index].double()[:, :, (x.shape[1] - 1) % EVERY :: EVERY]
        averaged = weights @ x[:, None]  # [blocks, heads, queries, hidden]: what the heads really average

        key, query, planes = fuse_keys(attention, spectral, group)
        shared = as_planes(key, 12)[0]
        own_keys, own_queries = key_and_query_planes(attention)
        ratio = as_planes(query, 12)[..., 0] / own_queries[group, 0][:, planes, 0]  # [g, d/2]: how queries were turned
        lost = 0.0
        for plane in range(6):
            for place, head in enumerate(group):
                left = own_keys[head, plane] - (ratio[place].conj()[:, None] * shared)[planes == plane].sum(0)
                error, mean = (states.to(left.dtype) @ left for states in (x, averaged))
                seen = (weights * error.abs().square()[:, None, None]).sum(-1).mean()
                covariance = seen - hidden[plane] * mean.abs().square().mean()
                lost += float(spectral.query_weight[head, plane] ** 2 * covariance)
        assert lost == pytest.approx(spectral.key_cost(group)[0], rel=1e-5)

        value, columns = fuse_values(attention, spectral, group)
        before = (
            attention.v_proj.weight.double().unflatten(0, (4, 12)),
            attention.o_proj.weight.double().unflatten(1, (4, 12)),
        )
        lost = 0.0
        for place, head in enumerate(group):
            left = before[1][:, head] @ before[0][head] - columns[:, place * 12 : place * 12 + 12] @ value
            lost += float((averaged @ left.T).square().sum(-1).mean())
        assert lost == pytest.approx(spectral.value_cost(group)[0], rel=1e-5)


def test_gauge_is_balanced(mha, blocks):
    fused = fuse(mha, HeadPlan.uniform(mha.config, 2, 1), blocks)
    attention = fused.model.layers[1].self_attn
    rows = attention.v_proj.weight.norm(dim=1)
    columns = attention.o_proj.weight.unflatten(1, (4, 12)).square().sum(0).mean(0).sqrt()
    assert torch.allclose(rows, columns, rtol=1e-3)
