"""Behaviour beside the source: identities first, then what a known change must show."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from dha_utils import HeadPlan, fuse
from dha_utils.compare.drift import (
    by_document,
    calibration_error,
    document_blocks,
    head_shares,
    repeated_share,
    summary,
    token_drift,
    written,
)


def test_a_model_agrees_with_itself(gqa, blocks):
    tokens = token_drift(gqa, gqa, blocks)
    assert len(tokens) == blocks[:, 1:].numel()
    assert tokens["kl"].abs().max() == 0 and tokens["agree"].all()
    assert (tokens["loss"] == tokens["source_loss"]).all()


@torch.no_grad()
def test_drift_is_that_of_the_logits(mha, fused, blocks):
    tokens = token_drift(mha, fused, blocks)
    expected, given = (model(blocks).logits[:, :-1] for model in (mha, fused))
    p, q = expected.log_softmax(-1), given.log_softmax(-1)
    assert np.allclose(tokens["kl"], (p.exp() * (p - q)).sum(-1).flatten(), atol=1e-5)
    assert (tokens["agree"] == (p.argmax(-1) == q.argmax(-1)).flatten().numpy()).all()
    loss = cross_entropy(given.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
    assert np.allclose(tokens["loss"], loss, atol=1e-4)
    assert np.allclose(tokens["confidence"], given.softmax(-1).max(-1).values.flatten(), atol=1e-5)
    assert 0 < tokens["agree"].mean() < 1


def test_documents_count_alike_however_long():
    tokens = pd.DataFrame({"block": [0, 1, 1, 2], "position": 1, "loss": [1.0, 2, 4, 5], "source_loss": [1.0, 1, 1, 1]})
    table = by_document(tokens, np.array([0, 0, 1]))
    assert table["increase"].round(6).tolist() == [round(7 / 3 - 1, 6), 4]
    assert summary(table).loc["increase", "mean"] == pytest.approx((4 / 3 + 4) / 2)


class Letters:
    eos_token_id = None

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_blocks_know_their_documents():
    texts = ["a" * 9, "b" * 3, "c" * 100, "d" * 9]
    blocks, documents = document_blocks(Letters(), texts, 4, limit=9)
    read = ["".join(chr(token) for token in block) for block in blocks]
    assert sorted(read) == ["aaaa"] * 2 + ["cccc"] * 4 + ["dddd"] * 2
    assert len({(name, int(number)) for name, number in zip(read, documents)}) == 3, "each has a number of its own"
    assert len(set(document_blocks(Letters(), texts, 4, limit=2)[1])) == 2
    with pytest.raises(ValueError, match="1 of the documents have 50 tokens"):
        document_blocks(Letters(), texts, 50, limit=9)


def test_calibration_error_of_known_cases():
    assert calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)
    assert calibration_error([1.0] * 4, [1, 1, 0, 0]) == pytest.approx(0.5)
    assert calibration_error([0.9] * 2 + [0.2] * 2, [1, 1, 0, 0]) == pytest.approx(0.15)


def test_a_head_that_writes_nothing_has_no_share(mha, blocks):
    whole = head_shares(mha, blocks)
    assert whole.shape == (3, 4) and np.allclose(whole.sum(1), 1) and (whole > 0.01).all()
    with torch.no_grad():
        mha.model.layers[1].self_attn.o_proj.weight.unflatten(1, (4, -1))[:, 2] = 0
    changed = head_shares(mha, blocks)
    assert changed[1, 2] == 0 and np.allclose(changed[0], whole[0], atol=1e-6)


def test_an_identity_keeps_the_shares_of_the_heads(mha, blocks):
    identity = fuse(mha, HeadPlan.uniform(mha.config, 4, 4), blocks)
    assert np.allclose(head_shares(identity, blocks), head_shares(mha, blocks), atol=1e-4)


def test_circles_are_seen():
    assert repeated_share(range(20)) == 0
    assert repeated_share([1, 2] * 50) == pytest.approx(1 - 2 / 97)
    assert repeated_share([1, 2]) == 0


def test_sampling_is_the_seeds(mha):
    class Tokenizer:
        def __call__(self, prompt, **_):
            ids = torch.tensor([[ord(letter) % 90 for letter in prompt]])
            return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids))

    class Inputs(dict):
        def to(self, _):
            return self

    texts = [written(mha, Tokenizer(), ["abc", "de"], 6, seed=seed) for seed in (0, 0, 1, None, None)]
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4] != texts[0]
    several = written(mha, Tokenizer(), ["abc", "de"], 6, seed=0, times=3)
    assert [len(text) for text in texts[0]] == [6] * 2 and [len(text) for text in several] == [6] * 6
