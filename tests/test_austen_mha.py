"""The tutorial's model is worth looking at: it has not learned its text by heart, and its heads matter."""

import runpy
from itertools import takewhile
from pathlib import Path

import pytest

training = runpy.run_path(str(Path(__file__).parents[1] / "data" / "train_austen_mha.py"))


def test_its_attention_matters():
    wanted = takewhile(lambda figure: "one value head" not in figure[0], training["figures"]("austen-mha"))
    unseen, familiar, off = (figure for _, figure in wanted)
    assert unseen < 1.3 * familiar and off > 3


@pytest.mark.slow
def test_each_step_of_a_conversion_can_be_seen_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where its trainings go
    figures = dict(training["figures"]("austen-mha"))
    pooled, closed, refitted, on_text, distilled, source = list(figures.values())[-6:]
    assert figures["one value head a layer, closed form"] > 1.15
    assert pooled > 5 and closed > 1.15
    assert source < distilled < 0.98 * refitted < 0.9 * closed and on_text < refitted
