"""The parameters that the notebooks and `make run` share: looked at before anything is computed, then loaded."""

from pathlib import Path

from .compare.drift import document_blocks
from .compare.monitor import FEWEST
from .compare.tasks import paper_tasks, text_items
from .fuse.model import METHODS
from .plan.allocate import budget_for_cache, heads_for_budget
from .recover.pretrain import TRAINABLE
from .runs import MADE_BY, check_run, fingerprint, require, write_run
from .sources.checkpoints import find_checkpoint, load_checkpoint
from .sources.families import check_source
from .sources.precision import DTYPES, dtype_name, pick_device, served_dtype
from .sources.text import SPLITS, load_text, repeat_passages, token_blocks


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def is_share(value):
    return is_number(value) and 0 < value <= 1


def whole(least):
    return f"a whole number, at least {least}", lambda value: type(value) is int and value >= least


def one_of(names):
    return f"one of {', '.join(names)}", lambda value: value in names


def optional(rule):
    return f"{rule[0]}, or None", lambda value: value is None or rule[1](value)


NAME = "a name or a path, in quotes", lambda value: isinstance(value, str | Path) and str(value).strip() != ""
POSITIVE = "a number above 0", lambda value: is_number(value) and value > 0
LIMIT = "a share from 0 to 1 (0.15 for 15 %)", lambda value: is_number(value) and 0 <= value <= 1
RULES = {  # the rule of each parameter: in words, and as a test
    "model": NAME,
    "text": NAME,
    "run_dir": NAME,
    "budget": ("a number above 0 and at most 1, the share of the heads to keep", is_share),
    "budgets": (
        "a list of numbers above 0 and at most 1",
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(is_share, value)),
    ),
    "cache_bytes": optional(whole(1)),
    "max_increase": optional(POSITIVE),
    "method": one_of(METHODS),
    "trainable": one_of(TRAINABLE),
    "device": optional(NAME),
    "dtype": optional(one_of(DTYPES)),
    "seed": ("a whole number from 0 to 4294967295", lambda value: type(value) is int and 0 <= value < 2**32),
    "length": whole(16),
    "calibration_blocks": whole(4),
    "repeated": LIMIT,
    "validation_blocks": whole(1),
    "search_steps": whole(1),
    "fusion_tokens": whole(1),
    "tokens": whole(1),
    "evaluations": whole(1),
    "context": whole(1),
    "batch_size": whole(1),
    "checkpoint": NAME,
    "other_text": NAME,
    "documents": whole(2),
    "items": whole(1),
    "task_folder": optional(NAME),
    "prompts": (
        "a list of texts to go on from",
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(p, str) and p for p in value),
    ),
    "accelerators": (
        "a dictionary, name: [memory in GB, bandwidth in GB/s, price an hour]",
        lambda value: (
            isinstance(value, dict)
            and len(value) > 0
            and all(
                isinstance(v, list | tuple) and len(v) == 3 and all(is_number(x) and x > 0 for x in v)
                for v in value.values()
            )
        ),
    ),
    "largest_increase": LIMIT,
    "smallest_agreement": LIMIT,
    "largest_task_drop": LIMIT,
    "most_flips": LIMIT,
    "smallest_saving": LIMIT,
    "false_alarms": ("a number above 0 and below 1", lambda value: is_number(value) and 0 < value < 1),
    "language": one_of(("en", "ja")),
    "learning_rate": POSITIVE,
    "pooled_learning_rate": POSITIVE,
}


def check_parameters(**parameters):
    """Raises ValueError with the rule of the first parameter that is of the wrong type or out of range."""
    for name, value in parameters.items():
        if name not in RULES:
            raise ValueError(f"there is no parameter {name!r}: choose from {', '.join(RULES)}")
        right, holds = RULES[name]
        if not holds(value):
            raise ValueError(f"{name} must be {right}, not {value!r} (papermill: -p reads numbers, -r leaves them text)")
    for name in ("tokens", "fusion_tokens"):
        length = parameters.get("length", 0)
        if parameters.get(name, length) < length:
            raise ValueError(f"{name} must be at least the length of a block, {length}, not {parameters[name]}")
    if "other_text" in parameters and parameters["other_text"] == parameters.get("text"):
        raise ValueError(f"other_text must be another text than {parameters['text']!r}")
    if parameters.get("cache_bytes") is not None and parameters.get("max_increase") is not None:
        raise ValueError("give cache_bytes or max_increase, not both: each says how many heads to keep")


