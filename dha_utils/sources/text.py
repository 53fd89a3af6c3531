"""Where text comes from: bundled articles and novels, a text or JSONL file, a folder of them, a data set of the hub."""

import bz2
import json
import random
import re
from functools import lru_cache
from textwrap import shorten

import torch

from ..runs import ROOT, find

SPLITS = ("train", "calibration", "validation")


# Of every ten documents, in the order of the source, the first is for validation and the sixth for calibration. Of the
# novels, which the model of this repository was trained on, the fifth and the ninth are for conversions.
_EVERY, _VALIDATION, _CALIBRATION, _CONVERSION = 10, 0, 5, (4, 8)


FILES = (".txt", ".md", ".jsonl")  # of a folder


TABLES = (".csv", ".tsv", ".parquet", ".arrow")


PASSAGE = 4000  # characters


HELD_OUT = slice(3, None, 4)  # of the calibration blocks: those that a refit measures, and does not fit


READ = 4_000_000, 64  # characters: a sample of blocks is taken from so many, or from so many for each of its tokens


def load_text(name="wikipedia", split="validation"):
    """The documents of one split, as a list of strings.

    `name` is `"wikipedia"` (106 English articles that ship inside the gensim package), `"austen"` (the 269 chapters of six
    novels, in this repository), the path of a text file, of a JSONL file with a `text` in each line, or of a folder of
    `.txt`, `.md` and `.jsonl` files, or the name of a data set on the hub (needs internet) with a `text` column. The split
    goes by whole documents (of a text file: by passages of about 4,000 characters) and never changes: 8 in 10 are
    `"train"`, 1 is `"calibration"`, 1 `"validation"`. Of `"austen"`, 6 in 10 are `"pretraining"`, which `austen-mha` was
    trained on, and 2 are `"train"`. Calibrate a conversion on `"train"`: many documents serve unseen text better than as
    many tokens of a few.

    Raises ValueError if the split is unknown, nothing has that name, a file is not UTF-8 or not JSONL, or there is too
    little text to split.
    """
    name = str(name)
    splits = (*SPLITS, "pretraining") if name == "austen" else SPLITS
    if split not in splits:
        raise ValueError(f"there is no split {split!r} of {name!r}: choose one of {', '.join(splits)}")
    documents = _documents(name)
    chosen = [text for i, text in enumerate(documents) if _split_of(i, "pretraining" in splits) == split]
    if not chosen:
        raise ValueError(
            f"the text {name!r} has {len(documents)} documents or passages, too few to split: give at least "
            f"{_EVERY} paragraphs or lines"
        )
    return chosen


def token_blocks(tokenizer, texts, length=512, limit=None):
    """Tokens of `texts`, an end-of-text token after each, cut into blocks that do not overlap: [blocks, length].

    With `limit`, that many blocks, evenly spaced over the whole, so that a small sample still sees every document. Of a
    text much longer than such a sample (`READ`) only passages drawn from all of it, always the same, are read.

    Raises ValueError if the text is shorter than the blocks asked for.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = texts if limit is None else _thinned(texts, max(READ[0], READ[1] * limit * length))
    tokens = [torch.zeros(0, dtype=torch.long)]
    for start in range(0, len(texts), 100):  # the tokens of all as Python's integers would take gigabytes
        encoded = tokenizer(list(texts[start : start + 100]), add_special_tokens=False, verbose=False)["input_ids"]
        tokens.append(torch.tensor([token for document in encoded for token in [*document, *eos]], dtype=torch.long))
    tokens = torch.cat(tokens)
    count = len(tokens) // length
    if count < (limit or 1):
        raise ValueError(
            f"the text has {len(tokens)} tokens, but {limit or 1} block(s) of {length} need {(limit or 1) * length}: "
            "give more text, or fewer or shorter blocks"
        )
    blocks = tokens[: count * length].view(count, length)
    if limit is None:
        return blocks
    return blocks[torch.arange(limit) * count // limit]


def _thinned(texts, characters):
    """`texts`, or if they are longer than so many characters, passages of them: drawn, since a text may have a period."""
    if sum(map(len, texts)) <= characters:
        return texts
    starts = [(index, start) for index, text in enumerate(texts) for start in range(0, len(text), PASSAGE)]
    chosen = []
    for index, start in random.Random(0).sample(starts, len(starts)):
        if characters <= 0:
            break
        chosen.append((index, start))
        characters -= len(texts[index][start : start + PASSAGE])
    return [texts[index][start : start + PASSAGE] for index, start in sorted(chosen)]


def drawn(blocks, count, seed):
    """`count` of the blocks (or all, if there are fewer), drawn by `seed`, in the order of the text."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count].sort().values]


