"""The layouts by name, and any layout as a string: what a recipe can say of where tokens lie."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from .balance import balanced
from .layout import Layout, contiguous, contiguous_per_document, stripe, zigzag, zigzag_per_document
from .mask import build as build_mask


def balanced_documents(length: int, world_size: int, cu_seqlens: np.ndarray | None = None) -> Layout:
    """Equal tokens and equal work on every rank under a causal mask within each document; `balance.balanced` takes any mask."""
    return balanced(build_mask(length, causal=True, cu_seqlens_q=cu_seqlens), world_size)


LAYOUTS: Mapping[str, Callable[[int, int, np.ndarray | None], Layout]] = MappingProxyType(
    {
        "contiguous": contiguous,
        "zigzag": zigzag,
        "stripe": stripe,
        "contiguous-per-document": contiguous_per_document,
        "zigzag-per-document": zigzag_per_document,
        "balanced": balanced_documents,
    }
)
"""The layouts that have a name: ``builder(length, world_size, cu_seqlens)``."""

_TABLE = "="
"""What the string of a layout without a name starts with."""


def build(name: str, length: int, world_size: int, cu_seqlens: np.ndarray | None = None) -> Layout:
    """The layout called `name`, or that of a string of `name_of`.

    Raises:
        ValueError: an unknown name (lists the known), or a layout of another length or number of ranks.
    """
    if name.startswith(_TABLE):
        stride, size, ranks, *runs = np.frombuffer(base64.b64decode(name.removeprefix(_TABLE)), dtype=np.int64).tolist()
        if (size, ranks) != (length, world_size):
            raise ValueError(
                f"the layout given holds {size} tokens on {ranks} ranks; there are {length} tokens and {world_size} ranks"
            )
        return Layout(np.array(runs), size, ranks, stride)
    return LAYOUTS[check_layout(name)](length, world_size, cu_seqlens)


def check_layout(name: str) -> str:
    """`name`, or ValueError that lists the known layouts."""
    if not isinstance(name, str) or (name not in LAYOUTS and not name.startswith(_TABLE)):
        raise ValueError(f"unknown layout {name!r}: choose one of {', '.join(LAYOUTS)}, or give ContextParallel a Layout")
    return name


def name_of(layout: str | Layout) -> str:
    """The string that stands for a layout in a recipe: its name, or its whole table.

    Raises:
        ValueError: a `Layout` that does not hold every position once.

    Example:
        >>> build(name_of(zigzag(8, 2)), 8, 2) == zigzag(8, 2)
        True
    """
    if not isinstance(layout, Layout):
        return check_layout(layout)
    held = [layout.positions(rank) for rank in range(layout.world_size)]
    if not np.array_equal(np.sort(np.concatenate(held)), np.arange(layout.length)):
        raise ValueError(f"{layout!r} must hold every position once")
    table = np.concatenate([[layout.stride, layout.length, layout.world_size], layout.runs.ravel()])
    return _TABLE + base64.b64encode(table.astype(np.int64).tobytes()).decode()


def length_of(name: str) -> int | None:
    """The tokens that the layout called `name` holds, None for one of any length.

    Example:
        >>> length_of("zigzag"), length_of(name_of(zigzag(8, 2)))
        (None, 8)
    """
    if not name.startswith(_TABLE):
        return None
    return int(np.frombuffer(base64.b64decode(name[1:33]), dtype=np.int64)[1])  # stride, length, ranks


def shown(name: str) -> str:
    """The layout called `name` in words, for messages.

    Example:
        >>> shown("zigzag"), shown(name_of(zigzag(8, 2)))
        ("layout 'zigzag'", 'the layout given')
    """
    return "the layout given" if name.startswith(_TABLE) else f"layout {name!r}"


def needs_documents(name: str) -> bool:
    """The layout called `name` cannot be without the boundaries of documents."""
    return name.endswith("-per-document")


def looks_at_documents(name: str) -> bool:
    """The layout called `name` depends on the boundaries of documents, where they are given."""
    return needs_documents(name) or name == "balanced"
