"""What the public functions refuse, with which error and words: alone, and on every rank before any communication."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import nnscaler_ring
from nnscaler_ring import llama3_flash_attn_prepare_cu_seqlens
from nnscaler_ring.core.layout import zigzag
from nnscaler_ring.core.layouts import LAYOUTS
from tests.test_functional import DENSE, PREPARED, VARLEN, packings, stacked
from tests.test_ops import OPS
from tests.worlds import Seen, Shape, check_call, held, no_faults, place, refusal, told, whole

HF = {"substitute_hf_flash_attn", "update_ring_flash_attn_params", "use_ring_attn"}  # refused in test_transformers
ALL = sorted(
    name
    for name in set(nnscaler_ring.__all__) - HF
    if name.endswith(("_func", "_attn", "_attn_varlen")) and "piecewise" not in name
)
DOCUMENTS = (0, 3, 8)
LOCAL = 8
"""Tokens that each rank passes."""


def i32(*cu: int) -> Tensor:
    return torch.tensor(cu, dtype=torch.int32)


def takes(name: str, argument: str) -> bool:
    return argument in inspect.signature(getattr(nnscaler_ring, name)).parameters


def arguments(name: str, world_size: int) -> dict[str, Any]:
    """Good arguments besides q, k and v, for `LOCAL` tokens a rank."""
    total = LOCAL * world_size
    if name.startswith("llama3"):
        # The same on each rank: it reads the first of two documents, or a part of it, as its own.
        prepared = (i32(0, 3, LOCAL), i32(0, 3, LOCAL), 5, 5, slice(0, LOCAL))
        return {**dict(zip(PREPARED, prepared, strict=True)), "heads_k_stride": 1}
    given: dict[str, Any] = {"causal": True} if takes(name, "causal") else {}
    if takes(name, "window_size") and ("sliding" in name or "streaming" in name):
        given["window_size"] = 3
    if takes(name, "max_seqlen"):
        given |= {"cu_seqlens": i32(*DOCUMENTS), "max_seqlen": 5}
    elif name in ("ring_sliding_window_attn_varlen", "ring_streaming_llm_attn_varlen"):
        given["cu_seqlens"] = i32(0, 3, total)
    elif takes(name, "cu_seqlens_q"):
        given |= {"cu_seqlens_q": i32(0, 3, total), "cu_seqlens_k": i32(0, 3, total)}
    return given


def tensors(name: str, **sizes: int) -> tuple[Tensor, ...]:
    device, dtype = place()
    heads = 4 if "qkvpacked" in name else 2
    packed = "varlen" in name
    q_size, k_size = {"B": 2, "L": LOCAL, "H": 4, "D": 8}, {"B": 2, "L": LOCAL, "H": heads, "D": 8}
    dims = "LHD" if packed else "BLHD"
    q, k, v = (torch.zeros([{**size, **sizes}[d] for d in dims], device=device, dtype=dtype) for size in (q_size, k_size, k_size))
    return stacked(name, q, k, v)


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One mistake in an otherwise good call. `change` makes it: arguments by name, or a function of the tensors."""

    names: list[str] = field(repr=False)
    change: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[..., tuple[Tensor, ...]] | None = None
    kind: type[Exception] = ValueError
    words: list[str]

    def run(self, name: str, world_size: int) -> list[str]:
        given = arguments(name, world_size)
        given |= {key: value(world_size) if callable(value) else value for key, value in self.change.items()}
        passed = tensors(name)
        if self.spoil is not None:
            passed = self.spoil(*passed)
        faults = refusal(lambda: getattr(nnscaler_ring, name)(*passed, **in_group(name, given)), self.kind, self.words)
        return told(f"{name} {self}", faults)


