"""The notebooks on checkpoints off the beaten track and with wrong parameters: what has no meaning is skipped, and said."""

from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import tiny_llama

from dha_utils import HeadPlan, fuse, load_checkpoint, load_text, save_checkpoint, token_blocks

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SIZES = {"text": "austen", "length": 32, "calibration_blocks": 8, "repeated": 0.25, "validation_blocks": 4}
OWN = {"02_head_clusters": {"search_steps": 4}}


def execute(name, folder, **parameters):
    output = folder / f"{name}.ipynb"
    settings = SIZES | OWN.get(name, {}) | {"run_dir": str(folder / "run")} | parameters
    papermill.execute_notebook(NOTEBOOKS / f"{name}.ipynb", output, settings, progress_bar=False, log_output=False)
    cells = nbformat.read(output, as_version=4).cells
    return "\n".join(str(cell.get("outputs", "")) for cell in cells)


def checkpoint(folder, heads, key_value_heads):
    shape = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": 8, "hidden_size": 8 * heads}
    model = tiny_llama(vocab_size=4096, num_hidden_layers=2, **shape)
    save_checkpoint(model, load_checkpoint("austen-mha")[1], folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "budget"),
    [(4, 1, 1), (3, 3, 0.5), *(pytest.param(n, n, 0.5, marks=pytest.mark.slow) for n in (2, 5, 7, 13))],
)
def test_shapes_with_nothing_to_contrast(heads, key_value_heads, budget, tmp_path):
    """One key-value head, and prime numbers of them without sharing, whose planted copies are all of one head."""
    model = checkpoint(tmp_path, heads, key_value_heads)
    first = execute("01_head_redundancy", tmp_path, model=model, budget=budget)
    assert "there are no strangers to tell them from" in first
    assert ("there is nothing to share" in first) == (key_value_heads == 1)
    assert "key heads and" in execute("02_head_clusters", tmp_path, model=model, budget=budget)
    assert (tmp_path / "run" / "plan.json").is_file()


def test_a_wrong_parameter_is_one_sentence_in_the_notebook_too(tmp_path):
    with pytest.raises(
        papermill.PapermillExecutionError, match="ValueError: method must be one of mean, spectral, not 'gqa'"
    ):
        execute("01_head_redundancy", tmp_path, model="austen-mha", budget=0.5, method="gqa")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "method", "gates", "said"),
    [
        (3, "mean", {}, ["**NO-GO** for austen-mha (", "stopped by: agreement on austen; perplexity on austen, increase"]),
        (
            8,
            "mean",
            {"smallest_saving": 0},
            [
                "**GO** for",
                "by 0.0% (95 % interval 0.0% to 0.0%)",
                "same token in 100% of places on austen, in 100% on wikipedia; 0% of",
            ],
        ),
        (4, "spectral", {"documents": 4, "items": 20}, ["**CANNOT TELL** for", "As many as would tell"]),
    ],
    ids=["bad", "unchanged", "too few questions"],
)
def test_the_verdict(heads, method, gates, said, tmp_path):
    """On austen-mha converted outside of a run, to as many key and value heads a layer of its eight."""
    model, tokenizer = load_checkpoint("austen-mha")
    calibration = token_blocks(tokenizer, load_text("austen", "train"), 256, 12)
    converted = fuse(model, HeadPlan.uniform(model.config, heads, heads), calibration, method)
    save_checkpoint(converted, tokenizer, tmp_path / "dha")
    report = execute("06_decision_report", tmp_path, checkpoint=str(tmp_path / "dha"), **{"length": 256} | gates)
    assert all(words in report for words in said)
