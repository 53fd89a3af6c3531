"""The conversion layer by layer: that of a model in memory, to the bit, killed or not; refused in one sentence."""

import json
import shutil
from importlib import import_module

import pandas as pd
import pytest
import torch
from conftest import SHAPES, logits, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dha_utils import HeadPlan, convert, fuse, load_checkpoint, load_text, perplexity, refit, save_checkpoint, token_blocks
from dha_utils.__main__ import main
from dha_utils.convert import conversion_errors
from dha_utils.measure.stream import each_layer
from dha_utils.sources.precision import cast_weights
from dha_utils.sources.shards import open_checkpoint

WALK = import_module("dha_utils.measure.walk")


@pytest.fixture(scope="module")
def tokenizer():
    return load_checkpoint("austen-mha")[1]


@pytest.fixture(params=SHAPES)
def checkpoint(request, tmp_path, tokenizer):
    """A folder of several shards, with a licence."""
    model = tiny_llama(**SHAPES[request.param] | {"vocab_size": 4096})
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    return tmp_path / "source"


def killed(*_):
    raise KeyboardInterrupt


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_layers_read_one_at_a_time_are_those_of_the_model(checkpoint):
    model, whole = open_checkpoint(checkpoint, "cpu")[0], load_checkpoint(checkpoint)[0]
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    for index, layer in each_layer(model):
        expected = whole.model.layers[index].state_dict()
        assert layer.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in layer.state_dict().items())
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


def test_a_conversion_is_fusion_and_refit_in_memory(checkpoint, blocks, tmp_path):
    source, _ = load_checkpoint(checkpoint)
    plan = HeadPlan.uniform(source.config, 2, 1)
    out = convert(checkpoint, blocks, tmp_path / "out", plan=plan, device="cpu", validation=blocks[:2], text="random")
    expected, errors = refit(fuse(source, plan, blocks), source, blocks)
    converted, _ = load_checkpoint(out)
    assert torch.allclose(logits(converted, blocks), logits(expected, blocks), atol=1e-4)
    pd.testing.assert_frame_equal(conversion_errors(out), errors, rtol=1e-2)
    record = json.loads((out / "conversion.json").read_text())
    assert torch.tensor(record["losses"]["fused"]).mean().exp().item() == pytest.approx(
        perplexity(converted, blocks[:2]), 1e-4
    )
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "192 tokens of random" in card and str(tmp_path) not in card
    assert converted.config.budget == plan.budget and f"{plan.budget:.1%} of the source's" in card


def test_a_model_in_memory_is_the_same_walk(checkpoint, blocks, tmp_path, tokenizer):
    folders = [
        convert(source, blocks, tmp_path / name, 0.5, device="cpu", tokenizer=tokenizer)
        for name, source in (("read", checkpoint), ("loaded", load_checkpoint(checkpoint)[0]))
    ]
    assert contents(folders[0]) == contents(folders[1])
    assert (folders[1] / "tokenizer.json").is_file()


