"""The public names: signatures as api.md gives them, docstrings, and specs that say what the ops do."""

from __future__ import annotations

import doctest
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import nnscaler_ring
from nnscaler_ring import ContextParallel, core
from nnscaler_ring.annotations.spec import CUTS, SPECS
from tests.test_bad_input import ALL, arguments, tensors
from tests.test_functional import packings
from tests.test_ops import OPS, probs
from tests.worlds import whole

LAST = "window_size=(-1, -1), alibi_slopes=None, deterministic=False, return_attn_probs=False"
TAIL = f"dropout_p=0.0, softmax_scale=None, causal=False, {LAST}"
WRAP = f"softmax_scale=None, dropout_p=0.0, causal=True, {LAST}"
CP = "cp_group=None, cp_size=None, cp_local_rank=None, cp_prev_global_rank=None, cp_next_global_rank=None, softmax_scale=None"
LLAMA3 = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice"

# Parameters as api.md writes them, in its sections 1, 2, 3 and 6; what follows them here must be keyword-only.
SIGNATURES: dict[str, str] = {
    **dict.fromkeys(
        ("wrap_ring_attn_func", "wrap_zigzag_attn_func", "wrap_stripe_attn_func", "wrap_ulysses_attn_func"),
        f"q, k, v, {WRAP}, process_group=None",
    ),
    "wrap_ring_attn_varlen_func": f"q, k, v, cu_seqlens_q, cu_seqlens_k, {TAIL}, process_group=None",
    "wrap_sliding_window_attn_func": "q, k, v, window_size, softmax_scale=None, dropout_p=0.0, causal=True",
    "wrap_streaming_llm_attn_func": "q, k, v, window_size, num_sinks=1, softmax_scale=None",
    **{
        name: f"{first}, {TAIL}, group=None"
        for base in ("ring_flash_attn", "zigzag_ring_flash_attn", "stripe_flash_attn", "intel_ring_flash_attn")
        for name, first in zip(packings(base), ("q, k, v", "q, kv", "qkv"), strict=True)
    },
    **{
        name: f"{first}, cu_seqlens, max_seqlen, {TAIL}, group=None"
        for base in ("ring_flash_attn_varlen", "zigzag_ring_flash_attn_varlen")
        for name, first in zip(packings(base), ("q, k, v", "q, kv", "qkv"), strict=True)
    },
    "llama3_flash_attn_prepare_cu_seqlens": "cu_seqlens, causal, rank, world_size",
    **{
        name: f"{first}, {LLAMA3}, {TAIL}, group=None"
        for name, first in zip(packings("llama3_flash_attn_varlen"), ("q, k, v", "q, kv", "qkv"), strict=True)
    },
    "ring_sliding_window_attn": f"q, k, v, window_size, {CP}",
    "ring_sliding_window_attn_varlen": f"q, k, v, window_size, cu_seqlens, {CP}",
    "ring_streaming_llm_attn": f"q, k, v, window_size, {CP}",
    "ring_streaming_llm_attn_varlen": f"q, k, v, window_size, cu_seqlens, {CP}",
    "flash_attention": "q, k, v, causal=False, sm_scale=None, return_log_normalizer=False, return_total_attention=False",
    "piecewise_attention": "q1, k1, q2, k2, v, dist_threshold, causal=False, sm_scale=None",
    "wrap_piecewise_attn_func": "q1, k1, q2, k2, v, dist_threshold, causal=False, softmax_scale=None",
    "substitute_hf_flash_attn": "process_group, heads_k_stride=1",
    "update_ring_flash_attn_params": "cu_seqlens, process_group",
    "use_ring_attn": "flag",
    "setup_mpi_distributed": "backend=None",
    "cleanup_distributed": "",
    "core.update_out_and_lse": "out, lse, block_out, block_lse, slice_=None",
    "core.flatten_varlen_lse": "lse, cu_seqlens",
    "core.unflatten_varlen_lse": "lse, cu_seqlens, max_seqlen",
    "core.RingComm.send_recv": "self, to_send, recv_tensor=None",
    "core.RingComm.send_recv_kv": "self, k, v, k_buffer=None, v_buffer=None",
    "core.RingComm.commit": "self",
    "core.RingComm.wait": "self",
    "core.AllGatherComm": "group=None",
    "core.AllGatherComm.all_gather": "self, output, input",
    "core.AllGatherComm.wait": "self",
}
# What api.md leaves open: the name of a length, a default where it shows none, what follows "..." in it.
LENIENT: dict[str, str] = {
    "core.RingComm": "process_group",
    "ContextParallel": "group_or_mesh, layout='contiguous', transport='auto', kernel='auto'",
    "ContextParallel.shard": "self, x, dim",
    "ContextParallel.unshard": "self, x, dim",
    "ContextParallel.position_ids": "self, seq_len",
    "ContextParallel.attention": "self, q, k, v, mask='causal', softmax_scale=None",
}
ELLIPSIS = ("wrap_sliding_window_attn_func", "wrap_streaming_llm_attn_func", "wrap_piecewise_attn_func")
BY_KEYWORD = {"wrap_ring_attn_varlen_func": {"bias": None}}


