"""Tables that are made on the host and read on a device, and those of a device that the host reads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_OF_GRAPHS: list[Tensor] = []
"""Tables that CUDA graphs read again from the host whenever they run."""


def captures(device: torch.device) -> bool:
    """What is sent to the device now is not run, but captured as a CUDA graph."""
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


def on_host(table: Tensor) -> Tensor:
    """A table of integers on the host, int64; one on a GPU is read, which waits for it.

    Raises:
        ValueError: the table is on a GPU while a CUDA graph is captured, when nothing there can be read.
    """
    if captures(table.device):
        raise ValueError("a table of integers (cu_seqlens) on the GPU while a CUDA graph is captured: pass it on the CPU")
    return table.detach().to("cpu", torch.int64)
