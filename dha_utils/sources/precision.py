"""The dtypes and devices that models compute in, are kept in, and are served in."""

import logging

import torch

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")


def served_dtype(model):
    """The dtype that a `model` comes in and will be served in, whatever it computes in here."""
    return getattr(model, "checkpoint_dtype", model.dtype)


def dtype_name(dtype):
    """As transformers' configs write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def as_dtype(name):
    """A torch dtype, or the one of that name. Raises ValueError if there is none, or it is not of weights."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"the dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return dtype


def cast_weights(model, dtype):
    """`model` with its weights in another dtype; unlike `.to(dtype)` it leaves RoPE's frequencies in float32."""
    restore_frequencies(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def restore_frequencies(model):
    """Computes RoPE frequencies again that .half() or .bfloat16() rounded, as `from_pretrained(dtype=…)` does not."""
    rotary = model.model.rotary_emb
    if rotary.inv_freq.dtype.itemsize < 4:
        log.warning("RoPE frequencies in %s are computed again in float32", dtype_name(rotary.inv_freq.dtype))
        model.model.rotary_emb = type(rotary)(config=model.config).to(model.device)


def check_dtype(dtype, device):
    """Raises ValueError if the `device` cannot multiply in `dtype` (of `as_dtype`)."""
    try:
        square = torch.ones(2, 2, dtype=as_dtype(dtype), device=device)
        square @ square
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device} cannot compute in {dtype_name(as_dtype(dtype))}: choose float32") from error


def as_float64(tensor):
    """`tensor` in float64, in which closed forms are solved; on the CPU if its device has none (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def pick_device(name=None):
    """The torch device of that name; without a name CUDA or MPS if there is one, else the CPU.

    Raises ValueError if this machine does not have it.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device  # "cuda" comes out as "cuda:0"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"this machine has no device {str(name)!r}: use device=None, which picks what is there") from error
