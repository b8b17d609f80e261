"""Tables in Markdown, and the line that says where figures come from."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def hardware(command: str, device: str = "cpu") -> str:
    """Hardware, versions, date and command."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    where = f"{_gpu() if device == 'cuda' else ''}{os.cpu_count()} cores of {model} (shared; load {load})"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{where}, {versions}, {datetime.date.today()}: `{command}`"


def _gpu() -> str:
    """The GPU in use, CUDA and Triton."""
    triton = version("triton") if find_spec("triton") else "none"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, triton {triton}, "
