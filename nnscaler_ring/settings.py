"""What a call of an op says besides its tensors, as one string, and the name of the group that it is about."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from .core.call import Group, Options, group_name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a call says besides its tensors, in numbers and strings: one string where a compiler writes it into code."""

    softmax_scale: float | None = None
    dropout_p: float = 0.0
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    sinks: int = 0
    softcap: float = 0.0
    dropout_seed: int | None = None
    far: int | None = None
    deterministic: bool = False
    return_attn_probs: bool = False
    layout: str = "contiguous"
    transport: str = "auto"
    kernel: str = "auto"
    seq_len: int | None = None
    seq_len_k: int | None = None

    def __str__(self) -> str:
        said = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        return json.dumps({f.name: said[f.name] for f in fields(self) if said[f.name] != f.default}, default=plain)

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Settings:
        given = json.loads(text)
        return Settings(**{**given, "window_size": tuple(given.get("window_size", (-1, -1)))})


def plain(x: Any) -> Any:
    """A number of numpy's or of a tensor as one of Python's; anything odd in words, to be refused where arguments are checked."""
    if isinstance(x, (Tensor, np.generic, np.ndarray)) and math.prod(x.shape) == 1:
        return x.item()
    return x if x is None or isinstance(x, (str, bool, int, float, tuple, list)) else repr(x)


_OPTIONS = tuple(f.name for f in fields(Options) if f.name in {g.name for g in fields(Settings)})


def options_of(settings: Settings, **more: Any) -> Options:
    """The part of settings that the engine's edge checks."""
    return Options(**{name: getattr(settings, name) for name in _OPTIONS}, **more)


def group_of(process_group: Group, ring_size: int = 1) -> str:
    """The name of the group whose ranks pass shards; of None that of this process alone, or of the last of `ring_size` ranks, the
    busiest under a causal mask, for a piece that autodist profiles without the others."""
    if process_group is not None:
        return group_name(process_group)
    return "local:1" if ring_size == 1 else f"pretend:{ring_size}:{ring_size - 1}"
