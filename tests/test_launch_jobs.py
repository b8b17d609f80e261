"""Real jobs: the same program under torchrun and under each mpiexec that is there."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.test_launch import NAMES

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import json, os, torch, torch.distributed as dist
from nnscaler_ring.launch import cleanup_distributed, setup_mpi_distributed

for _ in range(2):
    started = setup_mpi_distributed("gloo")
    assert setup_mpi_distributed() == started
    total = torch.tensor(started["rank"] + 1)
    dist.all_reduce(total)
    port = os.environ["MASTER_PORT"]
    cleanup_distributed()
    assert not dist.is_initialized()
print(json.dumps({**started, "device": str(started["device"]), "total": total.item(), "port": port}) + "\\n", end="", flush=True)
"""
RUNNING = {
    "openmpi": (r"OpenRTE|Open MPI", ("mpiexec.openmpi", "mpirun.openmpi"), ("--allow-run-as-root", "--oversubscribe")),
    "mpich": (r"HYDRA build details", ("mpiexec.mpich", "mpiexec.hydra"), ()),
    "intelmpi": (r"Intel\(R\) MPI Library", ("mpiexec.hydra",), ()),
}
"""Of each mpiexec: what it says that it is, names that it may have besides mpiexec and mpirun, options."""


@functools.cache
def mpiexec(flavour: str) -> tuple[str, ...]:
    """The command of an MPI; skips the test where it is not installed."""
    says, names, options = RUNNING[flavour]
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    for name in (*names, "mpiexec", "mpirun"):
        if command := shutil.which(name, path=path):
            told = subprocess.run([command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if re.search(says, told.stdout + told.stderr):
                return (command, *options)
    pytest.skip(f"needs mpiexec of {flavour}")


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start(*command)``: the program under a launcher; what still runs at the end of the test is ended."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    with contextlib.ExitStack() as jobs:

        def start(*command: str) -> subprocess.Popen[str]:
            job = subprocess.Popen(
                [*command, str(program)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )
            jobs.enter_context(job)
            jobs.callback(job.terminate)  # which mpiexec passes on; before the pipes are closed and waited for
            return job

        yield start


def check(job: subprocess.Popen[str], launcher: str, world_size: int) -> str:
    """The port that a job used."""
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    said = [json.loads(text) for text in re.findall(r"\{.*?\}", out)]  # two processes may share a line
    ports, places = {each.pop("port") for each in said}, sorted(each.pop("local_rank") for each in said)
    assert places == list(range(world_size))  # Open MPI 5 counts by cores, not by ranks
    assert sorted(said, key=lambda each: each["rank"]) == [
        {
            "rank": rank,
            "world_size": world_size,
            "device": "cpu",
            "launcher": launcher,
            "backend": "gloo",
            "total": world_size * (world_size + 1) // 2,
        }
        for rank in range(world_size)
    ]
    (port,) = ports
    return port


def test_torchrun(start: Any) -> None:
    check(start(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), "torchrun", 2)


@pytest.mark.parametrize("flavour", RUNNING)
def test_two_mpiexec_at_once(start: Any, flavour: str) -> None:
    """One of four ranks, each in a shell of its own, and one of two."""
    wrapped = ("sh", "-c", '"$0" "$@"; exit $?', sys.executable)
    four, two = start(*mpiexec(flavour), "-n", "4", *wrapped), start(*mpiexec(flavour), "-n", "2", sys.executable)
    assert check(four, flavour, 4) != check(two, flavour, 2)
