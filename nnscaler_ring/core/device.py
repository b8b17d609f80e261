"""Tables that are made on the host and read on a device, and those of a device that the host reads; rows that a table names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from .intervals import ranges

MANY = 8
"""Intervals of rows from which they are read and written by an index, not one by one."""

_OF_GRAPHS: list[Tensor] = []
"""Tables that CUDA graphs read again from the host whenever they run."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results and gradients: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def captures(device: torch.device) -> bool:
    """Whether work that is sent to the device now is not run, but captured as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def readable(table: Tensor | np.ndarray, device: str) -> Tensor:
    """A table in memory of the host that a device of this type can read."""
    held = torch.from_numpy(np.ascontiguousarray(table)) if isinstance(table, np.ndarray) else table
    return held.pin_memory() if device == "cuda" else held


def send(table: Tensor, device: torch.device) -> Tensor:
    """A `readable` table on the device; the host does not wait."""
    if captures(device):
        _OF_GRAPHS.append(table)
    return table.to(device, non_blocking=device.type == "cuda")


def on_device(table: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A table of the host on a device; the host does not wait."""
    return send(readable(table, device.type), device)


Maker = Callable[..., Sequence[np.ndarray]]


def resident(make: Maker, device: torch.device, *about: Hashable) -> Sequence[Tensor]:
    """The tables ``make(*about)`` on a device: made once for each `about`, and sent once where they may stay.

    Nobody writes to them.
    """
    held = _HOST.get((make, device.type, *about), lambda: [readable(table, device.type) for table in make(*about)])
    if not _may_stay(device):
        return [send(table, device) for table in held]
    return _DEVICE.get((make, device, *about), lambda: [send(table, device) for table in held])


class _Lately:
    """Tables that were asked for lately, up to so many bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes, self._lock = most, 0, Lock()
        self._tables: OrderedDict[Hashable, Sequence[Tensor]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        made = make()
        with self._lock:
            if key not in self._tables:
                self._tables[key] = made
                self._bytes += sum(x.nbytes for x in made)
            while self._bytes > self._most and len(self._tables) > 1:
                _, oldest = self._tables.popitem(last=False)
                self._bytes -= sum(x.nbytes for x in oldest)
        return made

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()
            self._bytes = 0


_HOST, _DEVICE = _Lately(64 << 20), _Lately(64 << 20)


def _may_stay(device: torch.device) -> bool:
    """Whether later calls may read what is sent to the device now.

    Those on other streams than the default one would not wait for it, and what is allocated on them may be in the memory of a CUDA
    graph: torch.compile warms one up on a stream of its own.
    """
    if device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return False
    return device.type != "xpu" and not captures(device)  # XPUs have no default stream


def on_host(table: Tensor) -> Tensor:
    """A table of integers on the host, int64; one on a GPU is read, which waits for it.

    Raises:
        ValueError: the table is on a GPU while a CUDA graph is captured, when nothing there can be read.
    """
    if captures(table.device):
        raise ValueError("a table of integers (cu_seqlens) on the GPU while a CUDA graph is captured: pass it on the CPU")
    table = table.detach().to("cpu", torch.int64)
    return table.clone() if table.is_inference() else table  # which autograd does not save


def index_of(rows: np.ndarray, device: torch.device) -> Tensor:
    """The rows of some intervals ``[n, 2]`` one by one."""
    (index,) = resident(_one_by_one, device, rows.astype(np.int64).tobytes())
    return index


def _one_by_one(intervals: bytes) -> Sequence[np.ndarray]:
    rows = np.frombuffer(intervals, dtype=np.int64).reshape(-1, 2)
    return [ranges(rows[:, 0], rows[:, 1] - rows[:, 0])]


def take(x: Tensor, rows: np.ndarray, dim: int = 0) -> Tensor:
    """The rows of some intervals ``[n, 2]`` end to end: a view where it is one interval."""
    if len(rows) > MANY:
        return x.index_select(dim, index_of(rows, x.device))
    parts = [x.narrow(dim, lo, hi - lo) for lo, hi in rows.tolist()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)
