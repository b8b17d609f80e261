"""Every option of every public function reaches the op that computes: none is accepted and then lost on the way.

Where a front is compared with itself, on one process and on several, both would lack what it drops; and some options change nothing
that a CPU shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nnscaler_ring as nr
from nnscaler_ring.context import KNOWN
from nnscaler_ring.core.recipe import Recipe
from tests.test_bad_input import ALL, arguments, tensors
from tests.test_compile import needs_newer

HEADS = 4
OP = torch.ops.nnscaler_ring.attention.default


@dataclass(frozen=True)
class Reached:
    """What the op got: a tensor or None, or a plain value; of a graph the tensors are its nodes."""

    args: Sequence[Any]

    @property
    def recipe(self) -> Recipe:
        return Recipe.parse(self.args[-1])

    def of(self, name: str) -> Any:
        at = {"slices": 5, "alibi_slopes": 6, "bias": 7, "learnable_sink": 8, "softmax_scale": 11, "dropout_seed": 12}
        return self.args[at[name]]


class Watch(TorchDispatchMode):
    """What the op gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Reached] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OP:
            self.calls.append(Reached(args))
        return func(*args, **(kwargs or {}))


def eager(call: Callable[..., Any], given: Sequence[Tensor]) -> Reached:
    with Watch() as seen:
        call(*given)
    (reached,) = seen.calls
    return reached


def compiled(call: Callable[..., Any], given: Sequence[Tensor]) -> Reached:
    """In a graph: ``torch.compile`` finds the options by another way."""
    found = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.extend(Reached(node.args) for node in graph.graph.nodes if "attention" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend=keep)(*given)
    (reached,) = found
    return reached


def _mask(field: str) -> Callable[[Reached], Any]:
    """A field of the mask; what llama3 knows of it, it says in slices."""

    def look(x: Reached) -> Any:
        if x.of("slices") is None:
            return getattr(x.recipe, field)
        low, high = (int(n) for n in x.of("slices")[0, 4:6])
        return {"causal": high == 0, "window": (-low, high)}[field]

    return look


SLOPES, SINK = torch.rand(HEADS), torch.rand(HEADS)
DROPPED = {"dropout_p": 0.25, "dropout_seed": 7}
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[Reached], Any]]] = {
    "softmax_scale": ({"softmax_scale": 0.37}, lambda x: x.of("softmax_scale")),
    "sm_scale": ({"sm_scale": 0.37}, lambda x: x.of("softmax_scale")),
    "dropout_p": (DROPPED, lambda x: x.recipe.dropout),
    "dropout_seed": (DROPPED, lambda x: x.of("dropout_seed")),
    "causal": ({"causal": True}, _mask("causal")),
    "window_size": ({"window_size": (5, 0), "causal": True}, _mask("window")),
    "deterministic": ({"deterministic": True}, lambda x: x.recipe.deterministic),
    "return_attn_probs": ({"return_attn_probs": True}, lambda x: x.recipe.returns_lse),
    "return_log_normalizer": ({"return_log_normalizer": True}, lambda x: x.recipe.returns_lse),
    "softcap": ({"softcap": 2.5}, lambda x: x.recipe.softcap),
    "alibi_slopes": ({"alibi_slopes": SLOPES}, lambda x: x.of("alibi_slopes")),
    "learnable_sink": ({"learnable_sink": SINK}, lambda x: x.of("learnable_sink")),
    "bias": ({"bias": torch.rand(1, 8, 8)}, lambda x: x.of("bias")),
    "transport": ({"transport": "all_gather"}, lambda x: x.recipe.transport),
    "kernel": ({"kernel": "reference"}, lambda x: x.recipe.kernel),
    "heads_k_stride": ({"heads_k_stride": 2}, lambda x: x.recipe.heads_stride),
    "num_sinks": ({"num_sinks": 3}, lambda x: x.recipe.sinks),
    "sinks": ({"sinks": 3}, lambda x: x.recipe.sinks),
    "prefix": ({"prefix": 3}, lambda x: x.recipe.prefix),
    "dist_threshold": ({"dist_threshold": 3}, lambda x: x.recipe.far),
}
"""What is passed for an option, and where it is seen."""


