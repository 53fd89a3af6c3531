"""What the long-context study measures, on a tiny model."""

from types import SimpleNamespace

import pytest
import torch
from long_context import DEPTHS, EDGES, LAGS, by_copy, by_needle, by_position, models
from quantized_cache import EXACT, block_loss, cache_bytes, make_cache

from dha_utils import load_checkpoint, perplexity
from dha_utils.measure.perplexity import token_losses


@pytest.fixture(scope="module")
def austen():
    return load_checkpoint("austen-mha")


def test_every_model_has_a_name_of_its_own():
    asked = SimpleNamespace(
        repeated=0.25, budgets=[0.5, 0.25], calibration_blocks=2, length=8, tokens=64, model="m", text="t"
    )
    named = [str(name) for name, _ in models(asked, None, None, torch.zeros(4, 8, dtype=torch.long))]
    assert len(named) == len(set(named)) == 1 + 2 * 3


def test_positions_cover_a_text_once(gqa, blocks):
    rows, length = by_position(gqa, blocks[:1]), blocks.shape[1]
    ends = [*(row["place"] for row in rows[1:]), length]
    total = sum(row["loss"] * (end - row["place"]) for row, end in zip(rows, ends))
    assert [row["place"] for row in rows] == [edge for edge in EDGES if edge < length]
    assert total / (length - 1) == pytest.approx(token_losses(gqa, blocks[:1]).mean().item(), rel=1e-5)


def test_a_row_names_nothing_that_its_setting_does(gqa, blocks):
    """A row's number of the text hid the name of the text: no row was ever found again."""
    assert by_position(gqa, blocks[:1])[0].keys() == {"task", "place", "draw", "loss"}


def test_a_copy_is_scored_on_its_second_half(gqa):
    block = torch.arange(max(LAGS)) % 90
    rows = by_copy(gqa, block[None])
    twice = token_losses(gqa, block[: LAGS[0]].repeat(2)[None])[0]
    assert [row["place"] for row in rows] == LAGS
    assert rows[0]["loss"] == pytest.approx(twice[LAGS[0] :].mean().item(), rel=1e-5), "but for its first token"


def test_a_needle_is_asked_for_at_every_depth(austen, monkeypatch):
    model, tokenizer = austen
    scored = []
    monkeypatch.setattr(
        "long_context.token_losses", lambda _, blocks: scored.append(blocks[0]) or torch.arange(1.0, 1000)[None]
    )
    rows = by_needle(model, tokenizer, torch.randint(0, 500, (2, 100)))
    assert [row["place"] for row in rows] == DEPTHS * 2
    digits = [tokenizer.decode(text[-5:]) for text in scored]
    assert all(len(number) == 5 and tokenizer.decode(text).count(number) == 2 for number, text in zip(digits, scored))
    assert {row["loss"] for row in rows} == {997.0}, "the mean of the last five"


def test_pieces_over_an_exact_cache_are_the_whole_text(gqa, blocks):
    loss = torch.stack([block_loss(gqa, block, make_cache(gqa, EXACT)) for block in blocks[:2]]).mean()
    assert loss.exp().item() == pytest.approx(perplexity(gqa, blocks[:2]), rel=1e-5)


def test_exact_numbers_are_counted_as_two_bytes(gqa, blocks):
    cache = make_cache(gqa, EXACT)
    block_loss(gqa, blocks[0], cache)
    config = gqa.config
    tokens = len(blocks[0])
    assert cache_bytes(cache) == tokens * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
