"""Whole sequences, their dense attention in float64, and what each rank holds of them: what the tests of the public surface share.

Nothing here is taken from the package but the layouts of lengths that do not divide, which no other library defines. On CPU the
tensors are float64 and must agree with the dense result to rounding; on an accelerator they are bfloat16 and may be off by twice
what a single dense call in bfloat16 is off.

Legend: `B` batch, `S` tokens of the whole sequence, `Hq`/`Hk` query/key heads, `D`/`Dv` head dims; ``[S, H, D]`` where packed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core import layouts
from tests.distributed import rank_device

EXACT = 1e-11
"""Relative error that float64 on CPU may have."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one problem; `packed` tensors have no batch dim."""

    batch: int = 2
    seq: int = 24
    seq_k: int | None = None
    heads: int = 4
    heads_k: int = 2
    dim: int = 8
    dim_v: int = 8
    packed: bool = False


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Who sees whom, in words; `dense` says it as an array."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    sinks: int = 0
    prefix: int = 0
    cu: tuple[int, ...] | None = None
    cu_k: tuple[int, ...] | None = None
    slices: tuple[tuple[int, ...], ...] | None = None

    def dense(self, q_len: int, k_len: int) -> Tensor:
        """bool ``[q_len, k_len]``, pair by pair; queries and keys of a document are aligned at its last token."""
        seen = torch.zeros(q_len, k_len, dtype=torch.bool)
        if self.slices is not None:
            for q0, q1, k0, k1, lo, hi in self.slices:
                distance = torch.arange(k0, k1) - torch.arange(q0, q1)[:, None]
                seen[q0:q1, k0:k1] |= (distance >= lo) & (distance <= hi)
            return seen
        left, right = self.window
        right = 0 if self.causal else right
        cu_q = self.cu or (0, q_len)
        cu_k = self.cu_k or self.cu or (0, k_len)
        for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            key = torch.arange(k0, k1)
            distance = key - (torch.arange(q0, q1) + k1 - q1)[:, None]
            early = (distance >= -left) | (key < k0 + self.sinks) if left >= 0 else torch.ones_like(distance, dtype=torch.bool)
            late = (distance <= right) | (key < k0 + self.prefix) if right >= 0 else torch.ones_like(early)
            seen[q0:q1, k0:k1] = early & late
        return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention by its definition: out ``[B, S, Hq, Dv]`` and lse ``[B, Hq, S]``; 0 and -inf where nothing is seen."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