def in_group(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The whole group where there is one; what a bad case says of groups stays."""
    key = next(key for key in ("group", "cp_group", "process_group") if takes(name, key))
    return {key: dist.group.WORLD, **given} if dist.is_initialized() else given


def having(*parameters: str) -> list[str]:
    return [name for name in ALL if all(takes(name, parameter) for parameter in parameters)]


PLAIN = [name for name in ALL if "packed" not in name]
TAIL = having("dropout_p")
TUPLE_WINDOW = [name for name in TAIL if "sliding" not in name and "streaming" not in name]
COUNT_WINDOW = [name for name in ALL if name not in TUPLE_WINDOW and name != "wrap_sliding_window_attn_func"]
CAUSAL_ONLY = [name for name in ALL if "zigzag" in name]
TABLES = [(name, key) for name in ALL for key in ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k") if takes(name, key)]
LAST = {name: LOCAL if takes(name, "max_seqlen") or name.startswith("llama3") else None for name in ALL}


def whole_row(name: str, *cu: int) -> Callable[[int], Tensor]:
    """Boundaries whose last is the end of the row that the function takes them for; -1 stands for it."""
    return lambda world_size: i32(*((LAST[name] or LOCAL * world_size) if x < 0 else x for x in cu))


def tables() -> Iterator[Bad]:
    for name, key in TABLES:
        say = "cu_seqlens" if key == "cu_seqlens" or name.startswith("llama3") else key
        yield Bad(names=[name], change={key: torch.tensor([0.0, 3.0, 8.0])}, words=[say, "int", "float32"])
        yield Bad(names=[name], change={key: i32(0, 3, LOCAL).reshape(1, 3)}, words=[say, "1-D"])
        yield Bad(names=[name], change={key: [0, 3, LOCAL]}, words=[say, "tensor", "list"])
        yield Bad(names=[name], change={key: whole_row(name, 0, 5, 3, -1)}, words=[say, "decrease", "5", "3"])
        yield Bad(names=[name], change={key: whole_row(name, 1, 3, -1)}, words=[say, "start at 0"])
        yield Bad(names=[name], change={key: i32(0, 3, 7)}, words=[say, "end at"])
        yield Bad(names=[name], change={key: i32(0, 99)}, words=[say, "99"])
        yield Bad(names=[name], change={key: torch.zeros(0, dtype=torch.int32)}, words=[say])
    for name in having("max_seqlen"):
        yield Bad(names=[name], change={"cu_seqlens": None}, words=["cu_seqlens", "tensor"])
        yield Bad(names=[name], change={"max_seqlen": 4}, words=["max_seqlen=4", "5"])
        yield Bad(names=[name], change={"max_seqlen": None}, words=["max_seqlen=None", "5"])
    for name in having("local_k_slice"):
        yield Bad(names=[name], change={"max_seqlen_q": 4}, words=["max_seqlen", "4", "5"])
        yield Bad(names=[name], change={"max_seqlen_k": 4}, words=["max_seqlen", "4", "5"])
        yield Bad(names=[name], change={"cu_seqlens_k": i32(0, LOCAL), "max_seqlen_k": LOCAL}, words=["documents", "agree"])
        yield Bad(names=[name], change={"local_k_slice": lambda n: slice(LOCAL * n - 7, LOCAL * n + 1)}, words=["local_k_slice"])
        yield Bad(names=[name], change={"local_k_slice": slice(0, LOCAL, 2)}, words=["local_k_slice"])
        for stride in (0, -1, 3, 8):
            yield Bad(names=[name], change={"heads_k_stride": stride}, words=[f"heads_k_stride={stride}", "key heads"])


def shapes() -> Iterator[Bad]:
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, k[..., :3], v), words=["k", "v", "head dim"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, k[..., :3], v[..., :3]), words=["q and k", "one head dim"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q[..., :3, :], k, v), words=["3 query heads", "a positive multiple of"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, k, v[..., :1, :]), words=["k and v must agree"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q[0, 0], k[0, 0], v[0, 0]), words=["give all"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, k, v[..., :0]), words=["head dims must be positive"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, k, v.narrow(-3, 0, 5)), words=["k and v must agree"])
    dense = [name for name in PLAIN if "varlen" not in name]
    yield Bad(names=dense, spoil=lambda q, k, v: (q[:1], k, v), words=["one batch size"])
    yield Bad(names=dense, spoil=lambda q, k, v: (q, k[:, :, 0], v[:, :, 0]), words=["give all"])
    yield Bad(names=list(OPS), spoil=lambda q, k, v: tuple(x[0] if x.dim() == 4 else x[None] for x in (q, k, v)), words=["dims"])
    kv, qkv = ([name for name in ALL if f"_{what}packed" in name] for what in ("kv", "qkv"))
    yield Bad(names=kv, spoil=lambda q, kv: (q, kv.repeat_interleave(2, -3)), words=["kv has shape", "2, heads, head dim"])
    yield Bad(names=qkv, spoil=lambda qkv: (qkv[..., :2, :, :],), words=["qkv has shape", "3, heads, head dim"])
    yield Bad(names=kv, spoil=lambda q, kv: (q, kv[..., 0, :]), words=["kv has shape"])
    varlen = [name for base in (*VARLEN, "llama3_flash_attn_varlen") for name in packings(base)][::3]
    yield Bad(names=varlen, spoil=lambda q, k, v: (q[None], k[None], v[None]), words=["tokens"])


def kinds() -> Iterator[Bad]:
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, k.half(), v), words=["float16", "one floating dtype"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q.int(), k.int(), v.int()), words=["int32", "floating"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, k, v.to("meta")), words=["meta", "one device"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q.to("meta"), k, v), words=["meta", "one device"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q, None, v), words=["k is a NoneType", "give a tensor"])
    yield Bad(names=PLAIN, spoil=lambda q, k, v: (q.tolist(), k, v), words=["q is a list", "give a tensor"])


def options() -> Iterator[Bad]:
    for value in (-0.1, 1.0, 1.5, float("nan")):
        yield Bad(names=TAIL, change={"dropout_p": value}, words=[f"dropout_p={value}", "[0, 1)"])
    lacking = NotImplementedError
    yield Bad(
        names=having("kernel", "dropout_p"),
        change={"dropout_p": 0.1, "kernel": "aten"},
        kind=lacking,
        words=["aten: it has no dropout"],
    )
    yield Bad(names=TAIL, change={"alibi_slopes": torch.ones(3)}, words=["alibi_slopes", "(3,)", "(4,)"])
    yield Bad(names=TAIL, change={"alibi_slopes": torch.ones(4, dtype=torch.int32)}, words=["alibi_slopes", "int32"])
    slopes = torch.ones(4, requires_grad=True)
    yield Bad(names=TAIL, change={"alibi_slopes": slopes}, kind=lacking, words=["alibi_slopes", "detach"])
    yield Bad(
        names=having("learnable_sink"), change={"learnable_sink": torch.ones(4, 1)}, words=["learnable_sink", "(4, 1)", "(4,)"]
    )
    yield Bad(names=having("bias"), change={"bias": torch.zeros(8, 8)}, words=["bias", "(8, 8)"])
    yield Bad(names=having("learnable_sink"), change={"learnable_sink": torch.ones(4, device="meta")}, words=["meta", "one device"])
    yield Bad(names=TAIL, change={"alibi_slopes": [1.0] * 4}, words=["alibi_slopes", "tensor", "list"])
    for value in ("a", torch.ones(3), float("nan"), float("inf")):
        yield Bad(names=having("softmax_scale"), change={"softmax_scale": value}, words=[f"softmax_scale={value!r}", "finite"])
    yield Bad(names=TAIL, change={"dropout_p": "a"}, words=["dropout_p='a'", "[0, 1)"])
    yield Bad(names=having("softcap"), change={"softcap": "a"}, words=["softcap='a'"])
    for value in (-1.0, float("nan"), float("inf")):
        yield Bad(names=having("softcap"), change={"softcap": value}, words=[f"softcap={value}"])
    for window in ((-2, 0), (0, -2), (1.5, 0), (3,), (1, 2, 3), 5):
        yield Bad(names=TUPLE_WINDOW, change={"window_size": window}, words=["window_size", "(left, right)", "-1 for no limit"])
    for window in (-2, (0, -5), (3,)):
        yield Bad(names=["wrap_sliding_window_attn_func"], change={"window_size": window}, words=["window_size"])
    yield Bad(names=COUNT_WINDOW, change={"window_size": -2}, words=["window_size"])
    yield Bad(names=having("num_sinks"), change={"num_sinks": -1}, words=["sinks=-1"])
    for flag in ("causal", "deterministic", "return_attn_probs"):
        for value in ("False", 0.125, 2, (-1, -1), [], torch.ones(2), object()):  # another argument in its place
            yield Bad(names=having(flag), change={flag: value}, words=[f"{flag}=", "give True or False"])
    yield Bad(names=having("return_attn_probs"), change={"return_attn_probs": None}, words=["return_attn_probs=None"])
    yield Bad(names=CAUSAL_ONLY, change={"causal": False}, words=["causal=False", "causal=True", "zigzag"])
    choices = {"layout": LAYOUTS, "transport": ["auto", "ring", "halo"], "kernel": ["auto", "aten", "reference"]}
    for argument, known in choices.items():
        told_all = [name for name in having(argument) if not (argument == "layout" and name in OPS)]
        yield Bad(names=told_all, change={argument: "magic"}, words=["'magic'", *known])
    natural = [name for name in having("layout") if name in OPS]
    yield Bad(names=natural, change={"layout": "magic"}, words=["'magic'", "'contiguous'"])
    per_rank = [name for name in having("layout") if name not in OPS]
    yield Bad(names=per_rank, change={"layout": zigzag(LOCAL, 1)}, words=["Layout", "zigzag", "ContextParallel"])
    yield Bad(names=["wrap_ring_attn_func"], change={"layout": "zigzag"}, words=["'zigzag'", "'contiguous'"])
    for key in ("cp_size", "cp_local_rank", "cp_prev_global_rank", "cp_next_global_rank"):
        yield Bad(names=having("cp_size"), change={key: 7}, words=[f"{key}=7", "cp_group"])
    yield Bad(names=having("seq_len"), change={"seq_len": 5}, words=["5 tokens"])
    yield Bad(names=having("seq_len"), change={"seq_len": 0}, words=["0"])
    yield Bad(names=having("seq_len"), change={"seq_len": -8}, words=["-8"])


KINDS = {kind.__name__: list(kind()) for kind in (tables, shapes, kinds, options)}
ALONE = [bad for each in KINDS.values() for bad in each]


@pytest.mark.parametrize("kind", KINDS)
def test_refused_alone(kind: str) -> None:
    assert all(bad.names for bad in KINDS[kind])
    no_faults([bad.run(name, 1) for bad in KINDS[kind] for name in bad.names])


def refused_together(rank: int, world_size: int) -> list[str]:
    """The same on every rank at once; then a barrier and a right call show that all are in step."""
    faults = [fault for bad in ALONE for name in bad.names for fault in bad.run(name, world_size)]
    for name in PLAIN:  # groups that are no groups of this rank
        key = next(key for key in ("group", "cp_group", "process_group") if takes(name, key))
        others = [r for r in range(world_size) if r != rank]
        for group, words in (
            (dist.GroupMember.NON_GROUP_MEMBER, ["not a member"]),
            (others, [f"this is rank {rank}", "not in it"]),
            ([0, world_size], ["ascending", "world size"]),
            ([1, 0], ["ascending"]),
            ([], ["process_group"]),
            ("world", ["process_group", "'world'"]),
        ):
            call = lambda n=name, g={key: group}: getattr(nnscaler_ring, n)(*tensors(n), **{**arguments(n, world_size), **g})  # noqa: E731
            faults += told((name, group), refusal(call, ValueError, words))
    dist.barrier()
    seen = Seen(causal=True)
    for base, layout in DENSE.items():
        function = getattr(nnscaler_ring, base + "_func")
        call = lambda q, k, v, run=function: run(q, k, v, causal=True)  # noqa: E731
        faults += told(base, check_call(call, whole(Shape(), seen), held(layout, 24, world_size, rank)))
    return faults


def test_refused_on_every_rank_before_any_communication(ranks) -> None:
    no_faults(ranks(2).run(refused_together))


def test_the_table_covers_every_function() -> None:
    assert {name for bad in ALONE for name in bad.names} == set(ALL)
    others = {"ContextParallel", "Mask", "Slice", "llama3_flash_attn_prepare_cu_seqlens"}
    others |= {"setup_mpi_distributed", "cleanup_distributed"}  # refused in test_launch
    others |= {"flash_attention", "piecewise_attention", "wrap_piecewise_attn_func"}  # refused in test_feature_fronts
    assert {*ALL, *others, *HF} == set(nnscaler_ring.__all__)


def test_ranks_named_without_a_group() -> None:
    assert not dist.is_initialized()
    call = lambda: nnscaler_ring.wrap_ring_attn_func(*tensors("wrap"), process_group=[0, 1])  # noqa: E731
    assert not refusal(call, ValueError, ["init_process_group"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((i32(0, 8), True, 2, 2), ["rank=2", "world_size=2"]),
        ((i32(0, 8), True, -1, 2), ["rank=-1"]),
        ((i32(0, 8), True, 0.5, 2), ["rank=0.5"]),
        ((i32(0, 8), "False", 0, 2), ["causal='False'", "True or False"]),
        ((i32(0, 7), True, 0, 2), ["7 tokens", "world_size=2"]),
        ((i32(1, 8), True, 0, 2), ["cu_seqlens", "start at 0"]),
        ((i32(0, 6, 4, 8), True, 0, 2), ["cu_seqlens", "decrease"]),
        ((torch.tensor([0.0, 8.0]), True, 0, 2), ["cu_seqlens", "float32"]),
        ((torch.zeros(0, dtype=torch.int32), True, 0, 2), ["cu_seqlens"]),
        (([0, 8], True, 0, 2), ["cu_seqlens", "list"]),
    ],
)
def test_prepare_refuses(given: Any, words: list[str]) -> None:
    assert not refusal(lambda: llama3_flash_attn_prepare_cu_seqlens(*given), ValueError, words)
