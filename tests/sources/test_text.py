"""Where text comes from, and what is said when it does not."""

import json
import re
from pathlib import Path

import pytest
import torch

from dha_utils import load_checkpoint, load_text, repeat_passages, token_blocks
from dha_utils.sources.text import HELD_OUT, SPLITS, repeating


@pytest.fixture(scope="module")
def tokenizer():
    return load_checkpoint("austen-mha")[1]


def test_wikipedia_splits_are_fixed_and_apart():
    splits = {split: load_text("wikipedia", split) for split in SPLITS}
    assert [len(texts) for texts in splits.values()] == [84, 11, 11]
    assert splits["validation"][0].startswith("'''Anarchism''' is a political philosophy")
    assert len(set().union(*splits.values())) == 106
    assert not any("#redirect" in text[:20].lower() for texts in splits.values() for text in texts)


def test_the_model_of_the_repository_has_a_split_of_its_own():
    splits = {split: load_text("austen", split) for split in (*SPLITS, "pretraining")}
    assert [len(texts) for texts in splits.values()] == [54, 27, 27, 161]
    assert len(set().union(*splits.values())) == 269
    assert splits["validation"][0].startswith("The family of Dashwood had long been settled in Sussex.")
    assert load_text(Path("austen"), "train") == splits["train"]
    with pytest.raises(ValueError, match="there is no split 'pretraining' of 'wikipedia': choose one of train"):
        load_text("wikipedia", "pretraining")


