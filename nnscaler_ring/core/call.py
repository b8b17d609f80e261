"""The public edge of the engine: every front validates here once, before any communication, and calls the op.

Legend: `B` batch, `L` tokens of this rank, `T` packed tokens of this rank, `Hq`/`Hk` heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.torch_version import TorchVersion

from . import engine, kernels
from .agree import asked, check_alike
from .device import captures, on_host, sum_dtype
from .layouts import check_layout, looks_at_documents
from .mask import Mask, check_cu_seqlens, check_window
from .passes import inner_of, kernel_for, shape_of
from .plan import ALL_TO_ALL, check_transport
from .recipe import Recipe, content, layout_of, mask_of
from .scaling import best_transport, machine_of
from .transport import GRID, is_grid, is_local, member_of, num_ranks, transport_of

Group = dist.ProcessGroup | Sequence[int] | None
"""A process group, the global ranks of one, or None for the default group (this process alone where there is none)."""

Result = Tensor | tuple[Tensor, Tensor, None]
"""out, or ``(out, softmax_lse, None)`` where the probabilities' log-sum-exp is asked for, as flash-attn returns it."""


def check_flags(**given: object) -> None:
    """ValueError unless all are True or False: what slipped into the place of a flag is another argument."""
    for name, flag in given.items():
        number = isinstance(flag, Integral) and flag in (0, 1)
        tensor = isinstance(flag, Tensor) and flag.numel() == 1 and flag.dtype == torch.bool
        if not (number or tensor or isinstance(flag, (bool, np.bool_, torch.SymBool))):
            raise ValueError(f"{name}={flag!r}: give True or False")


def _check_flags(options: Options) -> None:
    deterministic = False if options.deterministic is None else options.deterministic
    check_flags(causal=options.causal, deterministic=deterministic, return_attn_probs=options.return_attn_probs)


def _is_number(x: object) -> bool:
    one = (isinstance(x, Tensor) and x.numel() == 1) or (isinstance(x, np.ndarray) and x.size == 1)
    return one or isinstance(x, (Real, torch.SymInt, torch.SymFloat))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments that all attention functions share, under flash-attn's names.

    Attributes:
        softmax_scale: factor of the scores; ``D ** -0.5`` where None.
        dropout_p: probability with which a weight is dropped, in [0, 1). Which are dropped depends on the seed and on batch row,
            head and the positions of query and key in the whole sequence: not on how it is cut.
        causal, window_size, sinks, prefix: who sees whom, see `mask.build`.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``: scores less slope times distance (ALiBi, Press et al., arXiv:2108.12409).
        deterministic: the same bits each time, also where a kernel has a faster way.
        return_attn_probs: return ``(out, softmax_lse, None)``.
        softcap: scores ``softcap * tanh(score / softcap)``; 0 for none.
        learnable_sink: logits ``[Hq]`` of a key without a value, one a head (attention sinks as in gpt-oss), differentiable.
        bias: ``[Hq or 1, Lq, Sk]`` added to the scores, for this rank's queries and all keys in natural order, differentiable.
        dropout_seed: of the dropout; drawn from torch's default CPU generator where None.
        far: see `mask.build`; the features of q and k then have two halves.
    """

    softmax_scale: float | None = None
    dropout_p: float = 0.0
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    sinks: int = 0
    prefix: int = 0
    alibi_slopes: Tensor | None = None
    deterministic: bool = False
    return_attn_probs: bool = False
    softcap: float = 0.0
    learnable_sink: Tensor | None = None
    bias: Tensor | None = None
    dropout_seed: int | None = None
    far: int | None = None

    def __post_init__(self) -> None:
        scale = self.softmax_scale
        if scale is not None and not (_is_number(scale) and float("-inf") < scale < float("inf")):
            raise ValueError(f"softmax_scale={scale!r}: give a finite number")
        if not (_is_number(self.dropout_p) and 0.0 <= self.dropout_p < 1.0):
            raise ValueError(f"dropout_p={self.dropout_p!r}: a probability in [0, 1) is allowed")
        if not (_is_number(self.softcap) and 0.0 <= self.softcap < float("inf")):
            raise ValueError(f"softcap={self.softcap!r}: give a positive number, or 0 for none")
        seed = self.dropout_seed
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 1 << 63):
            raise ValueError(f"dropout_seed={seed!r}: give an integer in [0, 2**63)")
        if self.far is not None and not (isinstance(self.far, Integral) and self.far >= 0):
            raise ValueError(f"dist_threshold={self.far!r}: give a number of tokens >= 0")
        for name in ("alibi_slopes", "softmax_scale", "softcap", "dropout_p"):
            given = getattr(self, name)
            if isinstance(given, Tensor) and given.requires_grad:
                raise NotImplementedError(f"{name} has no gradient here: detach it")
        check_window(self.window_size)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which tokens the tensors hold: the whole length, and the documents packed in it.

    Attributes:
        seq_len: query tokens of the whole sequence; the group's size times the tokens passed where None.
        seq_len_k: key tokens of the whole sequence; `seq_len` where None, and like it where that is None too.
        cu_seqlens_q: boundaries of the documents in the whole sequence, ``[0, ..., seq_len]``; one document where None.
        cu_seqlens_k: the same for keys; `cu_seqlens_q` where None.
        slices: a mask of band slices that stands for causal, window and documents.
    """

    seq_len: int | None = None
    seq_len_k: int | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    slices: Mask | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    options: Options,
    rows: Rows | None = None,
    heads_may_travel: bool = False,
) -> Result:
    """Check the arguments and run the op on this rank's rows.

    Args:
        q: ``[B, L, Hq, D]``, or packed ``[T, Hq, D]``.
        k: ``[B, L, Hk, D]`` or ``[T, Hk, D]``.
        v: ``[B, L, Hk, Dv]`` or ``[T, Hk, Dv]``.
        recipe: layout, transport, kernel and group; the mask in it is that of `options`.
        options: the shared arguments.
        rows: which tokens these are.
        heads_may_travel: transport ``auto`` may also be `ALL_TO_ALL`, where that is modelled to be clearly faster.

    Returns:
        out like q with head dim `Dv`; with `return_attn_probs` also the log-sum-exp ``[B, Hq, L]`` (``[Hq, T]``), natural log,
        fp32 (float64 for float64), differentiable.

    Raises:
        ValueError: an argument is not as described.
        NotImplementedError: no kernel has what is asked for.
    """
    out, lse = out_and_lse(q, k, v, recipe, options, rows or Rows(), heads_may_travel)
    return (out, lse, None) if options.return_attn_probs else out


