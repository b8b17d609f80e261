"""Functions made from functions: the same with some choices fixed, or with tensors that come packed.

Each has the name, signature and docstring that a user sees in `help`; the code stands once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from .core.call import Result

Front = Callable[..., Result]


def _named(function: Front, name: str, summary: str, base: Front, parameters: list[inspect.Parameter]) -> Front:
    """`function` with a name, a signature, and the docstring of `base` under another summary."""
    _, _, details = inspect.cleandoc(base.__doc__ or "").partition("\n\n")
    function.__name__ = function.__qualname__ = name
    function.__module__ = base.__module__
    function.__doc__ = summary + "\n\n" + details.replace(base.__name__ + "(", name + "(")
    signature = inspect.signature(base).replace(parameters=parameters)
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def fixed(base: Front, name: str, summary: str, *, causal_only: bool = False, **choices: Any) -> Front:
    """`base` with some keyword-only arguments fixed; with `causal_only` refusing ``causal=False``."""
    parameters = [p for p in inspect.signature(base).parameters.values() if p.name not in choices]
    at = [p.name for p in parameters].index("causal") if causal_only else 0
    default = parameters[at].default

    def function(*args: Any, **kwargs: Any) -> Result:  # no more than this: compilers trace through here
        if causal_only:
            causal = args[at] if len(args) > at else kwargs.get("causal", default)
            if isinstance(causal, (int, np.bool_)) and not causal:  # what is no flag is refused further down
                raise ValueError(
                    f"{name}: causal=False, but zigzag shards balance a causal mask; pass causal=True or take a ring function"
                )
        return base(*args, **kwargs, **choices)

    function = _named(function, name, summary, base, parameters)
    for choice in choices:  # are no arguments any more
        function.__doc__ = re.sub(rf"^    {choice}: .*\n(?:        .*\n)*", "", function.__doc__ or "", flags=re.MULTILINE)
        function.__doc__ = re.sub(rf"\b{choice},\s+(?=[\w,\s]*: see)", "", function.__doc__)
    return function


def packed(base: Front, what: str) -> Front:
    """`base` with ``kv`` or ``qkv`` stacked in one tensor, in the dim before the heads."""
    tensors = ["q", "kv"] if what == "kv" else ["qkv"]
    name = base.__name__.removesuffix("_func") + f"_{what}packed_func"
    first = [inspect.Parameter(t, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor) for t in tensors]
    rest = [p for p in inspect.signature(base).parameters.values() if p.name not in ("q", "k", "v")]
    rest = [p for p in rest if what == "kv" or p.name != "seq_len_k"]  # as many keys as queries
    shown = inspect.Signature([*first, *rest])

    def function(*args: Any, **kwargs: Any) -> Result:
        bound = shown.bind(*args, **kwargs)
        *q, stacked = (bound.arguments.pop(t) for t in tensors)
        if stacked.dim() < 4 or stacked.shape[-3] != len(what):
            raise ValueError(f"{name}: {what} has shape {tuple(stacked.shape)}; give [..., {len(what)}, heads, head dim]")
        return base(*q, *stacked.unbind(-3), **bound.arguments)

    shape = {
        "kv": "[B, L, 2, Hk, D]`` (packed rows: ``[T, 2, Hk, D]``",
        "qkv": "[B, L, 3, H, D]`` (packed rows: ``[T, 3, H, D]``",
    }[what]
    function = _named(function, name, f"`{base.__name__}` with {what} in one tensor ``{shape}).", base, [*first, *rest])
    function.__doc__ = _stacked(function.__doc__ or "", what)
    return function


def _stacked(text: str, what: str) -> str:
    """A docstring of q, k and v as one of `what` in one tensor: its first argument, and its example."""
    size = len(what)
    separate = r"q: ``\[(.*), Hq, D\]``; k .*\."
    made = r"q, k, v = \(torch\.randn\((.*), (\d+), (\d+)\) for _ in range\(3\)\)"
    if what == "kv":
        argument = rf"q: ``[\1, Hq, D]``; kv ``[\1, {size}, Hk, D]``."
        example = rf"q, kv = torch.randn(\1, \2, \3), torch.randn(\1, {size}, \2, \3)"
    else:
        argument, example = rf"qkv: ``[\1, {size}, H, D]``.", rf"qkv = torch.randn(\1, {size}, \2, \3)"
        text = re.sub(r"^ *seq_len_k: .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(made, example, re.sub(separate, argument, text))
    return text.replace("(q, k, v, ", "(q, kv, " if what == "kv" else "(qkv, ")
