"""What one process refuses by itself: numbers, kinds of tensors and settings that are none, each in words."""

from __future__ import annotations

import pickle
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import nnscaler_ring as nr
from nnscaler_ring.core.call import Options, Rows, attend
from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.recipe import Recipe
from tests.test_edges import qkv


@pytest.mark.parametrize("parts", [[-1, 0], [0], [0.5, 1.0]])
def test_parts_that_are_none(parts: list[Any]) -> None:
    with pytest.raises(ValueError, match="parts="):
        nr.Mask([(0, 4, 0, 4), (4, 8, 4, 8)], 8, parts=parts)


def test_a_mask_of_parts_where_features_have_none() -> None:
    tensors, mask = qkv(seq=8), nr.Mask([(0, 4, 0, 4), (4, 8, 4, 8)], 8, parts=[1, 0])
    for slices, far in ((mask, None), (nr.Mask([(0, 8, 0, 8)], 8), 3)):
        with pytest.raises(ValueError, match="parts"):
            attend(*tensors, Recipe(), Options(far=far), Rows(slices=slices))
    with pytest.raises(TypeError, match="takes no far"):
        nr.ContextParallel().attention(*tensors, far=3)


@pytest.mark.parametrize("seed", [1.5, -1, 1 << 63])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"dropout_seed={seed}: give an integer"):
        nr.ring_flash_attn_func(*qkv(), dropout_p=0.1, dropout_seed=seed)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch 2.11 itself
def test_forward_mode_is_refused() -> None:
    """torch's custom ops would give tangents of zero."""
    q, k, v, tangent = (torch.randn(1, 8, 2, 4) for _ in range(4))
    with forward_ad.dual_level():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own: it scripts decompositions
            q = forward_ad.make_dual(q, tangent)
        for call in (lambda: nr.wrap_ring_attn_func(q, k, v), lambda: nr.ContextParallel().unshard(q, 1)):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                call()
    extras = {"learnable_sink": torch.zeros(2), "alibi_slopes": torch.ones(2), "bias": torch.zeros(2, 8, 8)}
    for name, x in extras.items():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda x, name=name: nr.ContextParallel().attention(k, k, v, **{name: x}), (x,), (x,))


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "dropout_p"])
def test_numbers_have_no_gradient_and_say_so(name: str) -> None:
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(NotImplementedError, match=f"{name} has no gradient here: detach it"):
        nr.ContextParallel().attention(q, q, q, **{name: torch.tensor(0.5, requires_grad=True)})


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_numbers_that_scores_cannot_hold_are_refused(name: str) -> None:
    """In fp32 they would be infinite, and the result NaN."""
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match=rf"{name}=1e\+39: give at most 3.4e\+38, with torch.float32"):
        nr.wrap_ring_attn_func(q, q, q, **{name: 1e39})
    assert nr.wrap_ring_attn_func(*[q.double()] * 3, **{name: 1e39}).isfinite().all()


def test_tensors_that_are_not_dense_are_refused() -> None:
    dense = torch.randn(1, 8, 2, 4)
    jagged = torch.nested.nested_tensor([torch.randn(3, 2, 4), torch.randn(5, 2, 4)], layout=torch.jagged)
    for odd, words in ((jagged, "a nested tensor"), (dense.to_sparse(), "torch.sparse_coo")):
        with pytest.raises(ValueError, match=f"{words}: give dense ones"):
            nr.wrap_ring_attn_func(odd, odd, odd)


def alone_and_then_not(rank: int, world_size: int) -> None:
    alone = nr.ContextParallel(dist.group.WORLD)
    with mock.patch.object(dist, "is_initialized", lambda: False):
        early = nr.ContextParallel()
    x = torch.randn(1, 8, 2, 4)
    compiled = torch.compile(lambda x: early.attention(x, x, x), backend="eager")
    for call in (lambda: early.shard(x, 1), lambda: early.attention(x, x, x), lambda: early.position_ids(8), lambda: compiled(x)):
        with pytest.raises(ValueError, match=f"this process was alone; there are {world_size} ranks: make it anew, or of a group"):
            call()
    assert alone.shard(x, 1).shape[1] == 8 // world_size
    own = [dist.new_group([n]) for n in range(world_size)][rank]
    assert nr.ContextParallel(own).shard(x, 1) is not None, "alone by its group"


