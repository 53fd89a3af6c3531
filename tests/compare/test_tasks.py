"""Tasks: items that can be answered, lm-eval's own questions, and a comparison that counts changes, not averages."""

import json
import random

import pandas as pd
import pytest
import yaml
from datasets import Dataset, DatasetDict, disable_caching, load_dataset
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from dha_utils import load_checkpoint, load_text
from dha_utils.compare import tasks
from dha_utils.compare.tasks import (
    AT_LM_EVAL,
    CHOICES,
    PAPER_TASKS,
    TASKS,
    answers,
    compare_answers,
    draw_items,
    last_word_item,
    next_passage_item,
    paper_tasks,
    text_items,
    write_items,
)

WORDS = [f"w{n}" for n in range(400)]


def test_the_right_passage_is_the_one_that_follows():
    for seed in range(20):
        item = next_passage_item(WORDS, 60, random.Random(seed))
        assert item["context"].split() == WORDS[60:108]
        assert item["choices"][item["answer"]].split() == WORDS[108:120]
        others = [
            word for place, choice in enumerate(item["choices"]) if place != item["answer"] for word in choice.split()
        ]
        assert len(item["choices"]) == len(set(item["choices"])) == CHOICES
        assert not set(others) & set(WORDS[60:120]), "a wrong passage stands elsewhere"


def test_a_last_word_has_been_said_before():
    words = [*WORDS[:60], "the", "garden,", *WORDS[60:70], "his", "garden."]
    assert last_word_item(words, len(words) - 1) == {"context": " ".join(words[-49:-1]), "word": "garden"}
    assert last_word_item(words, len(words) - 2) is None, "no end of a sentence"
    assert last_word_item([*words[:-1], "orchard."], len(words) - 1) is None, "not said before"


def test_items_are_the_seeds_and_documents_may_be_too_short():
    documents = load_text("austen", "validation")
    items = text_items(documents, 50)
    assert items == text_items(documents, 50) != text_items(documents, 50, seed=1)
    assert {name: len(rows) for name, rows in items.items()} == {"next_passage": 50, "last_word": 50}
    with pytest.raises(ValueError, match="no passage long enough for a question"):
        text_items(["Too short."], 5)


def test_a_text_without_spaces_is_asked_by_characters():
    text = "".join(chr(0x4E00 + place) for place in range(400)) + "。"
    [item] = text_items([text], 1).pop("next_passage")
    assert item["context"] + item["choices"][item["answer"]] in text and len(item["context"]) == 48
    assert list(text_items([text], 5)) == ["next_passage"]
    lines = "\n".join(f"「{text[start : start + 8]}」" for start in range(0, 400, 8))
    assert list(text_items([lines], 5)) == ["next_passage"], "line ends are not spaces between words"


