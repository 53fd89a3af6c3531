"""The DHA model under transformers: what it leans on, and every way to run it that the source has.

`make test-versions` runs these tests under the oldest and the newest version that pyproject.toml allows.
"""

import inspect
import tomllib
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import logits, tiny_llama
from packaging.requirements import Requirement
from test_dha import dha
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.trainer_callback import TrainerState

from dha_utils import HeadPlan, fuse
from dha_utils.model.dha import KNOWN_ARGUMENTS, DhaForSequenceClassification, DhaForTokenClassification, DhaModel


def uniform():
    """As many key heads as value heads, the same in both layers: what a static cache can hold."""
    maps = [[0, 1, 0, 1, 1, 0]] * 2
    return dha(key_head_map=maps, value_head_map=maps, key_frequencies=None)


def test_this_version_is_one_that_was_tested():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [wanted] = [line for line in project["dependencies"] if line.startswith("transformers")]
    assert Requirement(wanted).specifier.contains(transformers.__version__)
    assert "<" in wanted


def test_what_is_used_beyond_the_public_interface():
    """Each is used in one place: model/dha.py, refit.after_layer, training.train."""
    layer = tiny_llama(num_attention_heads=4).model.layers[0]
    states = torch.randn(1, 5, 48)
    turns = tiny_llama(num_attention_heads=4).model.rotary_emb(states, torch.arange(5)[None])
    assert isinstance(layer(states, position_embeddings=turns), torch.Tensor), "a decoder layer returns a bare tensor"
    attended = layer.self_attn(hidden_states=states, position_embeddings=turns, attention_mask=None)
    assert isinstance(attended, tuple) and attended[0].shape == states.shape
    names = inspect.signature(type(layer.self_attn).forward).parameters
    assert {"past_key_values", "cache"} & names.keys(), "by one of these names a layer passes the cache"
    assert "lazy_initialization" in vars(StaticLayer) and "keys" in vars(
        DynamicCache(config=layer.self_attn.config).layers[0]
    )
    assert isinstance(TrainerState().stateful_callbacks, dict)
    assert tiny_llama(num_attention_heads=4).config._attn_implementation == "sdpa"


def test_an_unknown_argument_is_refused():
    """5.24 renamed the cache: swallowed in **kwargs, it was lost, and half of the greedy tokens were wrong."""
    attention = dha().model.layers[0].self_attn
    states = torch.randn(1, 1, 48)
    turns = dha().model.rotary_emb(states, torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(TypeError, match=r"does not know the argument\(s\) kv_store: leave them out"):
        attention(states, turns, None, kv_store=DynamicCache())
    assert "past_key_values" not in KNOWN_ARGUMENTS and "cache" not in KNOWN_ARGUMENTS


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_taken_by_both_of_its_names(name):
    attention, cache = dha().model.layers[0].self_attn, DynamicCache()
    states = torch.randn(1, 3, 48)
    attention(states, dha().model.rotary_emb(states, torch.arange(3)[None]), None, **{name: cache})
    assert cache.layers[0].keys.shape == (1, 3, 3, 16) and cache.get_seq_length() == 3


GENERATIONS = {
    "greedy": {},
    "a bare cache": {"cache": lambda model: DynamicCache()},
    "a cache with config": {"cache": lambda model: DynamicCache(config=model.config)},
    "offloaded": {"cache_implementation": "offloaded"},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 10},
    "sampled, several": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.5},
    "contrast of bad words": {"bad_words_ids": [[3], [5]]},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted by itself": {"assistant": True},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", GENERATIONS)
def test_every_way_to_generate_is_that_without_a_cache(mode, backend, blocks):
    settings = dict(GENERATIONS[mode])
    model = uniform() if mode == "static" else dha()
    model.set_attn_implementation(backend)
    one = mode in ("prompt lookup", "assisted by itself", "offloaded")  # these take one sequence, or a device
    prompt = blocks[:1, :7] if one else blocks[:2, :7]
    if mode == "offloaded":
        if not torch.cuda.is_available():
            pytest.skip("offloading needs an accelerator")
        model, prompt = model.to("cuda"), prompt.to("cuda")
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0 if len(prompt) > 1 else 1
    length = {"max_new_tokens": 10, "min_new_tokens": 10, "attention_mask": mask}
    plain = {k: v for k, v in settings.items() if k in ("num_beams", "num_return_sequences", "do_sample", "top_k")}
    plain |= {k: v for k, v in settings.items() if k in ("repetition_penalty", "bad_words_ids")}
    torch.manual_seed(0)
    expected = model.generate(prompt, use_cache=False, **{"do_sample": False} | plain, **length)
    if make := settings.pop("cache", None):
        settings["past_key_values"] = make(model)
    if settings.pop("assistant", None):
        settings["assistant_model"] = model
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, **{"do_sample": False} | settings, **length), expected)


