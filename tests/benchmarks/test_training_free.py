"""The committed figures of the README's table, made again on one draw (`make test-slow`)."""

from pathlib import Path

import pandas as pd
import pytest
import training_free

from dha_utils import load_checkpoint, load_text, perplexity, token_blocks
from dha_utils.plan.allocate import heads_for_budget
from dha_utils.sources.text import drawn

RESULTS = Path(training_free.__file__).parent / "results"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, length, tokens, budget", [("austen-mha", 256, 32768, 0.25), ("smollm2-135m", 512, 16384, 0.5)]
)
def test_a_draw_reproduces_its_rows(name, length, tokens, budget):
    """Each figure as near to its row as the draws are to each other, or to 1 %."""
    rows = pd.read_csv(RESULTS / f"training_free_{name}.csv")
    rows = rows[(rows["budget"].round(4) == budget) & (rows["calibration_tokens"] == tokens)]
    source, tokenizer = load_checkpoint(name)
    train, unseen = (load_text(rows["text"].iloc[0], split) for split in ("train", "validation"))
    pool = token_blocks(tokenizer, train, length)
    scored = rows["validation_tokens"].iloc[0] // (length - 1)
    validation = token_blocks(tokenizer, unseen, length, int(scored))
    assert perplexity(source, validation) == pytest.approx(rows["base_perplexity"].iloc[0], rel=1e-3)
    made = training_free.methods(source, drawn(pool, tokens // length, 0), ["layers"])
    far = {}
    for (method, allocation), make in made.items():
        committed = rows[(rows["method"] == method) & (rows["allocation"] == allocation)]
        [expected] = committed.loc[committed["seed"] == 0, "perplexity"]
        spread = max(committed["perplexity"].max() - committed["perplexity"].min(), 0.01 * expected)
        found = perplexity(make(heads_for_budget(source.config, budget)), validation)
        if abs(found - expected) > spread:
            far[method, allocation] = (found, expected, spread)
    assert not far
