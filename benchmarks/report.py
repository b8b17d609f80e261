"""Tables in Markdown, and the line that says where figures come from."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch


class Table(NamedTuple):
    """A table as far as it is, and whether something in it failed."""

    text: str
    failed: bool = False


def save(path: pathlib.Path, text: str) -> None:
    """Write a file as a whole or not at all: a run may be stopped at any time."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


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
