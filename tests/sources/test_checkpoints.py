"""Where models come from and go to, and what is said when they do not."""

import json
import shutil

import pytest
import torch
from conftest import half_plan, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dha_utils import (
    HeadPlan,
    cache_bytes,
    fuse,
    load_checkpoint,
    plan_heads,
    save_checkpoint,
)
from dha_utils.compare.cost import bytes_per_token
from dha_utils.fuse.refit import refit
from dha_utils.measure.perplexity import perplexity
from dha_utils.runs import write_whole
from dha_utils.sources import checkpoints
from dha_utils.sources.precision import served_dtype


@pytest.fixture
def fused(mha, blocks):
    return fuse(mha, HeadPlan.uniform(mha.config, 2, 1), blocks)


@pytest.fixture(scope="module")
def tokenizer():
    return load_checkpoint("austen-mha")[1]


def test_austen_mha_is_a_multi_head_llama():
    model, tokenizer = load_checkpoint("austen-mha")
    config = model.config
    assert config.num_key_value_heads == config.num_attention_heads == 8 and config.tie_word_embeddings
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.decode(tokenizer("Étude № 7 — naïve")["input_ids"]) == "Étude № 7 — naïve"


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
        load_checkpoint("austen-mha")


def test_unknown_and_foreign_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint 'no-such-model'"):
        load_checkpoint("no-such-model")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'gpt2' model: supported are LLaMA 1 to 3"):
        load_checkpoint(tmp_path)


def test_a_folder_is_loaded(tmp_path):
    model = tiny_llama(vocab_size=4096, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    model.save_pretrained(tmp_path)
    load_checkpoint("austen-mha")[1].save_pretrained(tmp_path)
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
    load_checkpoint("austen-mha")[1].save_pretrained(tmp_path)
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


def test_a_model_is_replaced_whole(fused, tmp_path):
    class Tokenizer:
        def save_pretrained(self, path):
            (path / "tokenizer.json").write_text("{}")

    for _ in range(2):
        save_checkpoint(fused, Tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.rmtree(tmp_path / "model")


def test_a_checkpoint_keeps_its_dtype(blocks, tmp_path):
    model = tiny_llama(vocab_size=4096, num_attention_heads=6, num_key_value_heads=6, head_dim=8)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    load_checkpoint("austen-mha")[1].save_pretrained(tmp_path / "source")
    source, tokenizer = load_checkpoint(tmp_path / "source")
    assert source.dtype == torch.float32 and served_dtype(source) == torch.bfloat16
    own = bytes_per_token(source)
    assert own == 2 * 3 * 6 * 8 * 2 and cache_bytes(source, 1) == 2 * own  # it computes in float32 here
    assert plan_heads(source, blocks, cache_bytes=own, allocation="uniform").budget == 1.0
    assert plan_heads(source, blocks, cache_bytes=own // 2, allocation="uniform").budget == 0.5
    with pytest.raises(ValueError, match="in each of 3 layers take 96 in bfloat16"):
        plan_heads(source, blocks, cache_bytes=95)
    fused = fuse(source, HeadPlan.uniform(source.config, 3, 3), blocks)
    for model in (fused, refit(fused, source, blocks)[0]):
        save_checkpoint(model, tokenizer, tmp_path / "fused")
        again, own_tokenizer = load_checkpoint(tmp_path / "fused", dtype="auto")
        assert again.dtype == torch.bfloat16 and again.config.dtype == torch.bfloat16
        assert model.dtype == torch.float32 and bytes_per_token(again) == bytes_per_token(model) == own / 2
        assert own_tokenizer("a word")["input_ids"] == tokenizer("a word")["input_ids"]
        assert perplexity(again, blocks) == pytest.approx(perplexity(model, blocks), rel=0.01)
    assert (tmp_path / "fused" / "model.safetensors").stat().st_size < (
        tmp_path / "source" / "model.safetensors"
    ).stat().st_size
    save_checkpoint(fused, tokenizer, tmp_path / "told", dtype=torch.float32)
    assert load_checkpoint(tmp_path / "told", dtype="auto")[0].dtype == torch.float32
    assert load_checkpoint(tmp_path / "told", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_folder_of_something_else_is_not_replaced(mha, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis is there and holds other things than a llama checkpoint"):
        save_checkpoint(mha, load_checkpoint("austen-mha")[1], tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_source_is_not_replaced_by_what_is_made_of_it(mha, blocks, tmp_path):
    tokenizer = load_checkpoint("austen-mha")[1]
    save_checkpoint(mha, tokenizer, tmp_path / "model")
    fused = fuse(mha, half_plan(mha), blocks)
    with pytest.raises(ValueError, match="holds other things than a dha checkpoint: choose another folder"):
        save_checkpoint(fused, tokenizer, tmp_path / "model")
    write_whole(tmp_path / "model" / "thesis.txt", "years of work")
    with pytest.raises(ValueError, match="holds other things than a llama checkpoint"):
        save_checkpoint(mha, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "thesis.txt").unlink()
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two renames
    save_checkpoint(mha, tokenizer, tmp_path / "model", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(mha, tokenizer, tmp_path / "empty")
    write_whole(tmp_path / "file", "precious")
    with pytest.raises(ValueError, match="holds other things than a llama checkpoint"):
        save_checkpoint(mha, tokenizer, tmp_path / "file")
    with pytest.raises(ValueError, match="the dtype must be one of float32, bfloat16, float16, not 'fp16'"):
        load_checkpoint("austen-mha", dtype="fp16")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.float16


def test_the_dtype_is_that_of_the_weights_where_the_config_has_none(tmp_path):
    model = tiny_llama(vocab_size=4096, num_attention_heads=4).to(torch.bfloat16)
    save_checkpoint(model, load_checkpoint("austen-mha")[1], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    write_whole(tmp_path / "model" / "config.json", json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    loaded, _ = load_checkpoint(tmp_path / "model")
    assert served_dtype(loaded) == torch.bfloat16 and loaded.dtype == torch.float32
