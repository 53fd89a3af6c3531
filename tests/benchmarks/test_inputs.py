"""A file of results never holds rows of two texts."""

import argparse

import pytest
from inputs import RESULTS, add_inputs, parsed


@pytest.mark.parametrize(
    "words, text, file",
    [
        ([], "austen", "study_austen-mha.csv"),
        (["--model", "smollm2-135m"], "wikipedia", "study_smollm2-135m.csv"),
        (["--model", "path/to/mine"], "wikipedia", "study_mine.csv"),
        (["--text", "wikipedia"], "wikipedia", "study_austen-mha_wikipedia.csv"),
        (["--model", "smollm2-135m", "--text", "path/to/notes.txt"], "path/to/notes.txt", "study_smollm2-135m_notes.csv"),
    ],
)
def test_a_text_that_is_not_the_models_own_names_the_file(words, text, file, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study.py", *words])
    parser = argparse.ArgumentParser()
    add_inputs(parser, "austen-mha", "study")
    arguments = parsed(parser)
    assert (arguments.text, arguments.out) == (text, RESULTS / file)
