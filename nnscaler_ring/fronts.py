"""Functions made from functions: the same with some choices fixed, or with tensors that come packed.

Each has the name, signature and docstring that a user sees in `help`; the code stands once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

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
        if causal_only and not (args[at] if len(args) > at else kwargs.get("causal", default)):
            raise ValueError(
                f"{name}: causal=False, but zigzag shards balance a causal mask; pass causal=True or take a ring function"
            )
        return base(*args, **kwargs, **choices)

    return _named(function, name, summary, base, parameters)


def packed(base: Front, what: str) -> Front:
    """`base` with ``kv`` or ``qkv`` stacked in one tensor, in the dim before the heads."""
    tensors = ["q", "kv"] if what == "kv" else ["qkv"]
    name = base.__name__.removesuffix("_func") + f"_{what}packed_func"
    first = [inspect.Parameter(t, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor) for t in tensors]
    rest = list(inspect.signature(base).parameters.values())[3:]
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
    summary = f"`{base.__name__}` with {what} in one tensor ``{shape})."
    function = _named(function, name, summary, base, [*first, *rest])
    function.__doc__ = f"{summary} Everything else is as there."
    return function
