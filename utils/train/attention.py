"""Attention over packs: the ancestor rule as a mask, computed in blocks, and the models that can take it.

Shapes: L tokens in a pack, P cached ones before them, T supervised targets; B queries, H heads, D numbers a head.
"""

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils.data.chat import Sample
from utils.train.packing import Pack, lay_out
from utils.train.tensors import all_reduced

# On a CPU so many queries are computed together, with the keys that at least one of them sees. A smaller block leaves
# out more of what nobody sees, and its kernel is slower: with SmolLM2-135M and packs of 700 tokens 96 to 256 made
# little difference. A card computes a pack as one block.
BLOCK_TOKENS = 128
BLOCKWISE = "sdpa_in_blocks"


def attention_in_blocks(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA attention, for a mask of `cut_mask` block by block.

    Args:
        module: The attention layer.
        query: (1, H, L, D).
        key: (1, heads of keys, L, D).
        value: As key.
        mask: As `sdpa_attention_forward` takes it.
        options: As `sdpa_attention_forward` takes them.

    Returns:
        (1, L, H, D), and no attention weights.
    """
    if not hasattr(mask, "blocks"):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    parts = [
        sdpa_attention_forward(module, query[:, :, rows], key[:, :, seen], value[:, :, seen], part, **options)[0]
        for rows, seen, part in mask.blocks
    ]
    return torch.cat(parts, dim=1), None


# On Hopper cards cuDNN's kernel is PyTorch's first choice. Under a mask its gradients can be NaN where L % 128 is 64
# (pytorch/pytorch issue 196678), and it prepares anew for every length.
torch.backends.cuda.enable_cudnn_sdp(False)

AttentionInterface.register(BLOCKWISE, attention_in_blocks)
AttentionMaskInterface.register(BLOCKWISE, sdpa_mask)


def use_blocks(model: Any) -> None:
    """Lets a model whose attention is SDPA compute it in blocks where its mask says so."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(BLOCKWISE)


def cut_mask(mask: torch.Tensor) -> torch.Tensor:
    """Splits a mask into blocks of queries, each with the keys it needs.

    Args:
        mask: (1, 1, L, P + L) bool.

    Returns:
        The same tensor; with an attribute `blocks`, if there are several: for each block of queries their slice, the
        (K,) places of the keys that one of them sees, and the (1, 1, B, K) part of the mask. An attribute, because
        models hand masks on as they are, and not every one hands on further arguments.
    """
    count = round(len(mask[0, 0]) / BLOCK_TOKENS)
    if count < 2:
        return mask
    edges = np.linspace(0, len(mask[0, 0]), count + 1).astype(int).tolist()
    mask.blocks = []
    for start, end in zip(edges, edges[1:], strict=False):
        seen = mask[0, 0, start:end].any(0).nonzero()[:, 0]
        mask.blocks.append((slice(start, end), seen, mask[:, :, start:end, seen]))
    return mask


def attention_mask(pack: Pack, window: int | None = None, cached: int = 0) -> torch.Tensor:
    """The ancestor rule as a mask.

    Args:
        pack: Of L tokens.
        window: Of a model with sliding-window attention: a token sees itself and the window - 1 tokens before it.
        cached: P, tokens that all samples begin with, whose keys are in a cache and not in the pack.

    Returns:
        (1, 1, L, P + L) bool; [0, 0, i, P + j] is True where token i may attend to token j. L x (P + L) bytes.
    """
    place = torch.arange(len(pack.subtree_end), device=pack.subtree_end.device)
    query, key = place[:, None], place[None, :]
    mask = torch.nn.functional.pad((key <= query) & (query < pack.subtree_end[None, :]), (cached, 0), value=True)
    if window is not None:
        positions = torch.cat([torch.arange(-cached, 0, device=place.device), pack.position_ids])
        mask &= pack.position_ids[:, None] - positions[None, :] < window
    return mask[None, None]


def model_inputs(pack: Pack, windows: dict[str, int | None] | None, cached: int = 0) -> dict[str, torch.Tensor]:
    """What a model's forward takes for a pack; only supervised places go through the output head.

    Args:
        pack: Of L tokens.
        windows: From `utils.weights.loading.attention_windows`: the kind of layer -> its window. None for a model that
            takes no mask; the pack then has to be a single chain.
        cached: P, tokens before the pack's whose keys are in the cache that the model gets beside these.

    Returns:
        `input_ids` (1, L), `position_ids` (1, L), `attention_mask` (1, 1, L, P + L) or a dict of them by kind of
        layer, `logits_to_keep` (T,).
    """
    inputs = {
        "input_ids": pack.input_ids[None],
        "position_ids": pack.position_ids[None] + cached,
        "logits_to_keep": pack.target_index,
        "use_cache": False,
    }
    if windows is None:
        return inputs
    masks = {kind: attention_mask(pack, window, cached) for kind, window in windows.items()}
    if pack.input_ids.device.type == "cpu":
        masks = {kind: cut_mask(mask) for kind, mask in masks.items()}
    return inputs | {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def usable_masks(
    engine: Any, windows: dict[str, int | None], max_tokens: int, precision: str
) -> tuple[dict[str, int | None] | None, str]:
    """Checks that a model's logits for a trie equal those for each branch alone without a mask.

    Args:
        engine: In training mode, or a model by itself. All ranks call this together.
        windows: From `utils.weights.loading.attention_windows`.
        max_tokens: The longest sample.
        precision: Of the engine's arithmetic.

    Returns:
        The windows and an empty text; or None and why: then samples are computed one by one, without a mask.
    """
    # The branches part beyond every window that a sample can reach.
    depth = 32 + max((window for window in windows.values() if window and window < max_tokens), default=0)
    engine.eval()
    try:
        use_blocks(getattr(engine, "module", engine))
        error = _mask_error(engine, windows, depth)
        problem = "" if error < (1e-3 if precision == "fp32" else 0.05) else f"logits differ by {error:.1%}"
    except torch.OutOfMemoryError:
        raise  # Says nothing of masks.
    except Exception as failure:  # Whatever a model makes of a mask that it does not know.
        problem = f"{type(failure).__name__}: {failure}"
    engine.train()
    if not all_reduced(float(bool(problem))):  # All ranks have to compute alike.
        return windows, ""
    why = f" ({problem})" if problem else ""
    return None, f"This model takes no tree masks{why}: samples are computed one by one, nothing is shared.\n"


@torch.no_grad()
def _mask_error(engine: Any, windows: dict[str, int | None], depth: int) -> float:
    """Error of the logits at the ends of two branches that part at a depth, relative to the logits' spread."""
    random = np.random.default_rng(0)
    vocab_size = getattr(engine, "module", engine).get_input_embeddings().num_embeddings
    trunk, *branches = (random.integers(0, vocab_size, length).astype(np.int32) for length in (depth, 8, 8))
    ends = np.arange(depth + 8) == depth + 7
    chains = [Sample("", np.concatenate([trunk, branch]), ends) for branch in branches]

    def logits(pack: Pack, windows: dict[str, int | None] | None) -> torch.Tensor:
        return engine(**model_inputs(pack.to(engine.device), windows)).logits[0].float()

    together = logits(lay_out(chains, [0, depth]), windows)
    alone = torch.cat([logits(lay_out([chain], [0]), None) for chain in chains])
    return ((together - alone).norm() / (alone - alone.mean(-1, keepdim=True)).norm()).item()
