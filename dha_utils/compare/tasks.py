"""Questions with right answers, asked of the source and of the converted model by EleutherAI's lm-eval.

The two tasks that are built here need no more than a text. Those of the paper are in `benchmarks/tasks/`.
"""

import json
import logging
import os
import random
import re
from contextlib import nullcontext, redirect_stderr
from glob import escape
from io import StringIO
from itertools import islice
from pathlib import Path

import pandas as pd
import yaml
from scipy.stats import binomtest

from ..runs import ROOT, find, write_whole

log = logging.getLogger(__name__)
TASKS = ROOT / "benchmarks" / "tasks"
FETCHED = ROOT / "data" / "tasks"
OWN = ("next_passage", "last_word")
PAPER_TASKS = ("sciq", "piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag", "logiqa", "boolq", "lambada")
SCRIPTS = ("logiqa",)  # on the hub they are programs, and no code from elsewhere is run
AT_LM_EVAL = {"lambada": "lambada_openai"}  # elsewhere both have the same name
CONTEXT, PASSAGE, CHOICES = 48, 12, 4  # words, words, passages
LONG = 4  # letters: a last word that a sentence would not end with anyway
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Burmese, Khmer, kana, CJK


def pieces(document):
    """(the words of a text, what stands between them); of a script without spaces its characters, with nothing between."""
    return (list(document), "") if len(UNSPACED.findall(document)) > len(document) / 2 else (document.split(), " ")


def next_passage_item(words, start, draw, between=" "):
    """Which of four passages of the same document goes on from these words?"""
    end = start + CONTEXT
    elsewhere = [
        place for place in range(0, len(words) - PASSAGE, PASSAGE) if place + PASSAGE <= start or place >= end + PASSAGE
    ]
    places = [end, *draw.sample(elsewhere, CHOICES - 1)]
    draw.shuffle(places)
    passages = [between + between.join(words[place : place + PASSAGE]) for place in places]
    return {"context": between.join(words[start:end]), "choices": passages, "answer": places.index(end)}


def last_word_item(words, end):
    """The last word of a sentence that has occurred in the words before it, as most do in LAMBADA (arXiv 1606.06031)."""
    context, word = words[max(end - CONTEXT, 0) : end], words[end].rstrip(".!?")
    seen = {earlier.strip(".,;:!?\"'()").lower() for earlier in context}
    if words[end] == word or len(word) < LONG or not word.isalpha() or word.lower() not in seen:
        return None
    return {"context": " ".join(context), "word": word}


def text_items(documents, count, seed=0):
    """{task: at most `count` items}, drawn from all documents by `seed`: both tasks, or what the documents have items of.

    A text without spaces has no last words. Raises ValueError if the documents are too short for a single item.
    """
    draw, passages, ends = random.Random(seed), [], []
    for words, between in map(pieces, documents):
        if len(words) >= CONTEXT + 2 * CHOICES * PASSAGE:
            passages += [(words, start, between) for start in range(0, len(words) - CONTEXT - PASSAGE, CONTEXT + PASSAGE)]
        if between:
            ends += [(words, end) for end in range(CONTEXT, len(words)) if words[end][-1] in ".!?"]
    draw.shuffle(passages)
    draw.shuffle(ends)
    last_words = filter(None, (last_word_item(*place) for place in ends))
    items = {
        "next_passage": [next_passage_item(words, start, draw, between) for words, start, between in passages[:count]],
        "last_word": list(islice(last_words, count)),
    }
    if not any(items.values()):
        raise ValueError("the text has no passage long enough for a question: give more or longer documents")
    return {name: made for name, made in items.items() if made}