def out_and_lse(
    q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, options: Options, rows: Rows, heads_may_travel: bool = False
) -> tuple[Tensor, Tensor]:
    """Both results of `attend` in any case; without `return_attn_probs` the log-sum-exp is not to be differentiated."""
    if torch.compiler.is_compiling():
        text, total, tables = _in_graph(q, k, v, recipe, options, rows)
    else:
        recipe, total, tables = check(q, k, v, recipe, options, rows)
        recipe = replace(recipe, keeps=_may_keep(q, k, v, options.bias, options.learnable_sink))
        if heads_may_travel:
            recipe = _with_transport(q, k, v, recipe, total, tables, options)
        text = str(recipe)
    packed = q.dim() == 3
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as kernels take them
    if packed:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    slopes, scale = options.alibi_slopes, _scale(q, options)
    alibi = None if slopes is None else torch.atleast_2d(slopes).to(sum_dtype(q.dtype))
    extras = (alibi, options.bias, options.learnable_sink)
    out, lse, _ = engine.attention(q, k, v, *tables, *extras, *total, scale, _seed(options, q.device), text)
    if packed:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return out, lse


@torch.compiler.disable
def _with_transport(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    total: tuple[int, int],
    tables: Sequence[Tensor | None],
    options: Options,
) -> Recipe:
    """The recipe with ``auto`` settled as `ALL_TO_ALL` where `best_transport` says so; else ``auto``, for each pass to choose."""
    transport = transport_of(recipe.group)
    world = transport.world_size
    if recipe.transport != "auto" or world == 1 or transport.inner > 1 or options.bias is not None or total[0] != total[1]:
        return recipe  # a bias would travel with the heads; the model is of as many keys as queries
    cu_q, cu_k, slices = (content(table) for table in tables)
    mask = mask_of(recipe, *total, cu_q, cu_k, slices)
    held, shape = layout_of(recipe.layout, total[0], world, cu_q), shape_of(recipe, q, k, v)
    travelling = replace(recipe, transport=ALL_TO_ALL)
    if best_transport(mask, held, shape, *machine_of(q.device.type, world)) == ALL_TO_ALL:
        with suppress(NotImplementedError):
            _check_kernel(q, k, v, travelling, options)
            return travelling
    return recipe


