"""Tables in Markdown, and the line that says where figures come from."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence

import numpy as np
import torch


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def hardware(command: str) -> str:
    """Hardware, versions, date and command."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{os.cpu_count()} cores of {model} (shared; load {load}), Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, {datetime.date.today()}: `{command}`"
    )
