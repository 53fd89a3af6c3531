"""Decoupled-Head Attention from trained LLaMA checkpoints: measure, group, fuse, recover, compare."""

from .compare.cost import cache_bytes
from .convert import convert
from .fuse.model import fuse, to_llama
from .fuse.refit import refit
from .measure.perplexity import perplexity
from .measure.planted import plant_redundancy
from .measure.similarity import head_similarity
from .model.config import DhaConfig
from .model.dha import DhaForCausalLM
from .plan.allocate import plan_heads
from .plan.head_plan import HeadPlan
from .recover.pretrain import pretrain
from .sources.checkpoints import load_checkpoint, save_checkpoint
from .sources.text import load_text, repeat_passages, token_blocks

__all__ = [
    "DhaConfig",
    "DhaForCausalLM",
    "HeadPlan",
    "cache_bytes",
    "convert",
    "fuse",
    "head_similarity",
    "load_checkpoint",
    "load_text",
    "perplexity",
    "plan_heads",
    "plant_redundancy",
    "pretrain",
    "refit",
    "repeat_passages",
    "save_checkpoint",
    "to_llama",
    "token_blocks",
]