def _scale(q: Tensor, options: Options) -> float:
    features = q.shape[-1] if options.far is None else q.shape[-1] // 2
    return features**-0.5 if options.softmax_scale is None else float(options.softmax_scale)


def _in_graph(
    q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, options: Options, rows: Rows
) -> tuple[str, tuple[int, int], tuple[Tensor | None, ...]]:
    """What `check` returns, where ``torch.compile`` traces: of shapes, not of what tables contain; lengths may be symbols."""
    check_plain(q, k, v, rows.cu_seqlens_q, rows.cu_seqlens_k, options.alibi_slopes, options.learnable_sink, options.bias)
    check_qkv(q, k, v)
    check_differentiable(q, k, v)
    _check_flags(options)
    for name, table in (("cu_seqlens_q", rows.cu_seqlens_q), ("cu_seqlens_k", rows.cu_seqlens_k)):
        if table is not None:
            check_table(name, table)
    if rows.slices is not None:
        raise NotImplementedError("a Mask of slices under torch.compile: pass a mask by its name")
    total_q, total_k = whole_lengths(q, k, recipe.group, rows)
    if is_grid(recipe.group) and rows.seq_len is not None:  # what a team keeps is then not so many shards like this rank's
        if rows.cu_seqlens_q is not None and looks_at_documents(recipe.layout):
            raise NotImplementedError(
                f"layout={recipe.layout!r} over a grid with seq_len under torch.compile: pad the row so that ranks hold as many "
                "tokens each and leave seq_len out, take another layout, or call it outside the graph"
            )
        total_q, total_k = traced(total_q), traced(total_k)
    check_extras(q, options, total_k)
    own = ("group", "layout", "transport", "kernel", "heads_stride", "batch0", "head0", "reduce_dtype")
    said = {name: getattr(recipe, name) for name in own} | _of_recipe(options)
    left, right = said["window"]
    text = _text(**{**{name: traced(value) for name, value in said.items()}, "window": (traced(left), traced(right))})
    return text, (total_q, total_k), (rows.cu_seqlens_q, rows.cu_seqlens_k, None)


def whole_lengths(q: Tensor, k: Tensor, group: str, rows: Rows) -> tuple[int, int]:
    """Query and key tokens of the whole sequence: as `rows` says, else this rank's tokens times the number of shards."""
    dim, shards = q.dim() - 3, 1 if is_local(group) else num_ranks(group)
    seq_len_k = rows.seq_len if rows.seq_len_k is None else rows.seq_len_k
    total_q = shards * q.shape[dim] if rows.seq_len is None else rows.seq_len
    return total_q, shards * k.shape[dim] if seq_len_k is None else seq_len_k


def _of_recipe(options: Options) -> dict[str, Any]:
    """The part of a recipe that options say, under its names."""
    return {
        "causal": bool(options.causal),
        "window": options.window_size,
        "sinks": options.sinks,
        "prefix": options.prefix,
        "deterministic": bool(options.deterministic),
        "softcap": float(options.softcap),
        "dropout": float(options.dropout_p),
        "far": options.far,
        "returns_lse": bool(options.return_attn_probs),
    }


_GUARDS = TorchVersion(torch.__version__) >= "2.7"
"""The Dynamo of 2.6 takes no `guard_scalar`, and makes no symbol of a float."""


def traced(value: Any) -> Any:
    """A plain argument as a constant of the graph that is traced: the graph then holds for the value that a symbol has now.

    Under dynamic shapes every float is a symbol, also a default.
    """
    return guard_scalar(value) if _GUARDS and torch.compiler.is_compiling() and isinstance(value, (int, float)) else value


@torch.compiler.assume_constant_result
def _text(**said: Any) -> str:
    """The recipe with these fields as a string: a constant of the graph that is traced."""
    recipe = Recipe(**{**said, "window": check_window(said["window"])})
    check_names(recipe)
    transport = transport_of(recipe.group)
    return str(replace(recipe, rank=transport.ranks[0]) if inner_of(recipe, transport) > 1 else recipe)


def _seed(options: Options, device: torch.device) -> int:
    if not options.dropout_p:
        return 0
    if options.dropout_seed is not None:
        return options.dropout_seed
    if torch.compiler.is_compiling() or captures(device):
        raise NotImplementedError("dropout without a seed under torch.compile or in a CUDA graph: pass dropout_seed")
    return int(torch.randint(1 << 62, (), device="cpu").item())