@dataclass(frozen=True)
class Front:
    """A function, tensors for it, the arguments that it needs besides, and its options."""

    function: Callable[..., Any]
    given: Sequence[Tensor]
    good: dict[str, Any]
    options: Sequence[str]

    def lost(self, reach: Callable[..., Reached]) -> list[str]:
        """Options that do not reach the op as they were passed."""
        found = []
        for option in self.options:
            passed, look = OPTIONS[option]
            wanted, passed = passed[option], {name: x for name, x in passed.items() if name == option or name in self.options}
            if option == "window_size" and isinstance(self.good.get(option), int):
                passed = {option: 5}
            said = {**self.good, **passed}
            got = look(reach(lambda *x: self.function(*x, **said), self.given))  # noqa: B023
            if isinstance(wanted, Tensor):  # in a graph a node, or the value that became a constant
                same = got is not None and (reach is compiled or torch.equal(got.flatten(), wanted.flatten()))
            else:
                same = got == wanted
            found += [] if same else [f"{option}: {got} for {wanted}"]
        return found


OTHERS = {"cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k", "local_k_slice", "layout"}
OTHERS |= {"seq_len", "seq_len_k", "process_group", "group", "choices", "return_total_attention"}
OTHERS |= {"cp_group", "cp_size", "cp_local_rank", "cp_prev_global_rank", "cp_next_global_rank"}
"""What says which tokens are passed and who has the others, and total attention: other tests have their numbers."""
TENSORS = {"q", "k", "v", "kv", "qkv", "q1", "k1", "q2", "k2"}


def _front(name: str, given: Sequence[Tensor], good: dict[str, Any]) -> Front:
    names = list(inspect.signature(getattr(nr, name)).parameters)
    assert not {*names} - OPTIONS.keys() - OTHERS - TENSORS, name
    return Front(getattr(nr, name), given, good, [option for option in names if option in OPTIONS])


def _fronts() -> dict[str, Front]:
    found = {name: _front(name, tensors(name), arguments(name, 1)) for name in ALL}
    x, far = torch.rand(1, 8, HEADS, 8), {"dist_threshold": 2}
    found["flash_attention"] = _front("flash_attention", [x] * 3, {})
    found |= {name: _front(name, [x] * 5, far) for name in ("piecewise_attention", "wrap_piecewise_attn_func")}
    assert {*KNOWN} <= OPTIONS.keys()
    found["ContextParallel.attention"] = Front(nr.ContextParallel().attention, [x] * 3, {}, ["softmax_scale", *KNOWN])
    return found


FRONTS = _fronts()


@pytest.mark.parametrize("name", FRONTS)
def test_options_reach_the_op(name: str) -> None:
    assert FRONTS[name].options and FRONTS[name].lost(eager) == []


@needs_newer
@pytest.mark.parametrize(
    "name", ["wrap_zigzag_attn_func", "wrap_ring_attn_varlen_func", "ring_flash_attn_func", "ContextParallel.attention"]
)
def test_options_reach_the_op_in_a_graph(name: str) -> None:
    """They go another way there."""
    assert FRONTS[name].lost(compiled) == []


@pytest.mark.parametrize("option", ["heads_k_stride", "transport", "kernel", "layout", "reduce_dtype"])
def test_options_of_a_context_reach_the_op(option: str) -> None:
    given: dict[str, Any] = {"heads_k_stride": 2, "transport": "ring", "kernel": "reference", "layout": "zigzag"}
    given = {**given, "reduce_dtype": torch.bfloat16}
    x = torch.rand(1, 8, HEADS, 8)
    recipe = eager(nr.ContextParallel(**{option: given[option]}).attention, [x] * 3).recipe
    seen = {"heads_k_stride": recipe.heads_stride, "reduce_dtype": getattr(torch, recipe.reduce_dtype or "float32")}
    assert seen.get(option, getattr(recipe, option, None)) == given[option]
