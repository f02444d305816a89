"""utils/train/attention.py: a pack's tokens see what they would see alone, however it is computed.

python -m pytest tests/test_utils_train_attention.py
"""

import pytest
import torch
from conftest import ancestors, pack_of, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.train import attention
from utils.train.attention import attention_mask, cut_mask

property_test = settings(max_examples=100, deadline=None)


# ---------------------------------------------------------------------------------------------------------------------
# The mask


def brute_force(parents: list[int | None], window: int | None) -> list[list[bool]]:
    """Who may attend to whom: a token's ancestors, with a window only the nearest."""
    allowed = [set(ancestors(parents, place)[:window]) for place in range(len(parents))]
    return [[key in allowed[query] for key in range(len(parents))] for query in range(len(parents))]


@given(parents=trees())
@property_test
def test_mask_is_the_ancestor_relation(parents: list[int | None]) -> None:
    mask = attention_mask(pack_of(parents))
    assert mask.shape == (1, 1, len(parents), len(parents)) and mask.dtype == torch.bool
    assert mask[0, 0].tolist() == brute_force(parents, None)


@given(parents=trees(), window=st.integers(1, 8))
@property_test
def test_window_counts_along_branches(parents: list[int | None], window: int) -> None:
    """Between a token and its ancestor lie other branches in the pack, which the window must not count."""
    assert attention_mask(pack_of(parents), window)[0, 0].tolist() == brute_force(parents, window)


def test_the_kernel_that_makes_nan_under_a_mask_is_not_used() -> None:
    """cuDNN's; on a CPU it shows in the switch alone."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


@given(parents=trees(), size=st.integers(1, 6))
@property_test
def test_blocks_hold_all_that_is_seen_and_no_more(parents: list[int | None], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_TOKENS", size)
        mask = cut_mask(attention_mask(pack_of(parents)))
    if round(len(parents) / size) < 2:
        assert not hasattr(mask, "blocks"), "one block is the whole"
        return
    rebuilt = torch.zeros_like(mask)
    for rows, seen, part in mask.blocks:
        rebuilt[:, :, rows, seen] = part
        assert part.any(2).all(), "a key that no query of the block sees"
    assert torch.equal(rebuilt, mask)
    assert [rows.start for rows, *_ in mask.blocks] == [0, *(rows.stop for rows, *_ in mask.blocks)][:-1]
