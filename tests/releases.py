"""Releases of libraries that are not installed here, as data: their functions' parameters, results and conventions.

A stand-in has what a release has and refuses what it refuses, and computes by the reference on CPU. The parameters are those of the
sources named at each, names, order and defaults. What a stand-in cannot show is the library's own kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor, library

from nnscaler_ring.core.kernels import Grad, Kernel, Scores
from nnscaler_ring.core.kernels.flash_attn import FlashAttn2
from nnscaler_ring.core.kernels.flash_attn_cute import FlashAttn4
from nnscaler_ring.core.kernels.flash_attn_hopper import FlashAttn3
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.kernels.transformer_engine import TransformerEngine
from tests import oracle


class Release(NamedTuple):
    """A release: where its functions are, their parameters, and what its stand-in is made of.

    Attributes:
        name: of the test.
        kernel: the adapter.
        installed: distribution and version, or None where it is found by its module.
        module: what has the functions.
        functions: parameters by name of the function.
        body: what they do, from the function's name and arguments.
        op: the namespace of torch ops that the functions are, if they are.
    """

    name: str
    kernel: Kernel
    installed: tuple[str, str] | None
    module: str
    functions: dict[str, str]
    body: Callable[[str, dict[str, Any]], Any]
    op: str = ""


# -- attention by the reference ----------------------------------------------------------------------------------------------------


def spans_of(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> np.ndarray:
    """Spans of ``[B, rows, H, D]``, or of ``[1, T, H, D]`` with boundaries."""
    if cu_q is None or cu_k is None:
        return np.array([(0, q.shape[1], 0, k.shape[1])])
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert cu_q[-1] == q.shape[1] and cu_k[-1] == k.shape[1], "boundaries end with the rows"
    return np.stack([cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]], axis=1)


def attend(q, k, v, cu_q, cu_k, window, scale, softcap, nothing: float) -> tuple[Tensor, Tensor]:
    """out and lse in fp32; rows that see nothing have an out of 0 and a lse of `nothing`."""
    packed = cu_q is not None
    q, k, v = ((x[None] if packed else x).float() for x in (q, k, v))
    out, lse = Reference().forward(q, k, v, spans_of(q, k, cu_q, cu_k), window, Scores(scale=scale, softcap=softcap))
    out = out.nan_to_num(nan=0.0)
    lse = lse.masked_fill(lse == -torch.inf, nothing)
    return (out[0], lse[0]) if packed else (out, lse)


def differentiate(d_out, q, k, v, out, lse, cu_q, cu_k, window, scale, softcap, d_lse=None) -> list[Tensor]:
    """dq, dk and dv in fp32."""
    packed = cu_q is not None
    read = [x[None] if packed else x for x in (q, k, v, out, d_out, lse)]
    q, k, v, out, d_out, lse = (x.float() for x in read)
    d_lse = d_lse[None] if packed and d_lse is not None else d_lse
    sums = oracle.sums((q, k, v))
    grad = Grad(q, out, d_out, lse, *sums, d_lse=d_lse)
    Reference().backward(grad, k, v, spans_of(q, k, cu_q, cu_k), window, Scores(scale=scale, softcap=softcap))
    return [x.total()[0] if packed else x.total() for x in sums]


def check_tensors(*tensors: Tensor, width: int | None = 8) -> None:
    """As every GPU kernel here wants them."""
    assert len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in (torch.bfloat16, torch.float16)
    for x in tensors:
        assert x.stride(-1) == 1, "the last dim is contiguous"
        assert width is None or x.shape[-1] % width == 0, "head dims are padded"
        starts = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        assert all(start % 8 == 0 for start in (*starts, x.storage_offset())), "rows start at 16 bytes"


def window_of(given: dict[str, Any], none: int | None = -1) -> tuple[int, int]:
    """The window as flash-attn takes it: aligned at the last row and key; causal closes the right side."""
    left, right = given["window_size"] if "window_size" in given else (given["window_size_left"], given["window_size_right"])
    assert all(side == none or side >= 0 for side in (left, right))
    right = 0 if given.get("causal", given.get("is_causal")) else right
    return (-1 if left == none else left), (-1 if right == none else right)


def pad_lse(lse: Tensor, counts: list[int]) -> Tensor:
    """``[H, T]`` as ``[n, H, rows]``, which flash-attn had before 2.6; what fills it is no log-sum-exp."""
    return torch.stack([torch.nn.functional.pad(x, (0, max(counts) - x.shape[1]), value=7.0) for x in lse.split(counts, 1)])


def cut_lse(lse: Tensor, counts: list[int]) -> Tensor:
    """``[n, H, rows]`` as ``[H, T]``."""
    return torch.cat([x[:, :count] for x, count in zip(lse, counts, strict=True)], 1)


# -- flash-attn 2 ------------------------------------------------------------------------------------------------------------------


def flash_attn_2(given: dict[str, Any], results: int, padded: bool, name: str) -> Any:
    """Releases 2.5 .. 2.8. Source: ``flash_attn/flash_attn_interface.py`` and ``csrc/flash_attn/flash_api.cpp`` of these tags."""
    q, k, v = (given[each] for each in "qkv")
    check_tensors(q, k, v)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.dim() == (3 if "varlen" in name else 4)
    assert given["dropout_p"] == 0.0 and given["alibi_slopes"] is None and given.get("block_table") is None
    cu_q, cu_k = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    if cu_q is not None:
        counts = cu_q.diff().tolist()
        assert given["max_seqlen_q"] == max(counts) and given["max_seqlen_k"] == cu_k.diff().max(), "they size the grid"
    how = (cu_q, cu_k, window_of(given), given["softmax_scale"], given.get("softcap", 0.0))
    pads = padded and cu_q is not None
    if "forward" in name:
        out, lse = attend(q, k, v, *how, nothing=torch.inf)
        if pads:
            lse = pad_lse(lse, counts)
        out, rest = out.to(q.dtype), q.new_empty(0)
        return (out, q.clone(), k, v, out, lse, None, None) if results == 8 else (out, lse, rest, rest.clone())
    d_out, lse, out = given["dout"], given["softmax_lse"], given["out"]
    check_tensors(d_out, out, q)
    assert lse.dtype == torch.float32 and lse.is_contiguous() and isinstance(given["deterministic"], bool)
    wanted = (len(counts), q.shape[1], max(counts)) if pads else (q.shape[1], q.shape[0]) if cu_q is not None else None
    assert lse.shape == (wanted or (q.shape[0], q.shape[2], q.shape[1]))
    if pads:
        lse = cut_lse(lse, counts)
    grads = differentiate(d_out, q, k, v, out, lse, *how)
    for into, grad in zip((given["dq"], given["dk"], given["dv"]), grads, strict=True):
        into.copy_(grad)
    return (given["dq"], given["dk"], given["dv"], None) if results == 8 else torch.empty(0)


def release_2(
    version: str,
    *,
    window: str,
    results: int,
    block_table: str = "",
    softcap: str = "",
    op: bool = False,
    varlen: str = "",
    more: str = "",
) -> Release:
    """A release of flash-attn 2; parameters as in the source, with annotations where it is an op of torch."""
    sizes, cu = "max_seqlen_q: int, max_seqlen_k: int", "cu_seqlens_q: Tensor, cu_seqlens_k: Tensor"
    cap, sides = softcap and f"{softcap}, ", window
    qkv, scale = "q: Tensor, k: Tensor, v: Tensor", "dropout_p: float, softmax_scale: float, causal: bool"
    end = "alibi_slopes: Optional[Tensor], return_softmax: bool"
    backward = "dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, "
    backward += "dq: Optional[Tensor], dk: Optional[Tensor], dv: Optional[Tensor]"
    last = "alibi_slopes: Optional[Tensor], deterministic: bool, rng_state: Optional[Tensor] = None"
    functions = {
        "_flash_attn_forward": f"{qkv}, {scale}, {sides}, {cap}{end}",
        "_flash_attn_varlen_forward": f"{qkv}, {cu}, {sizes}, {scale}, {varlen or f'{sides}, {cap}{end}'}{block_table}",
        "_flash_attn_backward": f"{backward}, {scale}, {sides}, {cap}{last}",
        "_flash_attn_varlen_backward": f"{backward}, {cu}, {sizes}, {scale}, {sides}, {cap}{last}{more}",
    }
    body = functools.partial(flash_attn_2, results=results, padded=not softcap)
    return Release(
        *(f"flash-attn {version}", FlashAttn2(), ("flash_attn", version), "flash_attn.flash_attn_interface", functions),
        *(lambda name, given: body(given, name=name), "flash_attn" if op else ""),
    )


BOTH = "window_size"
SIDES = "window_size_left: int, window_size_right: int"
OPTIONAL = ", block_table: Optional[Tensor] = None, leftpad_k: Optional[Tensor] = None, seqused_k: Optional[Tensor] = None"
LATER: dict[str, Any] = {
    "window": SIDES,
    "softcap": "softcap: float",
    "varlen": "window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, "
    "alibi_slopes: Optional[Tensor] = None, return_softmax: bool = False",
}
ZERO = ", zero_tensors: bool = False"
RELEASES_2 = [
    release_2("2.5.6", window=BOTH, results=8),
    release_2("2.5.9", window=BOTH, block_table=", block_table", results=8),
    release_2("2.6.0", window=BOTH, block_table=", block_table", softcap="softcap", results=8),
    release_2("2.6.1", window=BOTH, block_table=", block_table=None, leftpad_k=None", softcap="softcap", results=8),
    release_2("2.7.0.post2", block_table=OPTIONAL, results=4, op=True, **LATER),
    release_2("2.8.3", block_table=f"{OPTIONAL}{ZERO}", results=4, op=True, more=ZERO, **LATER),
    # As on the main branch in August 2026:
    release_2("2.8.4", block_table=f"{OPTIONAL}{ZERO}, num_splits: int = 0", results=4, op=True, more=ZERO, **LATER),
]


# -- flash-attn 3 ------------------------------------------------------------------------------------------------------------------


def flash_attn_3(name: str, given: dict[str, Any]) -> Any:
    """Source: ``hopper/flash_attn_interface.py`` and ``hopper/flash_api.cpp`` of the commits named below."""
    q, k, v = (given[each] for each in "qkv")
    check_tensors(q, k, v)
    unused = [
        n for n, x in given.items() if n.startswith(("k_new", "v_new", "page", "rotary_", "seq")) and n != "rotary_interleaved"
    ]
    assert all(given[each] is None for each in unused)
    cu_q, cu_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
    assert (cu_q is None) == (given["max_seqlen_q"] is None) == (q.dim() == 4)
    how = (cu_q, cu_k, window_of(given), given["softmax_scale"], given["softcap"])
    if "forward" in name:
        out, lse = attend(q, k, v, *how, nothing=-torch.inf)
        return out.to(q.dtype), lse, q.new_empty(0), q.new_empty(0)
    check_tensors(given["dout"], given["out"], q)
    lse = given["softmax_lse"]
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert lse.shape == ((q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0]))
    grads = differentiate(given["dout"], q, k, v, given["out"], lse, *how)
    for into, grad in zip((given["dq"], given["dk"], given["dv"]), grads, strict=True):
        into.copy_(grad)
    return torch.empty(0)


def release_3(
    commit: str, *, default: str, window: str, causal: str, chunk: str = "", first: bool = False, op: str = ""
) -> Release:
    """A commit of flash-attn 3; `default` follows the parameters that later got one."""
    sinks = ", sink_token_length=0" if first else ""
    scheduler = "" if first else "scheduler_metadata: Optional[Tensor] = None, "
    out = "out_" if default else "out"

    def tensors(*names: str) -> str:
        return ", ".join(f"{name}: Optional[Tensor]{default}" for name in names)

    def numbers(*names: str, kind: str = "int") -> str:
        return ", ".join(f"{name}: Optional[{kind}]{default}" for name in names)

    no = " = False" if default else ""
    rotary = ("rotary_cos", "rotary_sin", *(["seqlens_rotary"] if chunk else []), "q_descale", "k_descale", "v_descale")
    forward = [
        *("q: Tensor, k: Tensor, v: Tensor", tensors("k_new", "v_new", *["qv"] * (not first), out)),
        *(
            tensors("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k"),
            numbers("max_seqlen_q", "max_seqlen_k"),
        ),
        *(tensors("page_table", "kv_batch_idx", "leftpad_k", *rotary), numbers("softmax_scale", kind="float")),
        *(f"causal: bool{no}", f"{window}{sinks}{chunk}", "softcap: float = 0.0, rotary_interleaved: bool = True"),
        f"{scheduler}num_splits: int = 1, pack_gqa: Optional[bool] = None, sm_margin: int = 0",
    ]
    backward = [
        *("dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor",),
        *(tensors("cu_seqlens_q", "cu_seqlens_k", "sequed_q", "sequed_k"), numbers("max_seqlen_q", "max_seqlen_k")),
        *(tensors("dq", "dk", "dv"), numbers("softmax_scale", kind="float"), f"{causal}: bool{no}", f"{window}{sinks}"),
        *("softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0",),
    ]
    functions = {"_flash_attn_forward": ", ".join(forward), "_flash_attn_backward": ", ".join(backward)}
    return Release(f"flash-attn 3 {commit}", FlashAttn3(), None, "flash_attn_interface", functions, flash_attn_3, op)


TUPLE, TWO = "window_size=(-1, -1)", "window_size_left: int = -1, window_size_right: int = -1"
LAST = {"window": TWO, "causal": "is_causal", "chunk": ", attention_chunk: int = 0", "op": "flash_attn_3"}
RELEASES_3 = [
    release_3("7a802796 (January 2025)", default="", window=TUPLE, causal="causal", first=True),
    release_3("909eb7ce (April 2025)", default="", window=TUPLE, causal="causal", chunk=", attention_chunk=0"),
    release_3("c7697bbf (November 2025)", default="", **LAST),
    release_3("3fcde4b3 (November 2025 .. March 2026)", default=" = None", **LAST),
]


# -- flash-attn 4 ------------------------------------------------------------------------------------------------------------------


def flash_attn_4(name: str, given: dict[str, Any], results: int) -> Any:
    """Source: ``flash_attn/cute/interface.py`` of these tags; 4.0.0b36 as in the wheel."""
    q, k, v = (given[each] for each in "qkv")
    check_tensors(q, k, v)
    width, width_v = q.shape[-1], v.shape[-1]
    assert width == k.shape[-1] and ((width == width_v and (width <= 128 or width in (192, 256))) or (width, width_v) == (192, 128))
    assert all(given.get(each) is None for each in ("qv", "seqused_q", "page_table", "learnable_sink", "score_mod", "mask_mod"))
    cu_q, cu_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
    assert (cu_q is None) == (q.dim() == 4)
    how = (cu_q, cu_k, window_of(given, none=None), given["softmax_scale"], given["softcap"] or 0.0)
    if name == "_flash_attn_fwd":
        out, lse = attend(q, k, v, *how, nothing=-torch.inf)
        return (out.to(q.dtype), lse if given["return_lse"] else None, None, None, None)[:results]
    lse, dlse = given["lse"], given["dlse"]
    check_tensors(given["dout"], given["out"], width=None)
    for x in (lse, *([] if dlse is None else [dlse])):
        assert x.dtype == torch.float32 and x.is_contiguous()
        assert x.shape == ((q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0]))
    grads = differentiate(given["dout"], q, k, v, given["out"], lse, *how, d_lse=dlse)
    return tuple(grad.to(q.dtype) for grad in grads)


FWD_4 = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None, "
    "window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, "
    "num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, "
    "out=None, lse=None, aux_tensors=None"
)
BWD_4 = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None, "
    "m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, "
    "dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, "
    "cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, "
    "dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None"
)
DESCALE, SCHEDULE = "q_descale=None, k_descale=None, v_descale=None", "scheduler_metadata=None, seqlen_k_per_split=None"


def release_4(version: str, forward: str, backward: str, results: int) -> Release:
    """A release of flash-attn-4; `forward` and `backward` are the parameters that were added to those of 4.0.0b9."""
    functions = {"_flash_attn_fwd": f"{FWD_4}{forward}", "_flash_attn_bwd": f"{BWD_4}{backward}"}
    body = functools.partial(flash_attn_4, results=results)
    return Release(f"flash-attn {version}", FlashAttn4(), ("flash_attn_4", version), "flash_attn.cute.interface", functions, body)


RELEASES_4 = [
    release_4("4.0.0b9", ", gather_kv_indices=None", ", block_sparse_tensors=None, dlse=None", 2),
    release_4(
        *("4.0.0b19", f", aux_scalars=None, {DESCALE}, gather_kv_indices=None"),
        *(", aux_scalars=None, block_sparse_tensors=None, dlse=None", 4),
    ),
    release_4(
        *("4.0.0b27", f", aux_scalars=None, {DESCALE}, gather_kv_indices=None, {SCHEDULE}, disable_scheduler_metadata=False"),
        *(", aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None", 4),
    ),
    release_4(
        "4.0.0b36",
        f", aux_scalars=None, {DESCALE}, gather_kv_indices=None, {SCHEDULE}, disable_scheduler_metadata=False, "
        "gather_bwd_recompute_p=False",
        ", aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None",
        5,
    ),
]


# -- Transformer Engine ------------------------------------------------------------------------------------------------------------


def transformer_engine(name: str, given: dict[str, Any]) -> Any:
    """Source: ``transformer_engine/pytorch/cpp_extensions/fused_attn.py`` of these tags; masks as its docstrings have them."""
    q, k, v = (given[each] for each in "qkv")
    assert all(x.is_contiguous() for x in (q, k, v)), "a layout of three parts is of three contiguous tensors"
    check_tensors(q, k, v)
    assert given["fused_attention_backend"] == "arbitrary" and given["dropout"] == 0.0 and given["fake_dtype"] == q.dtype
    packed = given["qkv_layout"] == "thd_thd_thd"
    assert packed or given["qkv_layout"] == "bshd_bshd_bshd"
    form, mask, (left, right) = "thd" if packed else "bshd", given["attn_mask_type"], given["window_size"]
    assert given.get("o_format", form) == form
    cu_q, cu_k = given["cu_seqlens_q"], given["cu_seqlens_kv"]
    num_q, num_k = cu_q.diff(), cu_k.diff()
    assert mask.startswith("padding") == packed and given["max_seqlen_q"] == num_q.max() and given["max_seqlen_kv"] == num_k.max()
    kind = mask.removeprefix("padding").removeprefix("_") if packed else mask
    if kind in ("", "no_mask"):
        assert (left, right) == (-1, -1)
    else:
        assert right == 0 and left >= -1 and kind in ("causal", "causal_bottom_right")
        assert kind == "causal_bottom_right" or torch.equal(num_q, num_k), "causal is aligned at the first row and key"
        assert (num_q <= num_k).all(), "it takes no more rows than keys"
    if packed:
        assert given["cu_seqlens_q_padded"] is cu_q and given["cu_seqlens_kv_padded"] is cu_k
    else:
        assert len(num_q) == len(q)
    how = ((cu_q, cu_k) if packed else (None, None), (left, right), given["attn_scale"], 0.0)
    if name == "fused_attn_fwd":
        assert given["is_training"], "else it has no log-sum-exp"
        out, lse = attend(q, k, v, *how[0], *how[1:], nothing=-torch.inf)
        stats = (lse.T if packed else lse).unsqueeze(-1).contiguous()
        return out.to(q.dtype), [stats, torch.zeros(2, dtype=torch.int64)]
    assert given.get("do_format", form) == form and given.get("dqkv_layout", given["qkv_layout"]) == given["qkv_layout"]
    assert given.get("dqkv_dtype", "te bf16") == "te bf16", "a dtype of its own"
    stats, state = given["aux_ctx_tensors"]
    assert stats.is_contiguous() and stats.dtype == torch.float32 and state.dtype == torch.int64 and state.shape == (2,)
    assert stats.shape == ((*q.shape[:2], 1) if packed else (q.shape[0], q.shape[2], q.shape[1], 1))
    assert given["o"].is_contiguous() and given["d_o"].is_contiguous()
    lse = stats.squeeze(-1).T if packed else stats.squeeze(-1)
    grads = differentiate(given["d_o"], q, k, v, given["o"], lse, *how[0], *how[1:])
    return [*(grad.to(q.dtype) for grad in grads), None]


def release_te(version: str, **differs: str) -> Release:
    """A release of Transformer Engine, by the parameters that it has besides those of 2.2.0, after what they follow."""
    start, kind = (
        "max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v",
        "attn_bias_type='no_bias', attn_mask_type='padding'",
    )
    padded, usual = "cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None", "attn_scale=None, dropout=0.0, fast_zero_fill=True"
    pages, window = "page_table_k=None, page_table_v=None", "window_size=(-1, -1)"
    has = {name: differs.get(name, "") for name in ("formats", "formats_back", "softmax", "diagonal", "end", "end_back")}
    forward = [
        *(
            "is_training",
            start,
            "fake_dtype, fused_attention_backend, attn_bias=None",
            padded,
            pages,
            "s_quantizer=None, o_quantizer=None",
        ),
        *(usual, "qkv_layout='sbh3d'", has["formats"], kind, has["softmax"], window, has["diagonal"], "rng_gen=None", has["end"]),
    ]
    backward = [
        *(start, "o, d_o, fake_dtype", differs.get("dtype", "dqkv_dtype"), "aux_ctx_tensors, fused_attention_backend", padded),
        *("s_quantizer=None, dp_quantizer=None, dqkv_quantizer=None", usual, "qkv_layout='sbh3d'", has["formats_back"], kind),
        *(has["softmax"], window, has["diagonal"], "deterministic=False", has["end_back"]),
    ]
    functions = {name: ", ".join(filter(None, each)) for name, each in (("fused_attn_fwd", forward), ("fused_attn_bwd", backward))}
    module = "transformer_engine.pytorch.cpp_extensions.fused_attn"
    return Release(
        *(f"transformer-engine {version}", TransformerEngine(), ("transformer_engine", version), module, functions),
        transformer_engine,
    )


GRAPH = {
    "softmax": "softmax_type='vanilla'",
    "end": "softmax_offset=None, return_max_logit=False, cuda_graph=False",
    "end_back": "cuda_graph=False",
}
RELEASES_TE = [
    release_te("2.2.0"),
    release_te("2.10.0", **GRAPH),
    release_te(
        "2.18.0",
        dtype="",
        diagonal="bottom_right_diagonal=None",
        formats="o_format='sbhd', qkv_scale_inv_format=None",
        formats_back="o_format='sbhd', do_format='sbhd', dqkv_layout='sbh3d', qkv_scale_inv_format=None, do_scale_inv_format=None",
        **GRAPH,
    ),
]

RELEASES = [*RELEASES_2, *RELEASES_3, *RELEASES_4, *RELEASES_TE]


def functions_of(release: Release) -> dict[str, Any]:
    """The stand-in's functions, ops of torch where the release has such."""
    made = {}
    for name, signature in release.functions.items():
        results = "tuple[Tensor, Tensor, Tensor, Tensor]" if "forward" in name else "Tensor"
        text = f"def {name}({signature}){f' -> {results}' if release.op else ''}:\n    return body({name!r}, dict(locals()))\n"
        space = {"Optional": Optional, "Tensor": Tensor, "body": release.body}
        exec(compile(text, f"<{release.name}>", "exec", dont_inherit=True), space)
        made[name] = space[name]
        if release.op:
            mutated = ("dq", "dk", "dv") if "backward" in name else ()
            made[name] = library.custom_op(f"stand_in_{release.op}::{name}", mutates_args=mutated, device_types="cpu")(space[name])
    return made