@torch.no_grad()
@pytest.mark.parametrize("form", ["none", "2-D", "boolean", "additive", "additive, per head"])
def test_a_mask_of_every_form_is_read_when_decoding(form):
    attention, cache = dha().model.layers[0].self_attn, DynamicCache()
    states = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
    cos, sin = dha().model.rotary_emb(states, torch.arange(9)[None])
    causal = torch.ones(9, 9, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if form != "none":
        causal[0, :, :, :3] = False
        causal[0, :, range(3), range(3)] = True
    expected = attention(states, (cos, sin), causal)[0][:, -1:]
    attention(states[:, :8], (cos[:, :8], sin[:, :8]), causal[..., :8, :8], past_key_values=cache)
    last = causal[:, :, -1:]
    mask = {
        "none": None,
        "2-D": last[:, 0, 0].long(),
        "boolean": last,
        "additive": torch.zeros(last.shape).masked_fill(~last, torch.finfo(torch.float32).min),
        "additive, per head": torch.zeros(last.shape).masked_fill(~last, -torch.inf).repeat(1, 6, 1, 1),
    }[form]
    got = attention(states[:, 8:], (cos[:, 8:], sin[:, 8:]), mask, past_key_values=cache)[0]
    assert torch.allclose(got, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attentions_are_handed_out_as_the_source_does(backend, mha, blocks):
    fused = fuse(mha, HeadPlan.uniform(mha.config, 2, 1), blocks)
    shapes = []
    for model in (mha, fused):
        model.set_attn_implementation(backend)
        prefill = model(blocks[:, :8], output_attentions=True, use_cache=True)
        step = model(blocks[:, 8:9], past_key_values=prefill.past_key_values, output_attentions=True)
        shapes.append([[None if a is None else a.shape for a in output.attentions] for output in (prefill, step)])
        if backend == "eager":
            assert all(torch.allclose(a.sum(-1), torch.ones(())) for a in step.attentions)
    assert shapes[0] == shapes[1]


def test_continuous_batching_is_refused_in_a_sentence(blocks):
    for model in (dha(), uniform()):
        with pytest.raises(ValueError, match=r"continuous batching \(generate_batch\) has one number of heads .*to_llama"):
            model.generate_batch(blocks[:2, :5].tolist())


def test_the_config_says_what_the_cache_holds():
    assert uniform().config.num_key_value_heads == 2 and uniform().config.source_num_key_value_heads == 3
    assert dha().config.num_key_value_heads == 4 and uniform().config.budget == pytest.approx(2 / 3)
    again = type(dha().config).from_dict(uniform().config.to_dict())
    assert again.budget == uniform().config.budget and again.num_key_value_heads == 2


@torch.no_grad()
def test_other_auto_classes_load_it(blocks, tmp_path):
    model = dha()
    model.save_pretrained(tmp_path)
    expected = model.model(blocks).last_hidden_state
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is DhaModel and torch.equal(base(blocks).last_hidden_state, expected)
    for auto, own, shape in (
        (AutoModelForSequenceClassification, DhaForSequenceClassification, (6, 3)),
        (AutoModelForTokenClassification, DhaForTokenClassification, (6, 32, 3)),
    ):
        classifier = auto.from_pretrained(tmp_path, num_labels=3)
        assert type(classifier) is own and classifier(blocks).logits.shape == shape
        assert torch.equal(classifier.model(blocks).last_hidden_state, expected)


@pytest.mark.parametrize(
    "method",
    [
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda method: str(method.peft_type.value),
)
def test_peft_trains_and_generates(method, blocks):
    model = peft.get_peft_model(dha(), method)
    model(blocks, labels=blocks).loss.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    prompt = blocks[:1, :6]
    written = model.eval().generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4
    )
    assert written.shape[1] == 10


def test_prefix_tuning_is_refused_where_heads_differ(blocks):
    method = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="the cache holds 4 key heads in layer 0, this layer 3: prefix tuning"):
        peft.get_peft_model(dha(), method)(blocks)
    tuned = peft.get_peft_model(uniform(), method)
    tuned(blocks, labels=blocks).loss.backward()
    assert logits(tuned, blocks).isfinite().all()
