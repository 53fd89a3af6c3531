"""Energies of heads: identical ones lose nothing."""

import torch

from dha_utils.measure.energies import as_planes, from_planes, head_energies


def test_identical_heads_cost_nothing(mha, blocks):
    for layer in mha.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data[12:24] = projection.weight.data[:12]
    for layer in head_energies(mha, blocks):
        for lost, total in (layer.key_cost((0, 1)), layer.value_cost((0, 1))):
            assert abs(lost) <= 1e-5 * total


def test_planes_round_trip():
    rows = torch.randn(3 * 8, 5)
    assert torch.equal(from_planes(as_planes(rows, 8)), rows)
    assert as_planes(rows, 8)[1, 2, 3] == torch.complex(rows[8 + 2, 3], rows[8 + 2 + 4, 3])