@pytest.mark.parametrize("target", [{"budget": 0.5}, {"max_increase": 0.2}])
@pytest.mark.parametrize("count", [1, 2, 4, 6])  # of three layers, priced and then converted
def test_a_killed_conversion_goes_on_to_the_same_bits(count, target, mha, blocks, tmp_path, tokenizer, monkeypatch):
    mha.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    monkeypatch.setattr("dha_utils.sources.checkpoints.load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr("dha_utils.sources.shards.load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(WALK, "SAVE_SECONDS", 0)
    whole = convert(tmp_path / "source", blocks, tmp_path / "whole", **target, device="cpu", validation=blocks[:2])
    layers, add = [], WALK.Walk.add

    def counted(walk, row, streams):
        add(walk, row, streams)
        layers.append(walk.file.name)
        if len(layers) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(WALK.Walk, "add", counted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", blocks, tmp_path / "out", **target, device="cpu", validation=blocks[:2])
    assert not (tmp_path / "out").exists()
    out = convert(tmp_path / "source", blocks, tmp_path / "out", **target, device="cpu", validation=blocks[:2])
    assert len(layers) == 6, "no layer is done twice"
    assert contents(out) == contents(whole)
    assert (out / "README.md").read_text() == (whole / "README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert(tmp_path / "source", blocks, tmp_path / "out", **target, device="cpu", validation=blocks[:2]) == out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}, "what is done is not done again"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_conversion_killed_at_the_end_is_not_taken_for_another(count, checkpoint, blocks, tmp_path, monkeypatch):
    """Killed in `finish`, before each of its last steps; then begun again, and with another request."""
    module, steps = import_module("dha_utils.convert"), []

    def dying(function):
        def run(*arguments, **named):
            steps.append(function)
            if len(steps) > count:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return run

    request = {"budget": 0.5, "device": "cpu", "refit": False}
    whole = convert(checkpoint, blocks, tmp_path / "whole", **request)
    with monkeypatch.context() as patch:
        for name in ("write_index", "model_card", "put_in_place"):
            patch.setattr(module, name, dying(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint, blocks, tmp_path / "out", **request)
    with pytest.raises(ValueError, match="unfinished conversion with another budget"):
        convert(checkpoint, blocks, tmp_path / "out", **request | {"budget": 1})
    out = convert(checkpoint, blocks, tmp_path / "out", **request)
    assert contents(out) == contents(whole) and {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_every_head_kept_is_the_source_in_its_dtype(checkpoint, blocks, tmp_path):
    source, tokenizer = load_checkpoint(checkpoint)
    save_checkpoint(source, tokenizer, tmp_path / "low", dtype=torch.bfloat16)
    low = load_checkpoint(tmp_path / "low")[0]
    out = convert(tmp_path / "low", blocks, tmp_path / "out", budget=1, device="cpu")
    assert {weight.dtype for file in out.glob("*.safetensors") for weight in load_file(file).values()} == {torch.bfloat16}
    assert torch.allclose(logits(load_checkpoint(out)[0], blocks), logits(low, blocks), atol=1e-5)


@pytest.mark.parametrize("change", ["eager", "bfloat16", "float16", "training", "frozen"])
def test_the_state_of_a_model_in_memory_has_no_influence(change, blocks, tmp_path):
    """Its backend, mode and flags change nothing; of a low-precision one the weights count, not the arithmetic."""
    expected, model = (tiny_llama(num_attention_heads=4, attention_dropout=0.3) for _ in range(2))
    if change in ("bfloat16", "float16"):
        cast_weights(model, getattr(torch, change))
        expected.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    elif change == "eager":
        model.set_attn_implementation("eager")
    else:
        model.train() if change == "training" else model.requires_grad_(False)
    folders = [
        convert(source, blocks, tmp_path / name, 0.5, dtype="float32", validation=blocks[:2])
        for name, source in (("expected", expected), (change, model))
    ]
    assert contents(folders[0]) == contents(folders[1])
    first, second = (json.loads((folder / "conversion.json").read_text()) for folder in folders)
    assert first["losses"] == second["losses"] and first["layers"] == second["layers"]
    converted = AutoModelForCausalLM.from_pretrained(folders[1])
    assert torch.tensor(second["losses"]["fused"]).mean().exp().item() == pytest.approx(
        perplexity(converted, blocks[:2]), 1e-4
    )


def test_what_a_conversion_depends_on_names_it(checkpoint, blocks, tmp_path, tokenizer):
    convert(checkpoint, blocks, tmp_path / "out", 0.5, device="cpu", refit=False)
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-2}))
    with pytest.raises(ValueError, match="holds something else than this conversion"):
        convert(checkpoint, blocks, tmp_path / "out", 0.5, device="cpu", refit=False)
    model, _ = load_checkpoint(checkpoint)
    convert(model, blocks, tmp_path / "bare", 0.5, refit=False)
    with pytest.raises(ValueError, match="holds something else than this conversion"):
        convert(model, blocks, tmp_path / "bare", 0.5, refit=False, tokenizer=tokenizer)


def test_validation_of_another_length_changes_no_weight(blocks, tmp_path):
    """RoPE of this kind has other frequencies for long texts."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    model = tiny_llama(**SHAPES["mha"], rope_parameters=rope)
    folders = [
        convert(model, blocks, tmp_path / name, 0.5, validation=validation)
        for name, validation in (("none", None), ("short", blocks[:, :9]))
    ]
    assert contents(folders[0]) == contents(folders[1])
    plan = HeadPlan(**json.loads((folders[0] / "conversion.json").read_text())["plan"])
    expected, _ = refit(fuse(model, plan, blocks), model, blocks)
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(folders[0]), blocks), logits(expected, blocks), atol=1e-3
    )


def test_weights_that_overflow_are_refused(blocks, tmp_path):
    model = tiny_llama(num_attention_heads=4)
    model.model.layers[1].input_layernorm.weight.data[0] = 1e5
    with pytest.raises(ValueError, match="layers.1.input_layernorm.weight is not finite in float16: choose float32 or"):
        convert(model, blocks, tmp_path / "out", plan=HeadPlan.uniform(model.config, 2, 2), dtype="float16", refit=False)


def test_a_finished_or_foreign_folder_is_not_touched(checkpoint, blocks, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than this conversion: choose another folder"):
        convert(checkpoint, blocks, tmp_path / "out", 0.5, device="cpu")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    convert(checkpoint, blocks, tmp_path / "half", 0.5, device="cpu", refit=False)
    for change in ({"budget": 0.75}, {"budget": 0.5, "seed": 1}, {"budget": 0.5, "dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="holds something else than this conversion"):
            convert(checkpoint, blocks, tmp_path / "half", device="cpu", refit=False, **change)


def test_another_conversion_is_replaced_if_it_may_be(checkpoint, blocks, tmp_path, monkeypatch):
    def made(budget):
        return convert(checkpoint, blocks, tmp_path / "out", budget, device="cpu", refit=False, replace=True)

    made(0.5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(import_module("dha_utils.convert"), "finish", killed)
        made(0.75)
    assert load_checkpoint(tmp_path / "out")[0].config.budget == 0.5, "as long as the new one is not whole"
    assert load_checkpoint(made(1))[0].config.budget == 1
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than this conversion"):
        made(0.5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_another_unfinished_conversion_is_not_touched(checkpoint, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(WALK, "SAVE_SECONDS", 0)
    monkeypatch.setattr(import_module("dha_utils.convert"), "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, blocks, tmp_path / "out", 0.5, device="cpu", refit=False)
    with pytest.raises(
        ValueError,
        match="with another budget, calibration_tokens, text_content: delete it, or choose",
    ):
        convert(checkpoint, blocks[:5], tmp_path / "out", 0.75, device="cpu", refit=False)


def test_bad_requests_are_one_sentence_before_the_first_layer(checkpoint, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(WALK, "SAVE_SECONDS", 0)

    def refused(match, source=checkpoint, text=blocks, **request):
        with pytest.raises(ValueError, match=match):
            convert(source, text, tmp_path / "out", device=request.pop("device", "cpu"), **request)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.converting" / "pricing.safetensors").exists()

    refused("give one of budget, cache_bytes, max_increase and plan, not none")
    refused("not budget and cache_bytes", budget=0.5, cache_bytes=1000)
    refused("needs at least 4 calibration blocks, not 3", text=blocks[:3], budget=0.5)
    refused("the smallest budget for this model", budget=0.01)
    refused("share above 0, not -1", max_increase=-1)
    refused("blocks have token 5000, the model knows 4096", text=blocks + 5000 - blocks, budget=0.5)
    refused("must be whole numbers", text=blocks.float(), budget=0.5)
    refused("exceed the context of 128", text=blocks.repeat(1, 5), budget=0.5)
    refused("the plan is for 1 layers", plan=HeadPlan([[[0], [1]]], [[[0], [1]]]))
    refused("dtype must be one of", budget=0.5, dtype="int8")
    refused("this machine has no device 'cuda:7'", budget=0.5, device="cuda:7")
    refused("there is no checkpoint", source=tmp_path / "nothing", budget=0.5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    refused(r"may take 0.0 GB of disk at .*, where 0.0 GB are free", budget=0.5)


def test_damaged_shards_are_one_sentence(checkpoint, blocks, tmp_path):
    shards = sorted(checkpoint.glob("*.safetensors"))
    layer = next(file for file in shards if any(".layers.2.mlp" in name for name in load_file(file)))
    whole = layer.read_bytes()
    layer.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be loaded .*expected whole safetensors weights"):
        convert(checkpoint, blocks, tmp_path / "out", 0.5, device="cpu")
    layer.unlink()
    with pytest.raises(ValueError, match="cannot be loaded .*expected whole safetensors weights"):
        convert(checkpoint, blocks, tmp_path / "out", 0.5, device="cpu")
    layer.write_bytes(whole)
    weights = load_file(layer)
    name = next(name for name in weights if ".layers.2." in name)
    weights[name].flatten()[0] = torch.inf
    save_file(weights, layer, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} of .* is not finite: the checkpoint has NaN or infinite weights"):
        convert(checkpoint, blocks, tmp_path / "out", 0.5, device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_command_converts_and_refuses_in_one_sentence(checkpoint, tmp_path, capsys):
    sizes = ["--length", "32", "--calibration-blocks", "4", "--validation-blocks", "2", "--device", "cpu"]
    command = ["convert", "--model", str(checkpoint), "--out", str(tmp_path / "out"), *sizes]
    main([*command, "--budget", "0.75", "--no-refit", "--dtype", "bfloat16", "--repeated", "0.5"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    converted, _ = load_checkpoint(tmp_path / "out", "auto")
    assert converted.config.budget == pytest.approx(0.75, abs=0.05) and converted.dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "128 tokens of wikipedia, in blocks of 32 (blocks that say their first half twice: 2);" in card
    for wrong, match in (
        (["--budget", "0.75"], "error: .* is there and holds something else than this conversion"),
        (["--plan", str(tmp_path / "none.json")], "error: there is no head plan in .*none.json"),
        (["--budget", "0.5", "--repeated", "2"], "error: repeated must be a share from 0 to 1"),
        (["--budget", "2"], "error: budget must be a number above 0 and at most 1"),
        (["--cache-bytes", "1"], "error: a cache of 1 bytes a token is too small"),
        (["--budget", "0.5", "--length", "4096"], "error: length must be at most the model's context, 128"),
    ):
        with pytest.raises(SystemExit, match=match):
            main([*command, *wrong])
    HeadPlan.uniform(converted.config, 1, 1).save(tmp_path / "plan.json")
    with pytest.raises(SystemExit):  # argparse: two targets
        main([*command, "--budget", "0.5", "--plan", str(tmp_path / "plan.json")])
    assert "not allowed with argument" in capsys.readouterr().err


def test_in_bfloat16_a_converted_model_is_as_good_as_in_float32(tmp_path):
    _, tokenizer = load_checkpoint("austen-mha")
    blocks, unseen = (token_blocks(tokenizer, load_text("austen", split), 128, 8) for split in ("train", "validation"))
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = convert("austen-mha", blocks, tmp_path / dtype, 0.5, dtype=dtype, device="cpu")
        found[dtype] = perplexity(load_checkpoint(out, dtype)[0], unseen)
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.01)