@dataclass(frozen=True)
class Whole:
    """Tensors of the whole sequence, on the device and in the dtype under test, and what must come of them.

    Attributes:
        q, k, v, grad: inputs and the gradient of out; ``[B, S, H, D]``, or ``[S, H, D]`` packed.
        want: out, lse, dq, dk, dv in float64 on the CPU.
        rough: the same from one dense call in the dtype, or nothing for float64.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    want: dict[str, Tensor]
    rough: dict[str, Tensor]

    def wrong(self, got: dict[str, Tensor], places: dict[str, Tensor | None]) -> list[str]:
        """What of `got` is not as wanted, in words; `places` gives the tokens of each that are there (None: all)."""
        faults = []
        for name, have in got.items():
            want, rough = self._at(self.want, name, places.get(name)), self._at(self.rough, name, places.get(name))
            assert want is not None
            if have.shape != want.shape:
                faults.append(f"{name} has shape {tuple(have.shape)}, not {tuple(want.shape)}")
                continue
            if have.dtype != (expected := self.q.dtype if name != "lse" else torch.promote_types(self.q.dtype, torch.float32)):
                faults.append(f"{name} is {have.dtype}, not {expected}")
            error, allowed = _error(have, want), _allowed(want, rough, _precision(name, self.q.dtype))
            if not error <= allowed:  # NaN is wrong too
                faults.append(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
        return faults

    def _at(self, of: dict[str, Tensor], name: str, place: Tensor | None) -> Tensor | None:
        if name not in of:
            return None
        dim = of[name].dim() - (1 if name == "lse" else 3)
        return of[name] if place is None else of[name].index_select(dim, place)


def _error(have: Tensor, want: Tensor) -> float:
    have = have.detach().cpu().double()
    same = have == want  # -inf is as wanted where nothing is seen
    return (have - want).masked_fill(same, 0.0).abs().max().item() if have.numel() else 0.0


def _precision(name: str, dtype: torch.dtype) -> float:
    """Relative rounding error of a result; the exponentials of half precision kernels have 20 bits or less."""
    return 2.0**-15 if name == "lse" and dtype in (torch.bfloat16, torch.float16) else torch.finfo(dtype).eps


def _allowed(want: Tensor, rough: Tensor | None, precision: float) -> float:
    """Twice the error of the dense call, and a few roundings of the largest value."""
    size = 1.0 + want.masked_fill(want == float("-inf"), 0.0).abs().max().item() if want.numel() else 1.0
    return 2 * _error(rough, want) + 4 * precision * size if rough is not None else EXACT * size


def place() -> tuple[torch.device, torch.dtype]:
    """The device of this rank (CPU outside of one), and the dtype it is tested in."""
    device = rank_device() if dist.is_initialized() else torch.device("cpu")
    return device, torch.float64 if device.type == "cpu" else torch.bfloat16


@lru_cache(maxsize=64)
def whole(shape: Shape, seen: Seen, scale: float | None = None, dtype: torch.dtype | None = None, gain: float = 1.0) -> Whole:
    """The same tensors on every rank; `gain` scales q and k."""
    device, usual = place()
    dtype = dtype or usual
    seq_k = shape.seq if shape.seq_k is None else shape.seq_k
    sizes = [(shape.seq, shape.heads, shape.dim), (seq_k, shape.heads_k, shape.dim), (seq_k, shape.heads_k, shape.dim_v)]
    random = torch.Generator().manual_seed(17)
    batch = 1 if shape.packed else shape.batch
    sizes.append((shape.seq, shape.heads, shape.dim_v))
    gains = (gain, gain, 1.0, 1.0)
    made = [g * torch.randn(batch, *size, generator=random, dtype=torch.float64) for size, g in zip(sizes, gains, strict=True)]
    made = [x.to(dtype).double() for x in made]
    mask = seen.dense(shape.seq, seq_k)
    want = _results(made, lambda *qkv: attention(*qkv, mask, scale))
    rough = {} if dtype == torch.float64 else _results([x.to(device, dtype) for x in made], lambda *qkv: _sdpa(*qkv, mask, scale))
    if shape.packed:
        made = [x.squeeze(0) for x in made]
        want, rough = ({name: x.squeeze(0) for name, x in each.items()} for each in (want, rough))
    q, k, v, grad = (x.to(device, dtype) for x in made)
    return Whole(q, k, v, grad, want, rough)


def _results(made: Sequence[Tensor], run: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    *qkv, grad = made
    qkv = [x.clone().requires_grad_() for x in qkv]
    out, lse = run(*qkv)
    names = ("out", "lse", "dq", "dk", "dv")
    return {n: x.detach().cpu() for n, x in zip(names, (out, lse, *torch.autograd.grad(out, qkv, grad)), strict=True)}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """torch's own attention in the tensors' dtype; what sees nothing is opened for it, and taken out after it."""
    some = seen.any(1, keepdim=True)
    opened, gqa = (seen | ~some).to(q.device), q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=opened, scale=scale, enable_gqa=gqa)
    out = out.masked_fill(~some.to(q.device), 0.0)
    return out.transpose(1, 2), attention(q.float(), k.float(), v.float(), seen, scale)[1]


# -- which rank holds what -------------------------------------------------------------------------------------------------------


def held(name: str, seq: int, world_size: int, rank: int, cu: Sequence[int] | None = None) -> Tensor:
    """Positions that a rank holds in a layout, as api.md words it; `balanced` is what the package makes it."""
    if name == "balanced":
        return torch.from_numpy(layouts.build(name, seq, world_size, None if cu is None else np.array(cu)).positions(rank))
    if name.endswith("-per-document"):
        assert cu is not None
        documents = list(itertools.pairwise(cu))
        if any((hi - lo) % world_size for lo, hi in documents):
            return torch.from_numpy(layouts.build(name, seq, world_size, np.array(cu)).positions(rank))
        kind = name.removesuffix("-per-document")
        return torch.cat([lo + held(kind, hi - lo, world_size, rank) for lo, hi in documents])
    if name == "contiguous":
        chunk = -(-seq // world_size)
        return torch.arange(seq)[rank * chunk : (rank + 1) * chunk]
    if name == "stripe":
        return torch.arange(seq)[rank::world_size]
    assert name == "zigzag"
    if seq % world_size:
        return torch.from_numpy(layouts.build(name, seq, world_size).positions(rank))
    late = seq // world_size // 2
    early = seq // world_size - late  # chunk r is the longer one of an odd number
    first, second = rank * early, world_size * early + (world_size - 1 - rank) * late
    return torch.cat([torch.arange(first, first + early), torch.arange(second, second + late)])


# -- one call, checked -----------------------------------------------------------------------------------------------------------

Answer = Tensor | tuple[Tensor, Tensor, None]


def check_call(
    call: Callable[[Tensor, Tensor, Tensor], Answer],
    whole: Whole,
    rows: Tensor,
    rows_k: Tensor | None = None,
    probs: bool = False,
    strided: bool = False,
) -> list[str]:
    """What is wrong with a per-rank call on these rows of the whole tensors, backward twice over one graph included.

    `probs`: the call returns the lse too. `strided`: heads lie before tokens in memory, as a transpose leaves them.
    """
    rows_k = rows if rows_k is None else rows_k
    dim = whole.q.dim() - 3
    at = rows.to(whole.q.device)
    shards = [x.index_select(dim, r.to(x.device)) for x, r in ((whole.q, rows), (whole.k, rows_k), (whole.v, rows_k))]
    shards = [x.transpose(-3, -2).contiguous().transpose(-3, -2) if strided else x for x in shards]
    before = [x.clone() for x in shards]
    shards = [x.requires_grad_() for x in shards]
    answer = call(*shards)
    if isinstance(answer, tuple) != probs:
        return [f"returned {type(answer).__name__} with return_attn_probs={probs}"]
    out, lse, rest = answer if isinstance(answer, tuple) else (answer, None, None)
    got = {"out": out} if lse is None else {"out": out, "lse": lse}
    grad = whole.grad.index_select(dim, at)
    grad = grad.mT.contiguous().mT if strided else grad
    first = torch.autograd.grad(out, shards, grad, retain_graph=True)
    got |= dict(zip(("dq", "dk", "dv"), first, strict=True))
    places: dict[str, Tensor | None] = {"out": rows, "lse": rows, "dq": rows, "dk": rows_k, "dv": rows_k}
    faults = whole.wrong(got, places)
    if rest is not None:
        faults.append(f"the third result is {type(rest).__name__}, not None")
    again = torch.autograd.grad(out, shards, grad)
    faults += [f"again: {x}" for x in whole.wrong(dict(zip(("dq", "dk", "dv"), again, strict=True)), places)]
    changed = [name for name, old, new in zip("qkv", before, shards, strict=True) if not torch.equal(old, new)]
    return faults + [f"{name} was overwritten" for name in changed]


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Say which case an exception comes from."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"in {what}") from error


def told(what: object, faults: Sequence[str]) -> list[str]:
    """Faults with the case that they are of, and the rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [f"rank {rank}: {what}: {'; '.join(faults)}"] if faults else []