@torch.no_grad()
def total_attention(q: Tensor, k: Tensor, lse: Tensor, recipe: Recipe, options: Options, rows: Rows) -> Tensor:
    """The attention weights of each of this rank's keys, summed over all queries, before dropout: ``[B, Hq, Lk]``; no gradient.

    The weights of a key, summed over queries, are the gradient of its value where that of every result is 1, so the backward pass
    finds them and brings them home.

    Args:
        q, k, recipe, options, rows: as for `attend`; without slopes, a bias or a sink.
        lse: what `attend` returned, ``[B, Hq, Lq]``.
    """
    transport = "auto" if recipe.transport == ALL_TO_ALL else recipe.transport
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    ones, nothing = q.new_ones(*q.shape[:3], 1), k.new_zeros(*k.shape[:3], 1)
    options = replace(options, dropout_p=0.0)
    recipe, total, tables = check(q, k, nothing, replace(recipe, transport=transport), options, rows)
    scale = _scale(q, options)
    extras = (*tables, None, None, None)
    q, k, nothing = _exactly(recipe, (q, k, nothing))
    saved = [ones.to(q.dtype), q, k, nothing, torch.zeros_like(ones, dtype=q.dtype), lse]
    _, _, totals = engine.attention_backward(saved, None, extras, total, scale, 0, str(recipe), False)
    return totals.squeeze(3).transpose(1, 2)


def _exactly(recipe: Recipe, qkv: Sequence[Tensor]) -> list[Tensor]:
    """q, k and v in the dtype of partial results where the kernel takes it, else as they are: one asked for by name may not."""
    q, k, v = (x.to(sum_dtype(x.dtype)).contiguous() for x in qkv)
    try:
        kernel_for(recipe, q, k, v)
    except NotImplementedError:
        return [x.contiguous() for x in qkv]
    return [q, k, v]


@torch.compiler.disable  # in a graph that may break: what is not in it runs here, and not in a graph of its own
def check(
    q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, options: Options, rows: Rows
) -> tuple[Recipe, tuple[int, int], tuple[Tensor | None, ...]]:
    """All that can be wrong, found on every rank alike without communication.

    Returns:
        The whole recipe, the numbers of query and key tokens of the whole sequence, and the tables ``cu_q, cu_k, slices``.
    """
    with announced(recipe.group, q):
        return _checked(q, k, v, recipe, options, rows)


@contextmanager
def announced(group: str, tensor: object = None) -> Iterator[None]:
    """Where ranks compare their calls (see `agree`), tell the others of an error in this block, which they may not find themselves.

    They would else wait for this rank's facts. Ranks meet on the device of `tensor`, on the CPU where that is no tensor.
    """
    try:
        yield
    except Exception:
        if asked():
            with suppress(ValueError):
                check_alike(transport_of(group), "", {}, getattr(tensor, "device", torch.device("cpu")))
        raise


def _checked(
    q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, options: Options, rows: Rows
) -> tuple[Recipe, tuple[int, int], tuple[Tensor | None, ...]]:
    check_plain(q, k, v, rows.cu_seqlens_q, rows.cu_seqlens_k, options.alibi_slopes, options.learnable_sink, options.bias)
    check_qkv(q, k, v)
    check_differentiable(q, k, v, options.alibi_slopes, options.learnable_sink, options.bias)
    check_names(recipe)
    _check_flags(options)
    recipe = replace(recipe, **{**_of_recipe(options), "window": check_window(options.window_size)})
    for name, length in (("seq_len", rows.seq_len), ("seq_len_k", rows.seq_len_k)):
        if length is not None and not (isinstance(length, Integral) and length >= 0):
            raise ValueError(f"{name}={length!r}: give a number of tokens")
    total = whole_lengths(q, k, recipe.group, rows)
    cu_q, cu_k = host_table("cu_seqlens_q", rows.cu_seqlens_q), host_table("cu_seqlens_k", rows.cu_seqlens_k)
    if cu_q is not None and cu_k is None and total[0] != total[1]:
        raise ValueError(
            f"{total[0]} query and {total[1]} key tokens, but cu_seqlens is of both: wrap_ring_attn_varlen_func takes two"
        )
    slices = None if rows.slices is None else _slices(rows.slices, *total, recipe.parts)
    mask_of(recipe, *total, content(cu_q), content(cu_k), content(slices))
    check_extras(q, options, total[1])
    _check_kernel(q, k, v, recipe, options)
    return recipe, total, (cu_q, cu_k, slices)


_frames = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
"""What torch does with frames of Python: None where no compiled function runs."""


