"""The parameters of the notebooks and of `make run`: one sentence for what is wrong, before anything is computed."""

import json
import shutil

import pytest
import torch
from conftest import SHAPES, half_plan, tiny_llama

from dha_utils import HeadPlan, fuse, load_checkpoint, load_text, save_checkpoint
from dha_utils.__main__ import DEFAULTS, main, typed
from dha_utils.compare.cost import bytes_per_token
from dha_utils.parameters import RULES, check_parameters, check_report, converted_model, open_run
from dha_utils.runs import record_metrics, write_whole
from dha_utils.sources.text import repeating


def refusal(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code  # a string: printed to stderr, exit status 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint, a text, and things that are neither."""
    path = tmp_path_factory.mktemp("my models")  # with a space
    tokenizer = load_checkpoint("austen-mha")[1]
    settings = {"vocab_size": 512, "num_attention_heads": 4, "head_dim": 8, "hidden_size": 32}
    source = tiny_llama(**settings, num_key_value_heads=4)
    save_checkpoint(source, tokenizer, path / "source")
    save_checkpoint(tiny_llama(1, **settings, num_key_value_heads=4), tokenizer, path / "other")
    save_checkpoint(fuse(source, HeadPlan.uniform(source.config, 2, 2), method="mean"), tokenizer, path / "fused")
    (path / "text.txt").write_text("\n\n".join(f"Paragraph {i} says something else. " * 9 for i in range(90)))
    (path / "short.txt").write_text("\n\n".join(f"No {i}." for i in range(40)))
    (path / "thesis").mkdir()
    (path / "thesis" / "chapter.txt").write_text("years of work")
    return path


BLOCKS = {"length": 32, "calibration_blocks": 4, "repeated": 0.0, "validation_blocks": 2}


SENTENCES = {
    ("budget", "1.5"): "budget must be a number above 0 and at most 1, the share of the heads to keep, not 1.5",
    ("budget", "0"): "budget must be a number above 0",
    ("budget", "5%"): "budget must be a number above 0 and at most 1, the share of the heads to keep, not '5%'",
    ("budget", "nan"): "budget must be a number",
    ("budget", "0.1"): "a budget of 0.1 is 2 of 24 heads",
    ("method", "gqa"): "method must be one of mean, spectral, not 'gqa'",
    ("trainable", "heads"): "trainable must be one of attention, all, lora, not 'heads'",
    ("seed", "-1"): "seed must be a whole number from 0 to 4294967295, not -1",
    ("seed", "4294967296"): "seed must be a whole number from 0 to",
    ("learning_rate", "1" + "0" * 400): "learning_rate must be a number above 0",
    ("run_dir", "~nobody-of-that-name/run"): "there is no ~nobody-of-that-name/run",
    ("length", "20k"): "length must be a whole number, at least 16, not '20k'",
    ("length", "4096"): "length must be at most the model's context, 128, not 4096",
    ("calibration_blocks", "2"): "calibration_blocks must be a whole number, at least 4, not 2",
    ("repeated", "1.5"): "repeated must be a share from 0 to 1 (0.15 for 15 %), not 1.5",
    ("calibration_blocks", "9999"): "block(s) of 32 need 319968: give more text",
    ("tokens", "20"): "tokens must be at least the length of a block, 32, not 20",
    ("tokens", "20k"): "tokens must be a whole number, at least 1, not '20k'",
    ("learning_rate", "0"): "learning_rate must be a number above 0, not 0",
    ("cache_bytes", "10"): "a cache of 10 bytes a token is too small",
    ("cache_bytes", "1e3"): "cache_bytes must be a whole number, at least 1, or None, not 1000.0",
    ("max_increase", "5%"): "max_increase must be a number above 0, or None, not '5%'",
    ("model", "7"): "model must be a name or a path, in quotes, not 7 (papermill: -p reads numbers, -r leaves them text)",
    ("model", "no-such-model"): "there is no checkpoint 'no-such-model'",
    ("model", "FOLDER/fused"): "this is a 'dha' model already",
    ("text", "FOLDER/short.txt"): "give more text",
    ("text", "no/such-text"): "cannot load text from 'no/such-text'",
    ("run_dir", "FOLDER/thesis"): "is a folder of something else than a run",
    ("prompts", "Once"): "prompts must be a list of texts to go on from, not 'Once'",
    (
        "accelerators",
        "80",
    ): "accelerators must be a dictionary, name: [memory in GB, bandwidth in GB/s, price an hour]",
    ("false_alarms", "0"): "false_alarms must be a number above 0 and below 1, not 0",
    ("most_flips", "20"): "most_flips must be a share from 0 to 1 (0.15 for 15 %), not 20",
    ("other_text", "FOLDER/text.txt"): "other_text must be another text than",
    ("language", "fr"): "language must be one of en, ja, not 'fr'",
    ("documents", "1"): "documents must be a whole number, at least 2, not 1",
    ("evaluation", "3"): "there is no parameter 'evaluation': choose from model",
}


@pytest.mark.parametrize(("name", "word"), SENTENCES)
def test_each_wrong_parameter_gets_its_sentence(name, word, folder, tmp_path):
    given = {"run_dir": tmp_path / "run", "model": folder / "source", "text": folder / "text.txt", "budget": "0.5"} | BLOCKS
    given[name] = word.replace("FOLDER", str(folder))
    words = [str(part) for pair in given.items() for part in ("-p", *pair)]
    said = refusal("check", *words)
    assert said.startswith("error: ") and SENTENCES[name, word] in said and "\n" not in said
    assert not (tmp_path / "run").exists() and (folder / "thesis" / "chapter.txt").is_file()


def test_a_right_request_passes_and_writes_nothing(folder, tmp_path):
    given = {"model": folder / "source", "text": folder / "text.txt", "run_dir": tmp_path / "run"} | BLOCKS
    words = [str(part) for pair in given.items() for part in ("-p", *pair)]
    main(["check", *words, "-p", "max_increase", "0.05", "-y", "budgets: [0.75, 0.5]"])
    assert not (tmp_path / "run").exists()
    assert "error: budgets must be a list of numbers" in refusal("check", *words, "-y", "budgets: [2]")
    assert "give cache_bytes or max_increase, not both" in refusal(
        "check", *words, "-p", "max_increase", "0.05", "-p", "cache_bytes", "192"
    )


def test_words_are_read_as_papermill_reads_them():
    assert [typed(word) for word in ("3", "0.5", "1e-3", "None", "True", "20k", "5%")] == [
        3,
        0.5,
        1e-3,
        None,
        True,
        "20k",
        "5%",
    ]


def test_every_default_of_check_has_a_rule():
    check_parameters(**DEFAULTS)
    assert DEFAULTS.keys() <= RULES.keys()


def request(folder, run, **changes):
    settings = {
        "model": str(folder / "source"),
        "text": str(folder / "text.txt"),
        "budget": 0.5,
        "method": "mean",
        "seed": 0,
    }
    return open_run(run, **settings | BLOCKS | {"cache_bytes": None, "max_increase": None} | changes)


CHANGES = {
    "budget": 0.75,
    "cache_bytes": 192,
    "max_increase": 0.1,
    "method": "spectral",
    "seed": 1,
    "length": 64,
    "calibration_blocks": 5,
    "repeated": 0.5,
    "validation_blocks": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_with_another_wish_is_kept(name, folder, tmp_path):
    request(folder, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(ValueError, match=f"holds a run with {name} .*, not {CHANGES[name]!r}: choose another run_dir"):
        request(folder, tmp_path / "run", **{name: CHANGES[name]})
    request(folder, tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_what_repeats_is_fitted_and_not_validated(folder, tmp_path):
    (*_, plain, validation), (*_, calibration, same) = (
        request(folder, tmp_path / str(share), calibration_blocks=16, repeated=share) for share in (0.0, 0.25)
    )
    assert repeating(plain).sum() == 0 and repeating(calibration).sum() == 4 and torch.equal(validation, same)


@pytest.mark.parametrize("changed", ["model", "text"])
def test_a_run_knows_model_and_text_by_their_content(changed, folder, tmp_path):
    for name in ("source", "other"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "text.txt", tmp_path)
    request(tmp_path, tmp_path / "run")
    request(tmp_path, tmp_path / "run")
    if changed == "model":
        shutil.rmtree(tmp_path / "source")
        (tmp_path / "other").rename(tmp_path / "source")
    else:
        (tmp_path / "text.txt").write_text((folder / "text.txt").read_text().replace("something", "anything"))
    with pytest.raises(ValueError, match=f"holds a run with a {changed} of other content"):
        request(tmp_path, tmp_path / "run")


def test_paths_are_seen_from_here_or_from_the_repository(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    request(folder, tmp_path / "home", model="~/source", text="~/text.txt")
    monkeypatch.chdir(folder)
    request(folder, tmp_path / "here", model="source", text="text.txt")
    monkeypatch.setattr("dha_utils.runs.ROOT", folder)
    monkeypatch.chdir(tmp_path)
    run, *_ = request(folder, "runs/there", model="source", text="text.txt")
    assert run == folder / "runs" / "there" and (run / "run.json").is_file()
    shutil.rmtree(folder / "runs")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder, tmp_path):
    source, tokenizer = load_checkpoint(folder / "source")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    save_checkpoint(source, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="has no vocabulary for this model"):
        load_checkpoint(tmp_path / "model")


def test_the_table_needs_a_run(tmp_path, capsys):
    assert "run 01_head_redundancy to 04_continued_pretraining first" in refusal("table", "--run-dir", str(tmp_path))
    write_whole(tmp_path / "run.json", "{}")
    write_whole(tmp_path / "plan.json", "{}")
    record_metrics(tmp_path, "source", [{"method": "source", "perplexity": 9.0}])
    record_metrics(tmp_path, "untrained", [{"method": "mean", "perplexity": 99.0}], "plan.json")
    main(["table", "--run-dir", str(tmp_path)])
    assert "untrained" in capsys.readouterr().out
    write_whole(tmp_path / "plan.json", json.dumps({"other": 1}))
    said = refusal("table", "--run-dir", str(tmp_path))
    assert "the untrained rows of" in said and "with another plan.json: run 03_head_fusion again (make run" in said


def test_a_damaged_or_older_run_is_one_sentence(folder, tmp_path):
    write_whole(tmp_path / "run" / "run.json", "")
    with pytest.raises(ValueError, match="run.json is damaged .*: delete that folder, or choose another run_dir"):
        request(folder, tmp_path / "run")
    write_whole(tmp_path / "run" / "run.json", json.dumps({"model": str(folder / "source")}))
    with pytest.raises(ValueError, match="holds a run with text None, not"):
        request(folder, tmp_path / "run")


def test_a_report_is_about_a_model_made_from_the_source(tmp_path, mha, gqa):
    tokenizer = load_checkpoint("austen-mha")[1]
    source, other = (tiny_llama(vocab_size=4096, **SHAPES[name]) for name in ("mha", "gqa"))
    for name, model in {"dha": fuse(source, half_plan(source), method="mean"), "source": source}.items():
        save_checkpoint(model, tokenizer, tmp_path / name)
    assert converted_model(tmp_path, tmp_path / "dha", source, tokenizer).config.budget == 0.375
    with pytest.raises(ValueError, match="no recovered in .*: run 04_continued_pretraining first"):
        converted_model(tmp_path, "recovered", source, tokenizer)
    for checkpoint, model in (("dha", other), ("source", source)):
        with pytest.raises(ValueError, match="checkpoint must be model or recovered, or a DHA model made from this source"):
            converted_model(tmp_path, tmp_path / checkpoint, model, tokenizer)
    with pytest.raises(ValueError, match="embeddings of .* are those of another model"):
        converted_model(tmp_path, tmp_path / "dha", tiny_llama(1, vocab_size=4096, **SHAPES["mha"]), tokenizer)


def test_fewer_bits_are_not_counted_as_fewer_heads(tmp_path):
    tokenizer, source = load_checkpoint("austen-mha")[1], tiny_llama(vocab_size=4096, **SHAPES["mha"])
    save_checkpoint(source, tokenizer, tmp_path / "source")
    source = load_checkpoint(tmp_path / "source")[0]
    save_checkpoint(fuse(source, half_plan(source), method="mean").bfloat16(), tokenizer, tmp_path / "dha")
    converted = converted_model(tmp_path, tmp_path / "dha", source, tokenizer)
    assert bytes_per_token(converted) / bytes_per_token(source) == converted.config.budget


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"other_text": "nowhere"}, "nowhere"),
        ({"documents": 2, "length": 10**6}, "of the documents have 1000000 tokens"),
        ({"checkpoint": "no/such/folder"}, "no/such/folder"),
        ({"task_folder": "notebooks"}, "has none of sciq.jsonl"),
    ],
)
def test_what_a_report_would_stumble_over_late_is_said_early(wrong, said):
    tokenizer, unseen = load_checkpoint("austen-mha")[1], load_text("austen", "validation")
    right = {"other_text": "wikipedia", "documents": 4, "length": 64, "checkpoint": "recovered", "task_folder": None}
    check_report(tokenizer, unseen, **right)
    with pytest.raises(ValueError, match=said):
        check_report(tokenizer, unseen, **right | wrong)