def test_who_was_alone_is_told_that_others_have_come(ranks) -> None:
    ranks(2).run(alone_and_then_not)


@pytest.mark.parametrize(
    "given",
    [
        {"sinks": 1.5, "window_size": (2, 0)},
        {"prefix": 2.5},
        {"seq_len": 8.0},
        {"softcap": None},
        {"mask": [(0, 8, 0, 8, -np.inf, 0)]},
        {"mask": [(0, 8, 0, 8, -3.5, 0)]},
    ],
    ids=str,
)
def test_numbers_that_are_none(given: dict[str, Any]) -> None:
    tensors = [torch.randn(1, 8, 2, 4) for _ in range(3)]
    with pytest.raises(ValueError):
        nr.ContextParallel().attention(*tensors, **{**given, **({"mask": nr.Mask(given["mask"], 8)} if "mask" in given else {})})


def test_more_numbers_that_are_none() -> None:
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"dist_threshold=2\.5"):
        nr.wrap_piecewise_attn_func(q, k, q, k, v, 2.5)
    for stride in (1.5, -1):
        with pytest.raises(ValueError, match=f"heads_k_stride={stride}"):
            nr.ContextParallel(heads_k_stride=stride)
    with pytest.raises(ValueError, match="seq_len=-3"):
        nr.ContextParallel().position_ids(-3)
    with pytest.raises(ValueError, match="floating dtype of float64"):
        nr.wrap_ring_attn_func(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)))


def test_a_layout_that_is_none() -> None:
    with pytest.raises(ValueError, match="every position once"):
        nr.ContextParallel(layout=Layout(np.array([[0, 0, 4], [1, 2, 4]]), 8, 2))


def test_no_heads_and_no_features_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="the 0 query heads must be a positive multiple of the 2 key heads"):
        nr.wrap_ring_attn_func(q[:, :, :0], k, v)
    with pytest.raises(ValueError, match="head dims must be positive"):
        nr.wrap_ring_attn_func(q[..., :0], k[..., :0], v)


def test_choices_and_defaults_of_other_functions_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="'zigzag'"):
        nr.wrap_piecewise_attn_func(q, k, q, k, v, 3, causal=True, layout="zigzag")
    with pytest.raises(ValueError, match="causal=False"):  # the default of ring-flash-attention
        nr.zigzag_ring_flash_attn_func(q, k, v)


def test_what_a_function_fixes_is_no_argument() -> None:
    with pytest.raises(TypeError, match="'layout'"):
        nr.zigzag_ring_flash_attn_func(*qkv(), causal=True, layout="contiguous")


def test_functions_that_are_causal_alone_look_at_causal_wherever_it_is() -> None:
    assert nr.zigzag_ring_flash_attn_func(*qkv(), 0.0, None, True).shape == qkv()[0].shape
    for more in ((), (0.0, None, False)):
        with pytest.raises(ValueError, match="zigzag_ring_flash_attn_func: causal=False"):
            nr.zigzag_ring_flash_attn_func(*qkv(), *more)


def test_what_is_packed_in_one_tensor() -> None:
    q, k, _ = qkv()
    with pytest.raises(TypeError, match="missing a required argument: 'kv'"):
        nr.ring_flash_attn_kvpacked_func(q)
    for kv in (k, k[:2, 0], k.new_zeros(2, 8), k.new_zeros(1, 16, 3, 2, 8)):
        with pytest.raises(ValueError, match="kv has shape"):
            nr.ring_flash_attn_kvpacked_func(q, kv)


def test_functions_made_of_functions_are_found_by_name() -> None:
    """As pickle looks for them, for a process that is spawned."""
    for function in (nr.zigzag_ring_flash_attn_func, nr.stripe_flash_attn_kvpacked_func):
        assert pickle.loads(pickle.dumps(function)) is function