def _may_keep(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow that does as those of other ranks do.

    Not of tensors without content, of which nobody knows how many rows others read, and not while a compiled function runs, also
    one that runs as it is written, as from the recompile limit on: other ranks may be in its graph, which keeps nothing.
    """
    if torch.compiler.is_compiling() or _frames() is not None:
        return False
    given = [x for x in tensors if x is not None and not is_fake(x)]
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def _check_kernel(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, options: Options) -> None:
    """NotImplementedError unless a kernel has what is asked for; where heads travel a log-sum-exp brings its gradient along."""
    d_lse = options.return_attn_probs and inner_of(recipe, transport_of(recipe.group)) > 1
    there = {"alibi": options.alibi_slopes is not None, "bias": options.bias is not None, "d_lse": d_lse}
    kernel_for(recipe, q, k, v, there)


def check_extras(q: Tensor, options: Options, total_k: int) -> None:
    """ValueError unless the tensors and numbers besides q, k and v fit them."""
    heads, batch = q.shape[-2], q.shape[0] if q.dim() == 4 else 1
    rows = q.shape[q.dim() - 3]
    allowed: dict[str, list[tuple[int, ...]]] = {
        "alibi_slopes": [(heads,), (batch, heads), (1, heads)],
        "learnable_sink": [(heads,)],
        "bias": [(heads, rows, total_k), (1, rows, total_k)],
    }
    for name, shapes in allowed.items():
        x = getattr(options, name)
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if tuple(x.shape) not in shapes or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}; give floats {' or '.join(map(str, dict.fromkeys(shapes)))}"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: give one device")
    most = torch.finfo(sum_dtype(q.dtype)).max  # in which scores are made
    for name, number in (("softmax_scale", options.softmax_scale), ("softcap", options.softcap)):
        if number is not None and abs(number) > most:
            raise ValueError(f"{name}={number!r}: give at most {most:.3g}, with {q.dtype}")
    if options.far is not None and q.shape[-1] % 2:
        raise ValueError(f"q and k have {q.shape[-1]} features; piecewise attention takes two halves")


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_plain(*tensors: Tensor | None) -> None:
    """ValueError for DTensors, and for tensors that are not dense."""
    if odd := [x for x in tensors if isinstance(x, Tensor) and (x.is_nested or x.layout != torch.strided)]:
        kind = "a nested tensor" if odd[0].is_nested else f"a tensor of layout {odd[0].layout}"
        raise ValueError(f"{kind}: give dense ones; rows of several lengths end to end, with cu_seqlens")
    if any(isinstance(x, DTensor) for x in tensors):
        raise ValueError(
            "DTensors: call a wrap_* op with q, k and v that are DTensors, whose placements it reads, or pass x.to_local() of each"
        )


def check_tensors(**given: object) -> None:
    """ValueError unless all are tensors."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: give a tensor")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q, k and v fit together, with what came and what is allowed."""
    check_tensors(q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() not in (3, 4) or k.dim() != q.dim() or v.dim() != q.dim():
        raise ValueError(f"{shapes}: give all [B, L, H, D], or all packed [T, H, D]")
    if q.shape[0] != k.shape[0] and q.dim() == 4:
        raise ValueError(f"{shapes}: q, k and v must have one batch size")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"{shapes}: k and v must agree in all but the head dim")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: q and k must have one head dim")
    if q.shape[-2] == 0 or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{shapes}: the {q.shape[-2]} query heads must be a positive multiple of the {k.shape[-2]} key heads")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"{shapes}: head dims must be positive")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: give one floating dtype of {names}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: give one device")


def check_differentiable(*tensors: Tensor | None) -> None:
    """NotImplementedError under forward-mode differentiation, of which torch's custom ops know nothing: tangents would be zeros.

    Where a graph is traced tangents are not known, only that there may be some.
    """
    if torch.compiler.is_compiling():
        forward_mode = getattr(forward_ad, "_current_level", -1) >= 0
    else:
        forward_mode = any(isinstance(x, Tensor) and unpack_dual(x).tangent is not None for x in tensors)
    if forward_mode:
        raise NotImplementedError("forward-mode differentiation (jvp) of a sequence that ranks share: take gradients backward")


def check_names(recipe: Recipe) -> None:
    """ValueError for an unknown layout, transport or kernel, listing the known."""
    check_layout(recipe.layout)
    check_transport(recipe.transport)
    kernels.check_kernel(recipe.kernel)
    if recipe.transport == ALL_TO_ALL and is_grid(recipe.group):
        raise ValueError("transport='all_to_all' over a grid: heads travel within its teams anyway; say how rows go between them")
    if not isinstance(recipe.heads_stride, Integral) or recipe.heads_stride < 0:
        raise ValueError(f"heads_k_stride={recipe.heads_stride!r}: give a number of key heads >= 1, or 0 for all")


def host_table(name: str, cu_seqlens: Tensor | None) -> Tensor | None:
    """Document boundaries on the CPU, read once; ValueError unless they are a 1-D integer tensor."""
    if cu_seqlens is None:
        return None
    check_table(name, cu_seqlens)
    return on_host(cu_seqlens)


def check_table(name: str, cu_seqlens: Tensor) -> None:
    """ValueError unless these are document boundaries by their kind."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name} must be an int32 tensor, got {type(cu_seqlens).__name__}")
    check_plain(cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
        raise ValueError(f"{name} must be a 1-D int32 tensor, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}")


def _slices(mask: Mask, total_q: int, total_k: int, parts: int) -> Tensor:
    if mask.num_parts != 1 or parts != 1:
        raise ValueError(
            f"a Mask of {mask.num_parts} parts, features in {parts}: a Mask here is of one; take wrap_piecewise_attn_func"
        )
    if (mask.q_len, mask.k_len) != (total_q, total_k):
        raise ValueError(f"the mask is over {mask.q_len} queries and {mask.k_len} keys, the tokens are {total_q} and {total_k}")
    return torch.from_numpy(mask.table.copy())


def check_boundaries(cu_seqlens: Tensor, length: int | None) -> np.ndarray:
    """Document boundaries that must be there, read once, as `check_cu_seqlens` gives them."""
    check_table("cu_seqlens", cu_seqlens)
    return check_cu_seqlens("cu_seqlens", on_host(cu_seqlens).numpy(), length)


@torch.compiler.disable
def check_documents(cu_seqlens: Tensor, max_seqlen: int, tokens: int | None = None) -> np.ndarray:
    """The boundaries of the documents in `tokens` (any number for None); ValueError where `max_seqlen` is below the longest."""
    cu = check_boundaries(cu_seqlens, tokens)
    longest = int(np.diff(cu).max(initial=0))
    if not _is_number(max_seqlen) or max_seqlen < longest:
        raise ValueError(f"max_seqlen={max_seqlen!r}, but the longest document of cu_seqlens has {longest} tokens")
    return cu


@torch.compiler.assume_constant_result
def group_name(group: Group) -> str:
    """The name by which the op finds a group; ``local:1`` where this process is alone.

    Raises:
        ValueError: this process is not in the group, or the ranks given are not ranks of the default group.
    """
    if group is None or not isinstance(group, Sequence):
        group = member_of(group)
        if group is None:
            return "local:1"
    if not isinstance(group, dist.ProcessGroup):
        ranks = isinstance(group, Sequence) and not isinstance(group, str) and all(isinstance(rank, int) for rank in group)
        if not ranks or not group:
            raise ValueError(f"process_group must be a ProcessGroup, global ranks or None, got {group!r}")
        group = _group_of(tuple(group))
    return "local:1" if group.size() == 1 else group.group_name


def grid_name(groups: Sequence[dist.ProcessGroup]) -> str:
    """The name of no group, of one, or of a grid's two: ranks of one place in each team, ranks of a team."""
    if len(groups) < 2:
        return group_name(groups[0]) if groups else "local:1"
    return GRID.join(group.group_name for group in groups)


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The first group that was made of these global ranks.

    None is made here: that takes every rank of the world, or torch's own agreement on a name, which fails among ranks that have
    been in different numbers of groups; either would hang.
    """
    if not dist.is_initialized():
        raise ValueError(f"process_group={ranks}: call torch.distributed.init_process_group before naming ranks")
    if sorted(set(ranks)) != list(ranks) or ranks[0] < 0 or ranks[-1] >= dist.get_world_size():
        raise ValueError(f"process_group={ranks}: give ascending, different ranks below the world size {dist.get_world_size()}")
    if dist.get_rank() not in ranks:
        raise ValueError(f"process_group={ranks}: this is rank {dist.get_rank()}, which is not in it")
    for group in dist.distributed_c10d._world.pg_group_ranks:
        if dist.get_process_group_ranks(group) == list(ranks):
            return group
    raise ValueError(
        f"process_group={ranks}: no group of these ranks has been made; call torch.distributed.new_group({list(ranks)}) on every "
        "rank of the world first"
    )
