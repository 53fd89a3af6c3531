"""`make run` says in one sentence what is wrong, before the first notebook, and changes nothing."""

import json

import pytest
from transformers import GPT2Config

from dha_utils.__main__ import main
from dha_utils.runs import write_whole


def refusal(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code  # a string: printed to stderr, exit status 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "0"], "error: a head budget is a share of the source's heads, above 0 and at most 1, not 0.0"),
        (["--budget", "0.1"], "error: a budget of 0.1 is 10 of 96 heads"),
        (["--model", "no-such-model"], "error: there is no checkpoint 'no-such-model'"),
        (["--model", "GPT2"], "is a 'gpt2' model: only the LLaMA family is supported"),
        (["--text", "SHORT"], "tokens, but 1 block(s) of 256 need 256: give more text"),
    ],
)
def test_bad_requests(tmp_path, arguments, sentence):
    GPT2Config().save_pretrained(tmp_path / "GPT2")
    (tmp_path / "SHORT").write_text("\n\n".join(f"Paragraph {i}, not much." for i in range(40)))
    arguments = [str(tmp_path / word) if word in ("GPT2", "SHORT") else word for word in arguments]
    assert sentence in refusal("check", "--run-dir", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_model_is_kept(tmp_path):
    write_whole(tmp_path / "run.json", json.dumps({"model": "other", "text": "wikipedia", "budget": 0.5, "length": 256}))
    expected = "holds a run with model 'other', not 'wiki-mha': choose another run_dir"
    assert expected in refusal("check", "--run-dir", str(tmp_path))
    assert json.loads((tmp_path / "run.json").read_text())["model"] == "other"


def test_the_table_needs_a_run(tmp_path, capsys):
    assert "run notebooks 01 to 05 first" in refusal("table", "--run-dir", str(tmp_path))
    write_whole(tmp_path / "metrics.csv", "stage,method,perplexity\nsource,source,9.0\n")
    main(["table", "--run-dir", str(tmp_path)])
    assert "source" in capsys.readouterr().out
