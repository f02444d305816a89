"""utils/train/recurrence.py: a trie cut into segments, and scans and convolutions over them.

python -m pytest tests/test_utils_train_recurrence.py
"""

import functools
import sys
from typing import Any

import pytest
import torch
from conftest import HYBRIDS, ancestors, make_model, pack_of, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.train.forward import trie_format
from utils.train.recurrence import (
    CONVOLUTION,
    FUSED,
    SCANS,
    Segments,
    all_taken,
    cut,
    over_segments,
    parents_of,
    use_segments,
)

property_test = settings(max_examples=100, deadline=None)


@given(parents=trees())
@property_test
def test_parents_are_the_tokens_before(parents: list[int | None]) -> None:
    assert parents_of(pack_of(parents)).tolist() == [-1 if parent is None else parent for parent in parents]


@given(parents=trees())
@property_test
def test_segments_part_where_a_trie_branches(parents: list[int | None]) -> None:
    """A token begins a segment if it begins a sample, or if its parent has other children or is followed by none."""
    starts, above = cut(parents_of(pack_of(parents)))
    children = [[child for child, parent in enumerate(parents) if parent == place] for place in range(len(parents))]
    expected = [place for place, parent in enumerate(parents) if parent is None or len(children[parent]) > 1]
    assert starts.tolist() == expected
    owner = [max(start for start in expected if start <= place) for place in range(len(parents))]
    parts = [-1 if parents[start] is None else expected.index(owner[parents[start]]) for start in expected]
    assert above.tolist() == parts


def sums(values: torch.Tensor, weight: torch.Tensor, chunk_size: int = 0, **kept: Any) -> Any:
    """The simplest scan: a state that decays and adds; called as transformers' functions are."""
    state = kept["initial_state"] if kept.get("initial_state") is not None else torch.zeros_like(values[:, 0])
    found = []
    for place in range(values.shape[1]):
        state = state * weight[:, place] + values[:, place]
        found.append(state)
    return torch.stack(found, 1), state


@given(parents=trees(), seed=st.integers(0, 100))
@property_test
def test_a_scan_sees_the_ancestors_alone(parents: list[int | None], seed: int) -> None:
    from utils.train import recurrence

    generator = torch.Generator().manual_seed(seed)
    values, weight = torch.randn(2, 1, len(parents), 3, generator=generator, dtype=torch.float64)
    scan = recurrence.Scan(("values", "weight"), {"values": 0.0, "weight": 1.0}, "initial_state", "output_final_state")

    def function(values: Any, weight: Any, initial_state: Any = None, output_final_state: bool = False, **rest: Any):
        return sums(values, weight, initial_state=initial_state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recurrence.SCANS, "sums", scan)
        found = over_segments(function, "sums")(values, weight, segments=Segments(pack_of(parents)))
    for place in range(len(parents)):
        line = ancestors(parents, place)[::-1]
        expected, _ = sums(values[:, line], weight[:, line])
        torch.testing.assert_close(found[0, place], expected[0, -1])


@given(parents=trees(), width=st.integers(2, 5))
@property_test
def test_a_convolution_sees_the_nearest_ancestors(parents: list[int | None], width: int) -> None:
    generator = torch.Generator().manual_seed(len(parents))
    inputs = torch.randn(1, 3, len(parents), generator=generator, dtype=torch.float64)
    weight = torch.randn(3, width, generator=generator, dtype=torch.float64)

    def convolution(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(hidden_states, (weight.shape[-1] - 1, 0))
        return torch.nn.functional.conv1d(padded, weight[:, None], groups=len(weight))

    found = over_segments(convolution, CONVOLUTION)(inputs, weight, segments=Segments(pack_of(parents)))
    for place in range(len(parents)):
        line = ancestors(parents, place)[:width]
        expected = sum(inputs[0, :, one] * weight[:, -1 - back] for back, one in enumerate(line))
        torch.testing.assert_close(found[0, :, place], expected)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_kernels_are_called_as_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many arguments stand by place, and the others by name: a kernel's order is another after the first ones."""
    from utils.train.forward import model_inputs

    model = make_model(kind, 50).eval()
    calls: dict[str, set[tuple[int, bool]]] = {}
    for module in {sys.modules[type(layer).__module__] for layer in model.modules()}:
        for name in (*SCANS, CONVOLUTION):
            if function := getattr(module, name, None):
                original = getattr(function, "__wrapped__", function)

                def noted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
                    calls.setdefault(name, set()).add((len(args), kwargs.get("initial_state") is not None))
                    return original(*args, **kwargs)

                monkeypatch.setattr(module, name, functools.wraps(original)(noted))
    pack = pack_of([None, 0, 1, 1, 0])
    with torch.no_grad():
        model(input_ids=pack.input_ids[None])
        before = {name: {count for count, _ in found} for name, found in calls.items()}
        use_segments(model)
        model(**model_inputs(pack, trie_format(model)))
    assert before and before == {name: {count for count, _ in found} for name, found in calls.items()}


def test_no_kernel_takes_a_whole_layer() -> None:
    """It would pass over LoRA's matrices and over what is padded; what it returns, the layer takes for its output."""
    called = []
    kernel = over_segments(lambda *args, **kwargs: called.append(1) or "output", FUSED)
    assert kernel(1, segments=None) is None and kernel(1) is None and not called


def test_without_segments_the_functions_are_transformers_own() -> None:
    """And a model that is prepared twice calls them once."""
    model = make_model("qwen3_5", 50).eval()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        use_segments(model)
        use_segments(model)
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_all_recurrent_layers_have_to_take_the_segments(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.train.forward import model_inputs

    model = make_model(kind, 50).eval()
    use_segments(model)
    inputs = model_inputs(pack_of([None, 0, 1, 1, 0]), trie_format(model))
    with torch.no_grad():
        model(**inputs)
    segments = inputs["segments"]
    assert all_taken(model.config, segments)
    taken = next(name for name in (*SCANS, CONVOLUTION) if segments.taken[name])
    segments.taken[taken] -= 1
    assert not all_taken(model.config, segments)