def repeat_passages(blocks, share):
    """`blocks` [blocks, length]; in a `share` of them, drawn (always the same), the second half is the first once more.

    Running text seldom asks a model to find a passage again, and what is seldom asked a fit gives up first: copying is
    where fewer heads lose most (`notebooks/studies/long_context`). Of the blocks that a refit holds out and of the rest,
    each, that share is taken, rounded: with 8 or fewer blocks and a share of 0.25 no held-out block repeats.

    Raises ValueError if `share` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of blocks that repeat themselves is between 0 and 1, not {share}")
    blocks, half, places = blocks.clone(), blocks.shape[1] // 2, range(len(blocks))
    draw = random.Random(0)  # Python's: the first of torch's permutation would be those that a training reads first
    for part in (places[HELD_OUT], sorted({*places} - {*places[HELD_OUT]})):
        chosen = draw.sample(part, round(share * len(part)))
        blocks[chosen, half : 2 * half] = blocks[chosen, :half]
    return blocks


def repeating(blocks):
    """Which of the blocks [blocks, length] say their first half twice: a mask [blocks]."""
    half = blocks.shape[1] // 2
    return (blocks[:, :half] == blocks[:, half : 2 * half]).all(1) & (half > 0)


def _split_of(index, pretraining=False):
    place = index % _EVERY
    rest = "pretraining" if pretraining and place not in _CONVERSION else "train"
    return {_VALIDATION: "validation", _CALIBRATION: "calibration"}.get(place, rest)


def _documents(name):
    if name in BUNDLED:
        return BUNDLED[name]()
    path = find(name)
    inside = path.glob("**/*") if path.is_dir() else [path]
    files = sorted(file for file in inside if file.is_file() and (file.suffix.lower() in FILES or file == path))
    if files:
        texts = [text for file in files for text in _read(file) if text.strip()]
        return texts if len(texts) >= _EVERY else _passages("\n\n".join(texts))
    return _hub(name)


def _read(file):
    """The documents of a file: each line of a JSONL file is one, a text file is one."""
    if file.suffix.lower() in TABLES:
        raise ValueError(f"{file} is a table: give its text as JSONL with a `text` in each line, or as .txt")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() not in (".jsonl", ".json"):
            return [text]
        return ["" + json.loads(line)["text"] for line in text.split("\n") if line.strip()]  # "" + refuses all but strings
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not JSONL with a `text` in each line ({type(error).__name__}: {error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8") from error


@lru_cache(maxsize=1)
def _wikipedia():
    """English Wikipedia as of the dump that gensim ships: articles only (no redirects), mark-up removed."""
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
        from gensim.test.utils import datapath
    except ImportError as error:
        raise ValueError(
            "the text 'wikipedia' is in the package gensim: pip install gensim, or give another text"
        ) from error

    dump = datapath("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    with bz2.open(dump) as file:
        pages = [text for _, text, _ in extract_pages(file, ("0",))]
    articles = (filter_wiki(text) for text in pages if not text.lstrip().lower().startswith("#redirect"))
    tidy = (re.sub(r"\n{3,}", "\n\n", text.strip().strip('"')).strip() for text in articles)
    return [text for text in tidy if text]


@lru_cache(maxsize=1)
def _austen():
    """Chapters of six novels by Jane Austen (`data/pack_austen.py`)."""
    with bz2.open(ROOT / "data" / "austen.jsonl.bz2", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


BUNDLED = {"wikipedia": _wikipedia, "austen": _austen}


def _passages(text):
    """Paragraphs, long ones line by line, gathered into passages of about `PASSAGE`, or shorter where the text is short."""
    size = min(PASSAGE, len(text) // (2 * _EVERY))
    passages = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [paragraph.strip()] if len(paragraph) <= size else paragraph.strip().split("\n")
        for line, end in zip(lines, [*["\n"] * (len(lines) - 1), "\n\n"]):
            if len(passages[-1]) > size:
                passages.append("")
            passages[-1] += line + end
    return [passage for passage in passages if passage.strip()]


@lru_cache(maxsize=2)
def _hub(name):
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train")
        return [text for text in rows["text"] if text and text.strip()]
    except Exception as error:
        raise ValueError(
            f"cannot load text from {name!r}: expected 'wikipedia', 'austen', a text or JSONL file, a folder with .txt, "
            ".md or .jsonl files, or a hub data set with a `text` column "
            f"({type(error).__name__}: {shorten(str(error), 200)})"
        ) from error
