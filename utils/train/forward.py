"""How a model computes packs: as tries, as rows of a batch, or sample by sample.

Shapes: L tokens in a pack, P cached ones before them, T supervised targets, S samples, N tokens of the longest one;
V tokens of the vocabulary.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from utils.data.chat import Sample
from utils.train.attention import added_mask, attention_mask, cut_mask, use_blocks
from utils.train.packing import Layout, Pack, lay_out, pack_cost
from utils.train.recurrence import RECURRENT, Segments, all_taken, use_segments
from utils.train.tensors import all_reduced
from utils.weights.loading import attention_windows


class PackFormat(NamedTuple):
    """How a model computes a pack.

    Attributes:
        way: "shared": what samples begin with is computed once, under masks of the trie; "packed": several samples in a
            pass, kept apart as the rows of a batch; "single": one sample by itself, without a mask.
        windows: Of a trie's masks: the kind of layer -> its window, None where a layer sees all.
        segments: Whether layers are recurrent, so that they take the trie's segments.
        added: Whether masks are added to the scores, in the place of a boolean one.
    """

    way: str
    windows: dict[str, int | None] = {}
    segments: bool = False
    added: bool = False


PACKED, SINGLE = PackFormat("packed"), PackFormat("single")


def trie_format(model: Any) -> PackFormat:
    """How a model would compute tries, by its configuration."""
    kinds = attention_windows(model.config)
    windows = {kind: window for kind, window in kinds.items() if kind not in RECURRENT}
    attention = model.config.get_text_config()._attn_implementation
    return PackFormat("shared", windows, len(windows) < len(kinds), attention == "eager")


def use_tries(model: Any) -> None:
    """Lets a model compute tries: its attention in blocks, its recurrent layers segment by segment."""
    use_blocks(model)
    use_segments(model)


def model_inputs(pack: Pack, form: PackFormat, cached: int = 0) -> dict[str, Any]:
    """What a model's forward takes for a pack; only supervised places go through the output head.

    Args:
        pack: Of L tokens; for "single" it has to be one chain, for "packed" chains that share nothing.
        form: How the model computes it.
        cached: P, tokens before the pack's whose keys are in the cache that the model gets beside these.

    Returns:
        `input_ids` (1, L), `position_ids` (1, L), `attention_mask` (1, 1, L, P + L) or a dict of them by kind of
        layer, `logits_to_keep` (T,), and `segments`. For "packed" the first two are (S, N), as is the mask, and
        `logits_to_keep` are the columns in which a row has a target.
    """
    if form.way == "packed":
        return batch_inputs(pack)[0]
    inputs: dict[str, Any] = {
        "input_ids": pack.input_ids[None],
        "position_ids": pack.position_ids[None] + cached,
        "logits_to_keep": pack.target_index,
        "use_cache": False,
    }
    if form.way == "single":
        return inputs
    masks = {kind: attention_mask(pack, window, cached) for kind, window in form.windows.items()}
    if form.added:
        masks = {kind: added_mask(mask) for kind, mask in masks.items()}
    elif pack.input_ids.device.type == "cpu":
        masks = {kind: cut_mask(mask) for kind, mask in masks.items()}
    if form.segments:
        inputs |= {"segments": Segments(pack), "attention_mask": masks | dict.fromkeys(RECURRENT)}
        return inputs
    return inputs | {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def batch_inputs(pack: Pack) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """`model_inputs` for chains as the rows of a batch, which end together so that their targets stand in few columns.

    Returns:
        The inputs; and (T,) the row of each target, (T,) its place in `logits_to_keep`.
    """
    begins = pack.position_ids == 0
    row = begins.cumsum(0) - 1
    lengths = torch.bincount(row)
    longest = int(lengths.max())
    column = pack.position_ids + (longest - lengths)[row]

    def rows(values: torch.Tensor | int) -> torch.Tensor:
        table = torch.zeros(len(lengths), longest, dtype=torch.int64, device=row.device)
        table[row, column] = values
        return table

    columns, place = column[pack.target_index].unique(return_inverse=True)
    inputs = {
        "input_ids": rows(pack.input_ids),
        "position_ids": rows(pack.position_ids),
        "attention_mask": rows(1),
        "logits_to_keep": columns,
        "use_cache": False,
    }
    return inputs, (row[pack.target_index], place)


def supervised_logits(model: Any, pack: Pack, form: PackFormat, cache: Any = None) -> torch.Tensor:
    """(T, V) logits at the places before a pack's targets.

    Args:
        model: An engine, or a model by itself.
        pack: On its device.
        form: How the model computes it.
        cache: Transformers' cache of tokens before the pack's, for "shared"; the model adds the pack's.
    """
    if form.way == "packed":
        inputs, (row, place) = batch_inputs(pack)
        return model(**inputs).logits[row, place]
    cached = {"past_key_values": cache} if cache else {}
    return model(**model_inputs(pack, form, cache.get_seq_length() if cache else 0), **cached).logits[0]


def make_layout(
    form: PackFormat,
    model: torch.nn.Module,
    device_name: str,
    pack_tokens: int,
    world_size: int = 1,
    share_prefix: bool = True,
    unit: int = 1,
) -> Layout:
    """How samples are laid out in packs for a model that computes them so; the arguments are `Layout`'s."""
    return Layout(
        pack_tokens=0 if form.way == "single" else pack_tokens,
        world_size=world_size,
        share_prefix=share_prefix and form.way == "shared",
        cost=pack_cost(model, device_name),
        unit=unit,
        padded=form.way == "packed",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which of the ways a model can take


def choose_format(model: Any, max_tokens: int, precision: str, most: str = "shared") -> tuple[PackFormat, str]:
    """Tries how a model can compute several samples in a pass: a trie first, then the rows of a batch.

    The logits have to be those of the samples by themselves.

    Args:
        model: An engine in training mode, or a model by itself. All ranks call this together.
        max_tokens: The longest sample.
        precision: Of the arithmetic.
        most: The first way to try; another model that computes the same packs may not know a better one.

    Returns:
        How packs are to be computed; and why not as tries, if they cannot be.
    """
    module = getattr(model, "module", model)
    shared = trie_format(module)
    # The branches part beyond every window that a sample can reach.
    depth = 32 + max((window for window in shared.windows.values() if window and window < max_tokens), default=0)
    model.eval()
    why = _problem(model, shared, depth, precision) if most == "shared" else ""
    form = shared
    if why is not None:
        packs = most != "single" and _problem(model, PACKED, depth, precision) is None
        form = PACKED if packs else SINGLE
    model.train()
    if why is None:
        return form, ""
    how = "several at a time as the rows of a batch" if form is PACKED else "one by one"
    return form, f"This model takes no tree masks{why}: samples are computed {how}, nothing is shared.\n"


def _problem(model: Any, form: PackFormat, depth: int, precision: str) -> str | None:
    """What stands against a format on any rank, None if nothing does."""
    problem = ""
    try:
        use_tries(getattr(model, "module", model))
        error = _format_error(model, form, depth)
        if error >= (1e-3 if precision == "fp32" else 0.05):
            problem = f" (logits differ by {error:.1%})"
    except torch.OutOfMemoryError:
        raise  # Says nothing of masks.
    except Exception as failure:  # Whatever a model makes of a mask that it does not know.
        problem = f" ({type(failure).__name__}: {failure})"
    return problem if all_reduced(float(bool(problem))) else None  # All ranks have to compute alike.


@torch.no_grad()
def _format_error(model: Any, form: PackFormat, depth: int) -> float:
    """Error of the logits of samples that part at a depth, or of a short one and a long one, relative to their spread.

    That of the sample that fares worse, at its last places: a model may see what is padded, and forget it later.
    """
    random = np.random.default_rng(0)
    vocab_size = getattr(model, "module", model).config.get_text_config().vocab_size
    trunk, *branches = (random.integers(0, vocab_size, length).astype(np.int32) for length in (depth, 8, 11))
    together = form.way == "shared"
    texts = [np.concatenate([trunk[: depth * together], branches[0]]), np.concatenate([trunk, branches[1]])]
    chains = [Sample("", text, np.arange(len(text)) > len(text) - 8) for text in texts]

    packs = [lay_out([chain], [0]).to(model.device) for chain in chains]
    alone = [supervised_logits(model, pack, SINGLE).float() for pack in packs]
    pack = lay_out(chains, [0, depth if together else 0]).to(model.device)
    if form.segments:
        inputs = model_inputs(pack, form)
        found = model(**inputs).logits[0].float()
        if not all_taken(getattr(model, "module", model).config, inputs["segments"]):
            raise ValueError("its recurrent layers cannot begin with a state")
    else:
        found = supervised_logits(model, pack, form).float()
    return max(
        ((one - other).norm() / (other - other.mean(-1, keepdim=True)).norm()).item()
        for one, other in zip(found.split(pack.sample_targets.tolist()), alone, strict=True)
    )
