"""Where the text comes from: bundled Wikipedia, a `.txt` file or folder, or a data set of the hub."""

import bz2
import re
from functools import lru_cache
from pathlib import Path
from textwrap import shorten

import torch

SPLITS = ("train", "calibration", "validation")
# Of every ten documents, in the order of the source, the first is for validation and the sixth for calibration.
_EVERY, _VALIDATION, _CALIBRATION = 10, 0, 5


def load_text(name="wikipedia", split="validation"):
    """The documents of one split, as a list of strings.

    `name` is `"wikipedia"` (106 English articles that ship inside the gensim package), the path of a `.txt` file or
    of a folder of them, or the name of a data set on the hub (needs internet) with a `text` column. The split goes
    by whole documents and never changes: 8 in 10 are `"train"`, 1 is `"calibration"`, 1 `"validation"`. Calibrate a
    conversion on `"train"`: many documents serve unseen text better than as many tokens of a few.

    Raises ValueError if the split is unknown, nothing has that name, a file is not UTF-8, or there is too
    little text to split.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
    documents = _documents(str(name))
    chosen = [text for i, text in enumerate(documents) if _split_of(i) == split]
    if not chosen:
        raise ValueError(
            f"the text {str(name)!r} has {len(documents)} documents or passages, too few to split: give at least "
            f"{_EVERY} paragraphs separated by blank lines"
        )
    return chosen


def token_blocks(tokenizer, texts, length=512, limit=None):
    """Tokens of `texts`, an end-of-text token after each, cut into blocks that do not overlap: [blocks, length].

    With `limit`, that many blocks, evenly spaced over the whole, so that a small sample still sees every document.

    Raises ValueError if the text is shorter than the blocks asked for.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in [*document, *eos]])
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


def drawn(blocks, count, seed):
    """`count` of the blocks (or all, if there are fewer), drawn by `seed`, in the order of the text."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count].sort().values]


def _split_of(index):
    return {_VALIDATION: "validation", _CALIBRATION: "calibration"}.get(index % _EVERY, "train")


@lru_cache(maxsize=2)
def _documents(name):
    if name == "wikipedia":
        return _wikipedia()
    path = Path(name)
    if path.is_dir() and (files := sorted(path.glob("**/*.txt"))):
        texts = [_read(file) for file in files]
        return texts if len(texts) >= _EVERY else _passages("\n\n".join(texts))
    if path.is_file():
        return _passages(_read(path))
    return _hub(name)


def _read(file):
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8") from error


def _wikipedia():
    """English Wikipedia as of the dump that gensim ships: articles only (no redirects), mark-up removed."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    from gensim.test.utils import datapath

    dump = datapath("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    with bz2.open(dump) as file:
        pages = [text for _, text, _ in extract_pages(file, ("0",))]
    articles = (filter_wiki(text) for text in pages if not text.lstrip().lower().startswith("#redirect"))
    tidy = (re.sub(r"\n{3,}", "\n\n", text.strip().strip('"')).strip() for text in articles)
    return [text for text in tidy if text]


def _passages(text, characters=4000):
    """Whole paragraphs, gathered into passages of about `characters`, or shorter ones where the text is short."""
    size = min(characters, len(text) // (2 * _EVERY))
    passages = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if len(passages[-1]) > size:
            passages.append("")
        passages[-1] += paragraph.strip() + "\n\n"
    return [passage for passage in passages if passage.strip()]


def _hub(name):
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
        return [text for text in rows["text"] if text.strip()]
    except Exception as error:
        raise ValueError(
            f"cannot load text from {name!r}: expected 'wikipedia', a .txt file, a folder with .txt files, or a hub "
            f"data set with a `text` column ({type(error).__name__}: {shorten(str(error), 200)})"
        ) from error
