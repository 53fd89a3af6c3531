"""Decoupled-Head Attention from trained LLaMA checkpoints: measure, group, fuse, recover, compare."""

from .allocation import plan_heads
from .checkpoints import load_checkpoint, save_checkpoint
from .evaluation import cache_bytes, perplexity
from .freedoms import plant_redundancy
from .fusion import fuse, to_llama
from .grouping import HeadPlan
from .modeling import DhaConfig, DhaForCausalLM
from .pretraining import pretrain
from .redundancy import head_similarity
from .text import load_text, token_blocks

__all__ = [
    "DhaConfig",
    "DhaForCausalLM",
    "HeadPlan",
    "cache_bytes",
    "fuse",
    "head_similarity",
    "load_checkpoint",
    "load_text",
    "perplexity",
    "plan_heads",
    "plant_redundancy",
    "pretrain",
    "save_checkpoint",
    "to_llama",
    "token_blocks",
]