def write_items(items, folder):
    """One JSONL file a task, as `answers` reads them."""
    for name, rows in items.items():
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def answers(model, tokenizer, folder, names=OWN, limit=None, batch_size=8):
    """What the model answers: one row an item, with columns `task`, `item`, `right` (0 or 1).

    `names`: tasks of `benchmarks/tasks/`, each with its items in `folder`/NAME.jsonl, of which `limit` are drawn. Right is
    lm-eval's own measure of the task: `acc_norm` where it has one, else `acc`.

    Raises ValueError if a file of items is missing.
    """
    from lm_eval import simple_evaluate  # takes seconds to import
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {name: Path(folder) / f"{name}.jsonl" for name in names}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise ValueError(f"there is no {missing[0]}: {TASKS.name}/README.md says what it holds")
    tasks = [
        yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        | {"dataset_kwargs": {"data_files": {"test": escape(str(file))}}}
        for name, file in files.items()
    ]
    drawn = {f"{name}_local": draw_items(file, limit) for name, file in files.items()}
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    with redirect_stderr(StringIO()) if os.environ.get("TQDM_DISABLE") else nullcontext():  # its bars do not ask
        only = TaskManager(include_defaults=False)  # reading all of lm-eval's own tasks takes long
        samples = simple_evaluate(asked, tasks=tasks, samples=drawn, bootstrap_iters=0, task_manager=only)["samples"]
    rows = [
        {"task": task.removesuffix("_local"), "item": sample["doc_id"], "right": sample.get("acc_norm", sample.get("acc"))}
        for task, answered in samples.items()
        for sample in answered
    ]
    return pd.DataFrame(rows).astype({"right": int})


def paper_tasks(task_folder):
    """(folder, those of `PAPER_TASKS` that it has items of). `task_folder`: its name, or "hub": `data/tasks`, fetched.

    Raises ValueError if there are none.
    """
    folder = fetch_tasks(FETCHED) if task_folder == "hub" else find(task_folder)
    names = [name for name in PAPER_TASKS if (folder / f"{name}.jsonl").is_file()]
    if not names:
        raise ValueError(f"{folder} has none of {', '.join(f'{name}.jsonl' for name in PAPER_TASKS)}")
    return folder, names


def fetch_tasks(folder):
    """lm-eval's items of the paper's tasks, from the hub, in the files that `folder` lacks; says which cannot be had."""
    missing = [name for name in PAPER_TASKS if name not in SCRIPTS and not (folder / f"{name}.jsonl").is_file()]
    if missing:
        from lm_eval.tasks import TaskManager  # takes seconds to import, and to read all tasks

        manager = TaskManager()
    for name in missing:
        try:
            [task] = manager.load([AT_LM_EVAL.get(name, name)])["tasks"].values()
            write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in task.eval_docs))
        except ConnectionError as error:
            log.warning("the hub cannot be reached for %s (%s)", ", ".join(missing), error)
            break
        except Exception as error:  # of the network, of the data or of lm-eval: the others may be had
            log.warning("the hub does not give %s (%s)", name, error)
    return folder


def draw_items(file, limit):
    """The places of at most `limit` items of a file, the same for every model: files may be sorted by kind."""
    text = file.read_text(encoding="utf-8")
    count = len(json.loads(text)) if text.lstrip()[:1] == "[" else sum(1 for line in text.split("\n") if line.strip())
    return sorted(random.Random(0).sample(range(count), min(limit or count, count)))


def compare_answers(source, model):
    """Two tables of `answers` to the same items, side by side, one row a task.

    `items`; `source` and `model`, the shares of right answers; `low` and `high`, an interval of their difference, 95 % at
    least (from the exact ones of both shares below); `kept`, the share of the source's score; `lost` and `won`, the answers
    that turned wrong and right; `flips`, both as a share of the items; `p`, McNemar's exact test that neither is likelier.
    """
    both = source.merge(model, on=["task", "item"], suffixes=("_source", "_model"), validate="one_to_one")
    table = {}
    for task, rows in both.groupby("task", sort=False):
        before, after = rows["right_source"], rows["right_model"]
        lost, won = int((before > after).sum()), int((before < after).sum())
        fewer, more = (binomtest(turned, len(rows)).proportion_ci(0.975) for turned in (lost, won))
        low, high = more.low - fewer.high, more.high - fewer.low
        table[task] = {"items": len(rows), "source": before.mean(), "model": after.mean(), "low": low, "high": high}
        table[task] |= {"kept": after.mean() / before.mean() if before.any() else float("nan"), "lost": lost, "won": won}
        table[task] |= {"flips": (lost + won) / len(rows), "p": binomtest(won, lost + won).pvalue if lost + won else 1.0}
    return pd.DataFrame(table).T
