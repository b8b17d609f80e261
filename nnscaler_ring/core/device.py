"""Tables that are made on the host and read on a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(table: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A table of the host on a device. The host does not wait: it is copied from memory that the device can read."""
    held = torch.from_numpy(np.ascontiguousarray(table)) if isinstance(table, np.ndarray) else table
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)