def test_the_papers_tasks_are_those_with_items(tmp_path):
    for name in ("sciq", "piqa"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert paper_tasks(tmp_path) == (tmp_path, ["sciq", "piqa"])


def test_items_are_counted_as_json_lines_are(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"a": "one\u2028line"}\n{"a": "two"}\n', encoding="utf-8")
    assert draw_items(tmp_path / "items.jsonl", None) == [0, 1]


def test_answers_of_the_tutorial_model(tmp_path):
    model, tokenizer = load_checkpoint("austen-mha")
    write_items(text_items(load_text("austen", "validation"), 100), tmp_path)
    given = answers(model, tokenizer, tmp_path)
    assert given.groupby("task").size().to_dict() == {"next_passage": 100, "last_word": 100}
    table = compare_answers(given, given)
    assert table.loc["next_passage", "source"] > 0.33, "above chance, 0.25"
    assert (table["flips"] == 0).all() and (table["p"] == 1).all() and (table["kept"] == 1).all()
    with pytest.raises(ValueError, match="there is no .*sciq.jsonl"):
        answers(model, tokenizer, tmp_path, ["sciq"])


def test_changes_are_counted_both_ways():
    before = pd.DataFrame({"task": "t", "item": range(10), "right": [1] * 6 + [0] * 4})
    after = before.assign(right=[0, 0, 0, 1, 1, 1, 1, 0, 0, 0])
    [row] = compare_answers(before, after).to_dict("records")
    assert (row["lost"], row["won"], row["flips"]) == (3, 1, 0.4)
    assert (row["source"], row["model"]) == (0.6, 0.4) and row["kept"] == pytest.approx(2 / 3)
    assert row["low"] < -0.2 < row["high"] and row["p"] == pytest.approx(0.625)
    with pytest.raises(pd.errors.MergeError):
        compare_answers(before, pd.concat([after, after]))


ARC = {
    "answerKey": "B",
    "question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
}
ROWS = {  # as the public files have them: (row, the same as lm-eval's copy on the hub has it)
    "sciq": {"support": " s.", "question": "q?", "distractor1": "1", "distractor2": "2", "distractor3": "3"}
    | {"correct_answer": "c"},
    "piqa": {"goal": "g", "sol1": "one", "sol2": "it's two", "label": 1},
    "winogrande": {"sentence": "Ann gave _ the cup.", "option1": "Bea", "option2": "Cleo", "answer": "2"},
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "hellaswag": {"activity_label": "Cooking", "ctx_a": "A man [header] is here.", "ctx_b": "he", "label": "1"}
    | {"endings": ["goes [title]  on", 'says "no" [x]', "it's", "d"]},
    "logiqa": {"label": "c", "context": "ctx", "question": "q", "options": ["w", "x", "y", "z's"]},
    "boolq": {"passage": "p", "question": "is it", "answer": True},
    "lambada": {"text": "one two three four"},
}
ON_THE_HUB = {
    name: {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    for name in ("arc_easy", "arc_challenge")
} | {"boolq": {"passage": "p", "question": "is it", "label": 1}}


@pytest.fixture(scope="module")
def manager():
    return TaskManager()  # reads all of lm-eval's tasks


def requests(manager, config, row, folder):
    """What lm-eval asks of a model about one row."""
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    files = {split: str(folder / "rows.jsonl") for split in ("train", "validation", "test")}
    own = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    [task] = manager.load([config | own])["tasks"].values()
    task.build_all_requests(limit=1, rank=0, world_size=1)
    return [instance.arguments for instance in task.instances]


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_the_papers_tasks_ask_what_lm_eval_asks(manager, name, tmp_path):
    disable_caching()
    ours, known = yaml.safe_load((TASKS / f"{name}.yaml").read_text()), AT_LM_EVAL.get(name, name)
    theirs = load_yaml(manager.task_index[known].yaml_path, resolve_func=True)
    asked = requests(manager, ours, ROWS[name], tmp_path)
    assert asked == requests(manager, theirs, ON_THE_HUB.get(name, ROWS[name]), tmp_path)
    if name in ON_THE_HUB:
        assert requests(manager, ours, ON_THE_HUB[name], tmp_path) == asked


def test_items_come_from_the_hub_and_what_it_does_not_give_is_said(monkeypatch, tmp_path, caplog):
    """A hub that gives one row a task, but not BoolQ, and of LogiQA a program; offline, what is there stays."""
    places = {"allenai/sciq": "sciq", "baber/piqa": "piqa", "allenai/winogrande": "winogrande"}
    places |= {"allenai/ai2_arc": "arc_easy", "Rowan/hellaswag": "hellaswag", "EleutherAI/lambada_openai": "lambada"}

    def load(path, name=None, **more):
        if path == "json":
            return load_dataset(path, name, **more)
        if path == "aps/super_glue":
            raise Exception("403 Forbidden")  # as httpx does, of no built-in kind
        task = places[path]
        rows = Dataset.from_list([ON_THE_HUB.get(task, ROWS[task])])
        return DatasetDict({split: rows for split in ("train", "validation", "test")})

    monkeypatch.setattr("datasets.load_dataset", load)
    disable_caching()
    monkeypatch.setattr(tasks, "FETCHED", tmp_path)
    folder, names = paper_tasks("hub")
    assert folder == tmp_path and set(PAPER_TASKS) - set(names) == {"logiqa", "boolq"}
    assert "does not give boolq (403 Forbidden)" in caplog.text
    model, tokenizer = load_checkpoint("austen-mha")
    assert set(answers(model, tokenizer, folder, names)["task"]) == set(names)

    def offline(path, **_):
        raise ConnectionError("no way there")

    monkeypatch.setattr("datasets.load_dataset", offline)
    assert paper_tasks("hub") == (folder, names)
    assert "cannot be reached for boolq (no way there)" in caplog.text
    with pytest.raises(ValueError, match="has none of sciq.jsonl"):
        monkeypatch.setattr(tasks, "FETCHED", tmp_path / "empty")
        paper_tasks("hub")
