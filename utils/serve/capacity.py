"""How much the engine on transformers can compute at once, by the memory that there is."""

from typing import Any, NamedTuple

import psutil
import torch

from utils.cli import GIB
from utils.data.chat import Chat
from utils.serve.generate import context_tokens

DEFAULT_LEN = 4096
SPARE_TOKENS = 128  # Kept free of the cache, so that few answers fit as well as many.
PAGE_TOKENS = 16  # Prompts that begin alike share whole pages of keys and values.


class Capacity(NamedTuple):
    """How much the engine computes at once.

    Attributes:
        max_model_len: Longest prompt and answer together, tokens.
        max_num_seqs: Most answers that are written at once; others wait.
        max_num_batched_tokens: Most tokens computed in one step.
        cache_tokens: Whose keys and values each manager keeps.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cache_tokens: int


def find_capacity(model: Any, chat: Chat, served: int, args: Any) -> Capacity:
    """Finds how much the engine can compute at once.

    Args:
        model: Loaded.
        chat: Its template.
        served: How many names are served; each has keys and values of its own.
        args: serve.py's.

    Raises:
        ValueError: if there is not enough memory for one request.
    """
    config = model.config.get_text_config()
    longest = context_tokens(model.config, chat.tokenizer) or DEFAULT_LEN
    asked = args.max_model_len or min(longest, DEFAULT_LEN)
    if asked > longest:
        raise ValueError(f"--max_model_len: got {asked:,}, the model was made for {longest:,} tokens.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    free = _free_bytes(model.device, args.gpu_memory_utilization)
    fitting = int(free / served / token_bytes) // PAGE_TOKENS * PAGE_TOKENS
    if fitting < asked:
        names = f", for each of {served} names," if served > 1 else ""
        raise ValueError(
            f"the keys and values of {asked:,} tokens{names} need {served * asked * token_bytes / GIB:.2f} GiB, and "
            f"{free / GIB:.2f} GiB are left for them beside the weights. Use --max_model_len {max(fitting, 2)} or "
            "less, weights in 4 bits (--bits 4), a smaller model, or --gpu_memory_utilization nearer to 1."
        )
    batched = args.max_num_batched_tokens or (512 if model.device.type == "cpu" else 2048)
    cache_tokens = min(fitting, args.max_num_seqs * (asked + PAGE_TOKENS) + SPARE_TOKENS)
    return Capacity(asked, args.max_num_seqs, max(batched, args.max_num_seqs), cache_tokens)


def _free_bytes(device: torch.device, utilization: float) -> float:
    """What keys and values may take: of a card a part of what is left, of a host's memory a quarter."""
    if device.type == "cpu":
        return psutil.virtual_memory().available / 4
    free, total = torch.cuda.mem_get_info(device)
    return max(free - (1 - utilization) * total, 0) * 0.8  # The rest is for what a step computes.
