"""The monitor: an unchanged model passes but for the chosen share of checks, a broken one never does."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from dha_utils import HeadPlan, fuse, load_checkpoint, load_text, save_checkpoint, token_blocks
from dha_utils.__main__ import main
from dha_utils.compare.monitor import block_metrics, check_drift, fresh_blocks, limits, read_baseline, write_baseline
from dha_utils.measure.perplexity import token_losses


def test_metrics_are_means_over_a_block(gqa, blocks):
    rows = block_metrics(gqa, blocks)
    assert np.allclose(rows["loss"], token_losses(gqa, blocks).mean(1), atol=1e-5)
    assert (rows[["loss", "wrong"]] >= 0).all(axis=None) and len(rows) == len(blocks)


@pytest.mark.parametrize("count", [8, 32])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_false_alarms_are_as_many_as_chosen(count, rate):
    random, trials = np.random.default_rng(0), 2000
    samples = random.normal(3, 2, size=(trials, 2, count, 2))
    alarms = sum(
        any(new.mean(0) > list(limits(pd.DataFrame(sample, columns=["a", "b"]), rate).values())) for sample, new in samples
    )
    assert 0.5 * rate < alarms / trials < 1.5 * rate


def test_a_figure_that_is_no_number_is_drift(gqa, blocks, tmp_path):
    baseline = write_baseline(tmp_path / "baseline.json", gqa, blocks.repeat(2, 1), "text")
    assert not check_drift(baseline, gqa, blocks)["drift"].any()
    with torch.no_grad():
        gqa.lm_head.weight.mul_(float("nan"))
    assert check_drift(baseline, gqa, blocks)["drift"].any()


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """(a baseline of austen-mha, a folder of its conversion by mean pooling at a quarter of its heads)."""
    folder = tmp_path_factory.mktemp("monitored")
    model, tokenizer = load_checkpoint("austen-mha")
    blocks = fresh_blocks(tokenizer, "austen", 64, 12)
    write_baseline(folder / "baseline.json", model, blocks, "austen")
    save_checkpoint(fuse(model, HeadPlan.uniform(model.config, 2, 2), method="mean"), tokenizer, folder / "pooled")
    return folder / "baseline.json", folder / "pooled"


def test_twenty_fresh_samples(accepted):
    baseline, tokenizer = read_baseline(accepted[0]), load_checkpoint("austen-mha")[1]
    for name, expected in (("austen-mha", False), (str(accepted[1]), True)):
        model, _ = load_checkpoint(name)
        samples = (fresh_blocks(tokenizer, "austen", 64, 12, seed) for seed in range(1, 21))
        assert [check_drift(baseline, model, blocks)["drift"].any() for blocks in samples] == [expected] * 20


@pytest.mark.parametrize("name, code", [("austen-mha", 0), (None, 1)])
def test_the_exit_code_says_whether_there_is_drift(accepted, name, code, capsys):
    model = name or str(accepted[1])
    with pytest.raises(SystemExit) as stopped:
        main(["monitor", "--baseline", str(accepted[0]), "--model", model, "--text", "austen", "--seed", "1"])
    assert stopped.value.code == code
    assert ("drift: loss (LM loss (nats a token)) is" in capsys.readouterr().out) == bool(code)


def test_what_cannot_be_checked_is_no_drift(accepted, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Too short.\n\n" * 40)
    (tmp_path / "other.json").write_text("{}")
    wrong = {
        "is not a baseline.json": ["--baseline", str(tmp_path / "other.json")],
        "blocks of 64 tokens, the baseline 12": ["--text", str(tmp_path / "short.txt")],
    }
    for said, arguments in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            main(["monitor", "--baseline", str(accepted[0]), "--model", "austen-mha", "--text", "austen", *arguments])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_too_few_blocks_are_refused(gqa, blocks, tmp_path):
    with pytest.raises(ValueError, match="at least 8 blocks"):
        write_baseline(tmp_path / "baseline.json", gqa, blocks, "text")
    assert not (tmp_path / "baseline.json").exists()


def test_the_baseline_says_what_it_was_measured_on(accepted):
    baseline = read_baseline(accepted[0])
    assert {name: baseline[name] for name in ("text", "blocks", "length", "dtype", "false_alarms")} == {
        "text": "austen",
        "blocks": 12,
        "length": 64,
        "dtype": "float32",
        "false_alarms": 0.001,
    }
    assert json.loads(accepted[0].read_text()) == baseline
    tokenizer = load_checkpoint("austen-mha")[1]
    pool = token_blocks(tokenizer, load_text("austen", "validation"), 64)
    assert {tuple(b.tolist()) for b in fresh_blocks(tokenizer, "austen", 64, 12, 5)} <= {tuple(b.tolist()) for b in pool}