def load_inputs(
    run_dir, model, text, length, calibration_blocks, repeated, validation_blocks, device=None, dtype=None, **parameters
):
    """The inputs of every notebook, looked at: (settings of the run, source, tokenizer, calibration, validation).

    `device`: None is CUDA or MPS if there is one, else the CPU; `dtype`, that the models compute in: None is float32 on the
    CPU, elsewhere the checkpoint's own. Nothing is written. A relative `run_dir` lies in the
    repository, a relative path of `model` or `text` here or there.

    Raises ValueError if a parameter is wrong, the model or the text cannot be loaded or is too small, the target cannot be
    met, or `run_dir` holds a run with other settings.
    """
    blocks = {
        "length": length,
        "calibration_blocks": calibration_blocks,
        "repeated": repeated,
        "validation_blocks": validation_blocks,
    }
    check_parameters(run_dir=run_dir, model=model, text=text, device=device, dtype=dtype, **blocks, **parameters)
    shared = ("budget", "cache_bytes", "max_increase", "method", "seed")
    settings = {"model": str(model), "text": str(text)} | {name: parameters.get(name) for name in shared} | blocks
    check_run(run_dir, **settings)
    device = pick_device(device)
    source, tokenizer = load_checkpoint(model, dtype or ("float32" if device.type == "cpu" else "auto"), device)
    check_source(source)
    if settings["max_increase"] is None:
        cache = settings["cache_bytes"]
        heads_for_budget(source.config, settings["budget"] if cache is None else budget_for_cache(source, cache))
    texts = {split: load_text(text, split) for split in SPLITS}
    calibration, validation = text_blocks(model, source.config, tokenizer, texts, **blocks)
    if settings["max_increase"] is not None:
        token_blocks(tokenizer, texts["calibration"], length, validation_blocks)
    if "other_text" in parameters:
        check_report(tokenizer, texts["validation"], length, **parameters)
    settings |= {"device": device.type, "dtype": dtype_name(source.dtype)}
    settings |= {"model_content": fingerprint(source), "text_content": fingerprint(texts)}
    check_run(run_dir, **settings)
    return settings, source, tokenizer, calibration, validation


def text_blocks(model, config, tokenizer, texts, length, calibration_blocks, repeated, validation_blocks):
    """(calibration, validation) blocks [blocks, length] of `texts` {split: documents} for the checkpoint `model`.

    `repeated`: the share of the calibration blocks whose second half repeats their first (`repeat_passages`).

    Raises ValueError if the text is too short for them, a block for the model's context, or the model for the tokenizer.
    """
    if length > (context := config.max_position_embeddings):
        raise ValueError(f"length must be at most the model's context, {context}, not {length}")
    calibration = repeat_passages(token_blocks(tokenizer, texts["train"], length, calibration_blocks), repeated)
    validation = token_blocks(tokenizer, texts["validation"], length, validation_blocks)
    highest = int(max(calibration.max(), validation.max()))
    if highest >= (size := config.vocab_size):
        raise ValueError(
            f"the tokenizer of {model} gives token {highest}, the model knows {size}: they do not belong together"
        )
    return calibration, validation


def open_run(run_dir, **parameters):
    """(run folder, source model, tokenizer, calibration blocks, validation blocks) for the parameters of a notebook.

    The folder is made if need be; it knows the model and the text by their content. Raises as `load_inputs` does.
    """
    settings, *inputs = load_inputs(run_dir, **parameters)
    return write_run(run_dir, settings), *inputs


def check_report(tokenizer, unseen, length, other_text, documents=16, checkpoint="recovered", task_folder=None, **_):
    """Raises ValueError for all that notebook 06 would stumble over late; `unseen`: documents of the run's text."""
    for texts in (unseen, load_text(other_text, "validation")):
        document_blocks(tokenizer, texts, length, documents)
    text_items(unseen, 1)
    token_blocks(tokenizer, unseen, length, FEWEST)
    if checkpoint not in MADE_BY:
        find_checkpoint(checkpoint)
    if task_folder is not None:
        paper_tasks(task_folder)


def converted_model(run, checkpoint, source, tokenizer):
    """The model that a report is about: `model` or `recovered` of the run, or any DHA checkpoint made from `source`.

    Its cache is counted in the dtype that the source is served in. Raises ValueError if it is not there, or not of that
    source's shape and tokens, or its embeddings are those of another model.
    """
    place = require(run, checkpoint, MADE_BY[checkpoint]) if checkpoint in MADE_BY else checkpoint
    converted, own = load_checkpoint(place, source.dtype, source.device)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    shapes = [[getattr(model.config, name) for name in names] for model in (source, converted)]
    heads = converted.config.model_type == "dha" and converted.config.source_num_key_value_heads
    if shapes[0] != shapes[1] or heads != source.config.num_key_value_heads or tokenizer.get_vocab() != own.get_vocab():
        known = " or ".join(MADE_BY)
        raise ValueError(f"checkpoint must be {known}, or a DHA model made from this source, not {checkpoint!r}")
    before, after = (model.get_input_embeddings().weight for model in (source, converted))
    if (after - before).norm() > 0.5 * before.norm():  # training moves them less
        raise ValueError(f"the embeddings of {checkpoint!r} are those of another model than the source")
    converted.checkpoint_dtype = served_dtype(source)
    return converted