def find(path: str) -> Callable[..., Any]:
    found: Any = nnscaler_ring
    for part in path.split("."):
        found = getattr(found, part)
    return found


def parameters(text: str) -> list[tuple[str, Any]]:
    space: dict[str, Any] = {}
    exec(f"def function({text}): pass", space)
    return [(p.name, p.default) for p in inspect.signature(space["function"]).parameters.values()]


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path: str) -> None:
    every = list(inspect.signature(find(path)).parameters.values())
    positional = [p for p in every if p.kind is p.POSITIONAL_OR_KEYWORD]
    told = parameters(SIGNATURES[path])
    shown = positional[: len(told)] if path in ELLIPSIS else positional
    assert [(p.name, p.default) for p in shown] == told
    assert not [p.name for p in every if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    rest = {p.name: p.default for p in every if p.kind is p.KEYWORD_ONLY}
    assert inspect.Parameter.empty not in rest.values(), "a keyword-only argument without a default breaks the contract"
    assert BY_KEYWORD.get(path, {}).items() <= rest.items()


@pytest.mark.parametrize("path", LENIENT)
def test_signature_that_is_wider(path: str) -> None:
    every = list(inspect.signature(find(path)).parameters.values())
    for have, (name, default) in zip(every, parameters(LENIENT[path]), strict=False):
        assert have.name == name and (default is inspect.Parameter.empty or have.default == default)
    stated = len(parameters(LENIENT[path]))
    assert len(every) >= stated and {p.kind for p in every[stated:]} <= {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    }


def test_every_public_name_has_its_signature_here() -> None:
    here = {path.split(".")[0] for path in (*SIGNATURES, *LENIENT)}
    assert here - {"core"} | {"Mask", "Slice"} == set(nnscaler_ring.__all__)
    assert {path.split(".")[1] for path in (*SIGNATURES, *LENIENT) if path.startswith("core.")} == set(core.__all__)


@pytest.mark.parametrize("name", ALL)
def test_positions_and_keywords_are_the_same_call(name: str) -> None:
    """Made functions bind like written ones: every argument by position, and by keyword."""
    torch.manual_seed(0)
    first = [torch.randn_like(x) for x in tensors(name)]
    signature = inspect.signature(find(name))
    bound = signature.bind(*first, **arguments(name, 1))
    bound.apply_defaults()
    by_position = find(name)(*bound.args, **bound.kwargs)
    names = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    by_keyword = find(name)(**{key: bound.arguments[key] for key in names})
    assert torch.equal(by_position, by_keyword)
    with pytest.raises(TypeError):
        find(name)(*first, **arguments(name, 1), no_such_argument=1)


@pytest.mark.parametrize("path", [*nnscaler_ring.__all__, *(f"core.{name}" for name in core.__all__)])
def test_documented_under_its_own_name(path: str) -> None:
    name, function = path.split(".")[-1], find(path)
    if name == "substitute_hf_flash_attn":
        pytest.importorskip("transformers")
    assert function.__name__ == name and function.__doc__ and function.__module__.startswith("nnscaler_ring.")
    assert len(function.__doc__.splitlines()[0]) > 20
    examples = [each for each in doctest.DocTestFinder(recurse=False).find(function, name) if each.examples]
    if inspect.isfunction(function):
        assert examples, "no example"
        listed = re.findall(
            r"^ {4}(\w[\w, ]*): ", (inspect.getdoc(function) or "").partition("Args:")[2].partition("\n\n")[0], flags=re.MULTILINE
        )
        named = {each.strip() for line in listed for each in line.split(",")}
        assert named <= {*inspect.signature(function).parameters}, "describes what is no argument"
    runner = doctest.DocTestRunner(verbose=False)
    for each in examples:
        each.globs.update({"torch": torch, name: function, "dist": torch.distributed, **vars(nnscaler_ring), **vars(core)})
        report: list[str] = []
        assert not runner.run(each, out=report.append).failed, "".join(report)


# -- specs -----------------------------------------------------------------------------------------------------------------------

SIZES = {"batch": 2, "sequence": 24, "heads": 4, "dim": 8}


def test_specs_are_of_the_ops() -> None:
    wrapped = {name for name in nnscaler_ring.__all__ if name.startswith("wrap_")}
    assert set(SPECS) == set(OPS) == wrapped - {"wrap_piecewise_attn_func"}, "which is the ring op on features of two halves"
    assert all(spec.name == name for name, spec in SPECS.items())


@pytest.mark.parametrize("name", SPECS)
def test_spec_agrees_with_the_op(name: str) -> None:
    spec, signature = SPECS[name], inspect.signature(find(name)).parameters
    assert list(spec.inputs)[:3] == ["q", "k", "v"]
    extras = ("alibi_slopes", "learnable_sink", "bias")
    tensors_of_the_op = [x for x in signature if x in ("q", "k", "v") or x.startswith("cu_seqlens")]
    assert list(spec.inputs) == tensors_of_the_op + [x for x in extras if x in signature]
    for each in OPS[name]:
        truth = whole(each.shape, each.seen, each.scale)
        answer = each(truth.q, truth.k, truth.v, return_attn_probs=True)
        keys = {**SIZES, "heads": each.shape.heads_k, "sequence": each.shape.seq_k or each.shape.seq, "batch": each.shape.batch}
        queries = {**SIZES, "heads": each.shape.heads, "batch": each.shape.batch}
        wide = {"dim": each.shape.dim_v}
        shown = {"q": (truth.q, queries), "k": (truth.k, keys), "v": (truth.v, {**keys, **wide})}
        shown |= {"out": (answer[0], {**queries, **wide}), "lse": (answer[1], queries)}
        for tensor, (x, sizes) in shown.items():
            dims = {**spec.inputs, "out": spec.out, "lse": spec.lse}[tensor]
            assert tuple(x.shape) == tuple(sizes[dim] for dim in dims), tensor
            assert [spec.dim(tensor, dim) for dim in dims] == list(range(len(dims)))
            assert spec.dim(tensor, "no such dim") is None
    assert any(probs(each) for each in OPS[name])


@pytest.mark.parametrize("name", SPECS)
def test_spec_says_what_may_be_cut(name: str) -> None:
    spec = SPECS[name]
    packed = "varlen" in name
    assert spec.cuttable == (("sequence", "heads") if packed else ("batch", "sequence", "heads"))
    assert set(spec.cuttable) <= set(CUTS) and "dim" not in CUTS
    words = spec.describe()
    for cut, tensor in itertools.product(spec.cuttable, "qkv"):
        assert cut in words and f"{tensor} on dim {spec.dim(tensor, cut)}" in words
    assert "replicated" in words
    for table in (x for x in spec.inputs if x.startswith("cu_seqlens")):
        assert spec.inputs[table] == (), "every rank has the boundaries whole"
    assert spec.layout == {"wrap_zigzag_attn_func": "zigzag", "wrap_stripe_attn_func": "stripe"}.get(name, "contiguous")
    with pytest.raises(TypeError):
        SPECS[name] = spec  # type: ignore[index]


def test_context_is_a_small_value() -> None:
    cp = ContextParallel()
    assert (cp.rank, cp.world_size) == (0, 1) and "contiguous" in repr(cp)
