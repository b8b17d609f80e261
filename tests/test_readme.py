"""The README's example works when pasted: alone, and under torchrun with the same result."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if "ContextParallel" in block)


def run(*command: str) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(re.findall(r"rank \d+: \d+ of \d+ tokens, \|out\| = \d+\.\d{6}", done.stdout))  # two processes may share a line


def test_example_alone_and_on_two_processes(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(example())
    (alone,) = run(str(path))
    both = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path))
    assert alone.startswith("rank 0: 1000 of 1000 tokens")
    assert [line.split(",")[0] for line in both] == ["rank 0: 500 of 1000 tokens", "rank 1: 500 of 1000 tokens"]
    assert len({line.split(", ")[1] for line in (alone, *both)}) == 1


def test_example_has_fifteen_lines():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 15, len(lines)