def test_blocks_do_not_overlap_and_a_sample_is_spread(tokenizer):
    texts = ["one two three " * 40, "four five six " * 40]
    blocks = token_blocks(tokenizer, texts, length=16)
    flat = [t for text in texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert blocks.flatten().tolist() == flat[: blocks.numel()]
    sample = token_blocks(tokenizer, texts, length=16, limit=4)
    assert torch.equal(sample, blocks[[0, len(blocks) // 4, len(blocks) // 2, len(blocks) * 3 // 4]])


@pytest.mark.parametrize("length", [16, 17])
def test_some_blocks_repeat_their_first_half(length):
    blocks = torch.arange(16 * length).view(16, length)
    before, repeated, half = blocks.clone(), repeat_passages(blocks, 0.25), length // 2
    assert torch.equal(blocks, before) and torch.equal(repeat_passages(blocks, 0), blocks)
    changed = (repeated != blocks).any(1)
    assert torch.equal(changed, repeating(repeated)) and not repeating(blocks).any() and not repeating(blocks[:, :1]).any()
    assert changed.sum() == 4 and changed[HELD_OUT].sum() == 1, "of the blocks that a refit measures as well"
    assert torch.equal(repeated[changed, half : 2 * half], blocks[changed, :half])
    assert torch.equal(repeated[:, :half], blocks[:, :half]) and torch.equal(repeated[:, 2 * half :], blocks[:, 2 * half :])
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        repeat_passages(blocks, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_reads_its_share_of_repeating_blocks_from_its_beginning(seed):
    """They were the first of the permutation that the sampler of the trainer also makes: it read nothing else."""
    blocks = repeat_passages(torch.arange(8192).view(1024, 8), 0.25)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(seed))
    assert repeating(blocks[order[:256]]).float().mean().item() == pytest.approx(0.25, abs=0.06)


def test_text_files_and_folders(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "words " * 60 for i in range(40)]
    (tmp_path / "one.txt").write_text("\n\n".join(paragraphs))
    for path in (tmp_path, tmp_path / "one.txt"):
        splits = [load_text(str(path), split) for split in SPLITS]
        together = "".join(text for texts in splits for text in texts)
        assert all(splits) and all(f"Paragraph {i}." in together for i in range(40))
        assert len(together) < 1.1 * sum(map(len, paragraphs))


def test_lines_without_blank_lines_are_passages(tmp_path):
    sentences = [f"Sentence {i} of many, one a line." for i in range(500)]
    (tmp_path / "lines.txt").write_text("A title\n\n" + "\n".join(sentences))
    splits = [load_text(tmp_path / "lines.txt", split) for split in SPLITS]
    together = "".join(text for texts in splits for text in texts)
    assert all(splits) and all(together.count(sentence) == 1 for sentence in sentences)


def test_jsonl_and_markdown(tmp_path):
    texts = [f"Document {i}.\u2028Its second line" for i in range(30)]
    (tmp_path / "many.jsonl").write_text(
        "\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts)
    )
    assert sum((load_text(tmp_path / "many.jsonl", split) for split in SPLITS), []) == [
        *(text for i, text in enumerate(texts) if i % 10 not in (0, 5)),
        *texts[5::10],
        *texts[0::10],
    ]
    (tmp_path / "notes").mkdir()
    for i in range(12):
        (tmp_path / "notes" / f"{i:02d}.md").write_text(f"# Note {i}")
    assert load_text(tmp_path / "notes", "validation") == ["# Note 0", "# Note 10"]
    for line in ('{"content": "no text"}', '{"text": null}', '["text"]', "plain words"):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(ValueError, match="bad.jsonl is not JSONL with a `text` in each line"):
            load_text(tmp_path / "bad.jsonl")


def test_what_is_no_text_is_refused_or_left_out(tmp_path):
    rows = [{"text": f"Row {i}"} for i in range(20)] + [{"text": ""}, {"text": " "}]
    (tmp_path / "rows.JSON").write_text("\n".join(map(json.dumps, rows)))
    assert sum(len(load_text(tmp_path / "rows.JSON", split)) for split in SPLITS) == 20
    (tmp_path / "table.csv").write_text("id,text\n1,words")
    with pytest.raises(ValueError, match="table.csv is a table: give its text as JSONL"):
        load_text(tmp_path / "table.csv")
    (tmp_path / "folder" / "looks-like.txt").mkdir(parents=True)
    (tmp_path / "folder" / "UPPER.TXT").write_text("\n\n".join(["Some words"] * 30))
    assert load_text(tmp_path / "folder", "train")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "marked.txt").write_text("\n\n".join(["First words"] * 30), encoding="utf-8-sig")
    assert load_text(tmp_path / "marked.txt", "validation")[0].startswith("First")


def test_text_is_known_by_content_not_by_name(tmp_path, monkeypatch):
    found = []
    for folder, word in (("one", "old "), ("one", "new "), ("other", "far ")):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        (tmp_path / folder / "text.txt").write_text("\n\n".join([word * 30] * 40))
        found.append(load_text("text.txt")[0][:4])
    assert found == ["old ", "new ", "far "]


def test_of_a_long_text_a_sample_reads_what_it_needs(tokenizer, monkeypatch):
    texts = [f"word{i} " * 50 if i % 8 else f"odd{i} " * 50 for i in range(400)]  # with a period
    read = []

    def count(texts, **settings):
        read.append(sum(map(len, texts)))
        return tokenizer(texts, **settings)

    count.eos_token_id = tokenizer.eos_token_id
    whole = token_blocks(count, texts, 16, 8)
    monkeypatch.setattr("dha_utils.sources.text.READ", (2000, 64))
    sample = token_blocks(count, texts, 16, 8)
    assert sum(read[-1:]) <= 1.1 * 64 * 8 * 16 < 0.1 * sum(read[:-1]) and sample.shape == whole.shape
    shown = [int(number) for number in re.findall(r"word(\d+)", tokenizer.decode(sample.flatten()))]
    assert min(shown) < 100 and max(shown) > 300, "from the whole of it"
    assert len({number % 8 for number in shown}) > 3, "whatever the period of the text"


def test_bad_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no split 'test'"):
        load_text("wikipedia", "test")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="too few to split"):
        load_text(str(tmp_path / "empty.txt"), "train")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(invalid continuation byte at byte 1\)"):
        load_text(str(tmp_path / "latin.txt"), "train")
    with pytest.raises(ValueError, match=r"tokens, but 3 block\(s\) of 512 need 1536: give more text"):
        token_blocks(tokenizer, ["a short text"], length=512, limit=3)


def test_unknown_text_is_refused():
    with pytest.raises(ValueError, match="cannot load text from 'no/such-text': expected 'wikipedia', 'austen'"):
        load_text("no/such-text")