def no_faults(faults: Sequence[Sequence[str]]) -> None:
    """Fail with all that any rank found wrong."""
    found = [fault for each in faults for fault in each]
    assert not found, "\n".join(found)


# -- nothing may travel ----------------------------------------------------------------------------------------------------------

VERBS = ["batch_isend_irecv", "send", "recv", "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single"]
VERBS += ["all_to_all", "all_to_all_single", "all_gather_object", "broadcast", "reduce_scatter_tensor", "barrier", "new_group"]
VERBS += ["all_gather_tensor", "permute_tensor"]


class Communicated(BaseException):
    """A rank talked where it must not: no ``except Exception`` may hide it."""


@contextlib.contextmanager
def no_communication() -> Iterator[None]:
    """Fail, at once and without waiting for anybody, where code talks to other ranks."""
    with contextlib.ExitStack() as stack:
        for module, verb in itertools.product((dist, collectives), VERBS):  # the second has those of DTensors
            if hasattr(module, verb):
                stack.enter_context(mock.patch.object(module, verb, side_effect=Communicated(verb)))
        yield


def refusal(call: Callable[[], Any], kind: type[Exception], words: Sequence[str]) -> list[str]:
    """What is wrong with the refusal of a bad call: another exception, none, words that are missing, or talk before it."""
    try:
        with no_communication():
            call()
    except Communicated as verb:
        return [f"started {verb} before it refused"]
    except Exception as error:
        text = str(error)
        if type(error) is not kind:
            return [f"raised {type(error).__name__}({text!r}), not {kind.__name__}"]
        missing = [word for word in words if word not in text]
        return [f"the message lacks {missing}: {text!r}"] if missing else []
    return [f"was accepted, not refused with {kind.__name__}"]


def with_seq(shape: Shape, seq: int) -> Shape:
    """The same with another number of tokens."""
    return replace(shape, seq=seq)
