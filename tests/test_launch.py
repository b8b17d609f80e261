"""Start-up: the table of launchers against recorded environments, refusals, devices, groups; `test_launch_jobs` has real jobs."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring import launch
from nnscaler_ring.launch import LAUNCHERS, LOOPBACK, PORTS, Launch, cleanup_distributed, detect, setup_mpi_distributed
from tests.distributed import RankPool, rank_device

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
NAMES = {"ENVIRONMENT", *RENDEZVOUS} | {
    name
    for row in LAUNCHERS
    for names in (row.signs, row.rank, row.world_size, row.local_rank, row.local_size, row.job, row.nodes)
    for name in names
}
"""Every variable that is read."""


def variables(text: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in text.split())


# What `env` prints in a rank of Open MPI 4.1 and 5.0, MPICH 4.0 and 5.0, Intel MPI 2021 and slurm 22.05 (nodes n1 and n2), less
# what no row names; torchrun's with other hosts, and that of PALS from its documentation.
ALLOCATION = "SLURM_JOB_ID=8 SLURM_JOB_NODELIST=n[1-2] SLURM_NODELIST=n[1-2] SLURM_NTASKS=4 SLURM_NPROCS=4"
HELPER = (  # mpiexec's own srun, one task on each node; this is what ranks on the second inherit
    "SLURM_JOB_ID=8 SLURM_JOB_NODELIST=n[1-2] SLURM_NODELIST=n[1-2] SLURM_STEP_NODELIST=n[1-2] SLURM_LOCALID=0 SLURM_NPROCS=2 "
    "SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2"
)
OPENMPI = (
    "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=3 OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_RANK=3 "
    "PMIX_HOSTNAME=vm PMIX_NAMESPACE=1298399233 OMPI_MCA_ess_base_jobid=1298399233"
)
OPENMPI_2_NODES = OPENMPI.replace("LOCAL_RANK=3", "LOCAL_RANK=1").replace("LOCAL_SIZE=4", "LOCAL_SIZE=2")
MPICH = "PMI_RANK=3 PMI_SIZE=4 PMI_FD=9 PMI_HOSTNAME=vm MPI_LOCALRANKID=3 MPI_LOCALNRANKS=4 HYDI_CONTROL_FD=7"
MPICH_2_NODES = MPICH.replace("RANKID=3", "RANKID=1").replace("NRANKS=4", "NRANKS=2")
INTEL = "I_MPI_HYDRA_UUID=cd210000-7f46-c2c0-b760-0600f5ee8533 HYDRA_BSTRAP_LOCALHOST=vm"
UUID = "cd210000-7f46-c2c0-b760-0600f5ee8533"
SRUN = (
    "SLURM_JOB_ID=2 SLURM_JOB_NODELIST=n[1-2] SLURM_NODELIST=n[1-2] SLURM_STEP_NODELIST=n[1-2] SLURM_LOCALID=1 SLURM_NPROCS=4 "
    "SLURM_NTASKS=4 SLURM_PROCID=3 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4"
)
SRUN_PMI2 = SRUN + " PMI_RANK=3 PMI_SIZE=4 PMI_JOBID=2.0 PMI_FD=11"
STEP = (  # srun -N1 -n2 -w n2 in an allocation of both nodes
    "SLURM_JOB_ID=3 SLURM_JOB_NODELIST=n[1-2] SLURM_NODELIST=n[1-2] SLURM_STEP_NODELIST=n2 SLURM_LOCALID=1 SLURM_NPROCS=2 "
    "SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2"
)
TORCHRUN = (
    "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 MASTER_ADDR=n1 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none "
    "TORCHELASTIC_USE_AGENT_STORE=True"
)
BY_HAND = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=n1 MASTER_PORT=29500"

RECORDED = {
    "torchrun": (TORCHRUN, Launch("torchrun", 3, 4, 1)),
    "torchrun-by-srun": (f"{HELPER} {TORCHRUN}", Launch("torchrun", 3, 4, 1)),
    "torchrun-by-openmpi": (f"{OPENMPI} {TORCHRUN}", Launch("torchrun", 3, 4, 1)),
    "openmpi-4": (OPENMPI, Launch("openmpi", 3, 4, 3, LOOPBACK, "1298399233/1298399233", mpi=True)),
    "openmpi-5": (
        OPENMPI.replace("PMIX_NAMESPACE=1298399233 OMPI_MCA_ess_base_jobid=1298399233", "PMIX_NAMESPACE=prterun-vm-8640@1"),
        Launch("openmpi", 3, 4, 3, LOOPBACK, "prterun-vm-8640@1", mpi=True),
    ),
    "openmpi-2-nodes": (OPENMPI_2_NODES, Launch("openmpi", 3, 4, 1, None, "1298399233/1298399233", mpi=True)),
    "openmpi-in-slurm": (
        f"{HELPER} {OPENMPI_2_NODES}",
        Launch("openmpi", 3, 4, 1, "n1", "1298399233/1298399233", mpi=True),
    ),
    "mpich": (MPICH, Launch("mpich", 3, 4, 3, LOOPBACK, mpi=True)),
    "mpich-2-nodes": (MPICH_2_NODES, Launch("mpich", 3, 4, 1, mpi=True)),
    "mpich-in-slurm": (f"{HELPER} {MPICH_2_NODES}", Launch("mpich", 3, 4, 1, "n1", "8", mpi=True)),
    "mpich-on-1-node-of-slurm": (f"{HELPER} {MPICH}", Launch("mpich", 3, 4, 3, LOOPBACK, mpi=True)),
    "intelmpi": (f"{MPICH} {INTEL}", Launch("intelmpi", 3, 4, 3, LOOPBACK, UUID, mpi=True)),
    "intelmpi-in-slurm": (f"{HELPER} {MPICH_2_NODES} {INTEL}", Launch("intelmpi", 3, 4, 1, "n1", UUID, mpi=True)),
    "srun": (SRUN, Launch("slurm", 3, 4, 1, "n1", "2/0")),
    "srun-pmi2": (SRUN_PMI2, Launch("slurm", 3, 4, 1, "n1", "2/0")),
    "srun-in-batch-script": (f"{SRUN} ENVIRONMENT=BATCH", Launch("slurm", 3, 4, 1, "n1", "2/0")),
    "srun-on-second-node": (STEP, Launch("slurm", 1, 2, 1, LOOPBACK, "3/0")),
    "slurm-without-step": (
        "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NODELIST=gpu[07-08,11] SLURM_JOB_ID=4",
        Launch("slurm", 1, 2, 0, "gpu07", "4"),
    ),
    "slurm-batch-script": (f"{ALLOCATION} ENVIRONMENT=BATCH SLURM_PROCID=0 SLURM_LOCALID=0", Launch("single", 0, 1, 0, LOOPBACK)),
    "slurm-salloc-shell": (ALLOCATION, Launch("single", 0, 1, 0, LOOPBACK)),
    "pals": (
        "PMI_RANK=5 PMI_SIZE=8 PALS_RANKID=5 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=4 PALS_APID=6f0e",
        Launch("mpich", 5, 8, 1, None, "6f0e", mpi=True),
    ),
    "by-hand": (BY_HAND, Launch("environment", 3, 4, 1)),
    "by-hand-one": ("RANK=0 WORLD_SIZE=1", Launch("environment", 0, 1, 0)),
    "agreeing": (
        f"{OPENMPI} RANK=3 WORLD_SIZE=4 LOCAL_RANK=3",
        Launch("openmpi", 3, 4, 3, LOOPBACK, "1298399233/1298399233", mpi=True),
    ),
    "empty-is-unset": ("RANK= WORLD_SIZE= PMI_RANK= MASTER_ADDR=", Launch("single", 0, 1, 0, LOOPBACK)),
    "nothing": ("", Launch("single", 0, 1, 0, LOOPBACK)),
    "local-rank-alone": ("LOCAL_RANK=2", Launch("single", 0, 1, 2, LOOPBACK)),
}
REFUSED = {
    "rank-too-high": (MPICH.replace("PMI_RANK=3", "PMI_RANK=4"), "PMI_RANK=4, but PMI_SIZE=4: ranks go from 0 to 3"),
    "no-ranks": ("RANK=0 WORLD_SIZE=0 LOCAL_RANK=0", "WORLD_SIZE=0: there is one process at least"),
    "no-size": ("OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_RANK=0 says .* but OMPI_COMM_WORLD_SIZE is unset"),
    "no-rank": ("WORLD_SIZE=2", "WORLD_SIZE=2 says .* but RANK is unset"),
    "no-slurm-size": ("SLURM_PROCID=0", "but SLURM_STEP_NUM_TASKS or SLURM_NTASKS or SLURM_NPROCS is unset"),
    "no-torchrun-rank": ("TORCHELASTIC_RUN_ID=none WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=none says .* but RANK is unset"),
    "no-local-rank": ("PMI_RANK=0 PMI_SIZE=2", "MPI_LOCALRANKID or .* LOCAL_RANK is unset: export LOCAL_RANK"),
    "local-rank-too-high": (MPICH.replace("RANKID=3", "RANKID=4"), "MPI_LOCALRANKID=4, but MPI_LOCALNRANKS=4"),
    "local-rank-out-of-world": ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK=2, but WORLD_SIZE=2"),
    "local-size-too-high": (MPICH.replace("NRANKS=4", "NRANKS=5"), "MPI_LOCALNRANKS=5, but PMI_SIZE=4"),
    "not-a-number": ("RANK=first WORLD_SIZE=2 LOCAL_RANK=0", "RANK=first: give a whole number"),
    "not-in-ascii": ("RANK=\u0663 WORLD_SIZE=4 LOCAL_RANK=0", "RANK=\u0663: give a whole number"),
    "negative": ("RANK=-1 WORLD_SIZE=2 LOCAL_RANK=0", "RANK=-1: give a whole number, 0 or more"),
    "other-rank": (f"{OPENMPI} RANK=0", "RANK=0, but openmpi says 3: unset RANK"),
    "other-size": (f"{SRUN} WORLD_SIZE=2", "WORLD_SIZE=2, but slurm says 4: unset WORLD_SIZE"),
    "no-number-beside": (f"{MPICH} WORLD_SIZE=four", "WORLD_SIZE=four, but mpich says 4: unset WORLD_SIZE"),
    "other-local-rank": (f"{MPICH} LOCAL_RANK=0", "LOCAL_RANK=0, but mpich says 3: unset LOCAL_RANK"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_environment(name: str) -> None:
    text, expected = RECORDED[name]
    found = detect(variables(text))
    assert replace(found, variable=expected.variable) == expected
    assert found.launcher == "single" or variables(text)[found.variable] == str(found.rank)


def test_every_row_is_recorded() -> None:
    assert {expected.launcher for _, expected in RECORDED.values()} == {row.name for row in LAUNCHERS} | {"single"}


@pytest.mark.parametrize("name", REFUSED)
def test_contradiction_is_refused(name: str) -> None:
    text, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        detect(variables(text))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-03,7]", "node01"),
        ("node[7,01-03],big1", "node7"),
        ("big1,node[01-03]", "big1"),
        ("rack[2-3]n[10-12]-ib,login", "rack2n10-ib"),
        ("a-1.cluster,a-2.cluster", "a-1.cluster"),
        ("node[5]", "node5"),
        ("node5", LOOPBACK),
    ],
)
def test_first_host_of_slurm(nodes: str, first: str) -> None:
    assert detect({**variables(SRUN), "SLURM_STEP_NODELIST": nodes}).host == first


@dataclass
class Faked:
    """What `setup_mpi_distributed` would have done; no group is made."""

    started: list[dict[str, Any]] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)

    def setup(self, environ: Mapping[str, str], backend: str | None = "gloo") -> Any:
        self.environ.clear()
        self.environ.update(environ)
        return setup_mpi_distributed(backend)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Faked:
    faked = Faked()
    monkeypatch.setattr(launch, "_process", launch._Process())
    monkeypatch.setattr(launch.os, "environ", faked.environ)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # cannot be imported
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 0)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: faked.started.append({"backend": backend, **kwargs}))
    return faked


def ranked(text: str, rank: int) -> dict[str, str]:
    """The record of another rank of the same node."""
    own = {
        "RANK",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "PMI_RANK",
        "MPI_LOCALRANKID",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    }
    return {name: str(rank) if name in own else value for name, value in variables(text).items()}


@pytest.mark.parametrize("text", [OPENMPI, MPICH, f"{MPICH} {INTEL}", SRUN.replace("n[1-2]", "n1")])
def test_one_node_needs_no_variables(faked: Faked, text: str) -> None:
    met = set()
    for rank in range(4):
        faked.setup(ranked(text, rank))
        assert [faked.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [str(rank), "4", str(rank)]
        met.add((faked.environ["MASTER_ADDR"], int(faked.environ["MASTER_PORT"])))
        assert (faked.started[-1]["rank"], faked.started[-1]["world_size"]) == (rank, 4)
    ((host, port),) = met
    assert host == LOOPBACK and port in PORTS


def test_another_job_takes_another_port(faked: Faked) -> None:
    ports = set()
    for job in range(100):
        faked.setup({**variables(SRUN), "SLURM_JOB_ID": str(1000 + job)})
        ports.add(faked.environ["MASTER_PORT"])
        faked.setup({**variables(OPENMPI), "PMIX_NAMESPACE": f"prterun-vm-{8000 + job}@1"})
        ports.add(faked.environ["MASTER_PORT"])
    assert len(ports) >= 195  # of 200; chance takes 1.2 on average


@pytest.mark.parametrize("text", [OPENMPI_2_NODES, MPICH_2_NODES, SRUN, TORCHRUN, BY_HAND])
def test_rendezvous_variables_that_are_set_stay(faked: Faked, text: str) -> None:
    environ = {**variables(text), "MASTER_ADDR": "head", "MASTER_PORT": "12345"}
    faked.setup(environ)
    assert environ.items() <= faked.environ.items()
    assert {name: faked.environ[name] for name in RENDEZVOUS[2:]} == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    cleanup_distributed()
    assert faked.environ == environ


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (MPICH_2_NODES, "mpich does not say on which node rank 0 is: export MASTER_ADDR.* or install mpi4py"),
        (OPENMPI_2_NODES, "openmpi does not say on which node rank 0 is: export MASTER_ADDR.* or install mpi4py"),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0",
            "environment does not say .* export MASTER_ADDR, its host, and MASTER_PORT, a free port there, on all ranks$",
        ),
        (f"{MPICH_2_NODES} MASTER_ADDR=n1", "mpich names no job to derive a port from: export MASTER_PORT"),
        (f"{MPICH} MASTER_PORT=auto", "MASTER_PORT=auto: give a port"),
        (f"{MPICH} MASTER_PORT=0", "MASTER_PORT=0: give a port"),
        (f"{MPICH} MASTER_PORT=65536", "MASTER_PORT=65536: give a port"),
    ],
)
def test_what_cannot_be_known_is_refused(faked: Faked, environ: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        faked.setup(variables(environ))
    assert faked.environ == variables(environ) and not faked.started


def test_port_of_a_job_on_several_nodes(faked: Faked) -> None:
    faked.setup({**variables(OPENMPI_2_NODES), "MASTER_ADDR": "n1"})
    assert int(faked.environ["MASTER_PORT"]) in PORTS


@dataclass
class World:
    """MPI.COMM_WORLD of a rank of 4; rank 0 says what `bcast` gives."""

    rank: int = 3
    size: int = 4
    said: tuple[str, str] = ("n7", "40000")

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def bcast(self, mine: Any, root: int) -> Any:
        return mine if self.rank == root else self.said


def with_mpi4py(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    mpi4py = types.ModuleType("mpi4py")
    mpi4py.MPI = types.SimpleNamespace(COMM_WORLD=world)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)


def test_mpi4py_tells_on_several_nodes(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    with_mpi4py(monkeypatch, World())
    for environ in (MPICH_2_NODES, f"{HELPER} {OPENMPI_2_NODES}"):
        faked.setup(variables(environ))
        assert (faked.environ["MASTER_ADDR"], faked.environ["MASTER_PORT"]) == ("n7", "40000")
    faked.setup({**variables(MPICH_2_NODES), "MASTER_ADDR": "head"})
    assert (faked.environ["MASTER_ADDR"], faked.environ["MASTER_PORT"]) == ("head", "40000")
    faked.setup(variables(MPICH))  # one node: not asked
    assert faked.environ["MASTER_ADDR"] == LOOPBACK


def test_mpi4py_of_rank_0(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    with_mpi4py(monkeypatch, World(rank=0))
    faked.setup({**variables(MPICH_2_NODES), "PMI_RANK": "0", "MPI_LOCALRANKID": "0"})
    assert faked.environ["MASTER_ADDR"] == launch.socket.gethostname() and 0 < int(faked.environ["MASTER_PORT"]) < 65536


def test_mpi4py_of_another_mpi_is_not_believed(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    with_mpi4py(monkeypatch, World(rank=0, size=1))
    with pytest.raises(ValueError, match="export MASTER_ADDR"):
        faked.setup(variables(MPICH_2_NODES))


@dataclass
class Device:
    """A module like torch.cuda."""

    count: int
    current: Any = None

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def set_device(self, device: torch.device) -> None:
        self.current = device


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Device]]:
    """``devices(backends, cuda=4)``: a machine that has these."""

    def have(backends: set[str], **counts: int) -> dict[str, Device]:
        modules = {kind: Device(counts.get(kind, 0)) for kind in ("cuda", "xpu")} | {"cpu": Device(1)}
        monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
        monkeypatch.setattr(dist, "is_backend_available", backends.__contains__)
        monkeypatch.setitem(sys.modules, "oneccl_bindings_for_pytorch", types.ModuleType("ccl") if "ccl" in backends else None)
        return modules

    return have


@pytest.mark.parametrize(
    ("backends", "counts", "asked", "backend", "device"),
    [
        ({"gloo"}, {}, None, "gloo", "cpu"),
        ({"gloo", "nccl"}, {"cuda": 8}, None, "nccl", "cuda:3"),
        ({"gloo", "nccl"}, {"cuda": 2}, None, "nccl", "cuda:1"),
        ({"gloo", "nccl"}, {"cuda": 2}, "gloo", "gloo", "cpu"),
        ({"gloo", "xccl", "ccl"}, {"xpu": 3}, None, "xccl", "xpu:0"),
        ({"gloo", "ccl"}, {"xpu": 3}, None, "ccl", "xpu:0"),
        ({"gloo", "nccl", "xccl"}, {"cuda": 1, "xpu": 4}, "xccl", "xccl", "xpu:3"),
    ],
)
def test_device_and_backend(
    faked: Faked, devices: Any, backends: set[str], counts: dict[str, int], asked: str | None, backend: str, device: str
) -> None:
    modules = devices(backends, **counts)
    started = faked.setup(variables(OPENMPI), asked)
    assert (started["backend"], started["device"]) == (backend, torch.device(device))
    assert faked.started[-1]["backend"] == backend
    assert faked.started[-1]["device_id"] == (torch.device(device) if backend == "nccl" else None)
    assert {kind: module.current for kind, module in modules.items()} == {
        kind: torch.device(device) if kind != "cpu" and device.startswith(kind) else None for kind in modules
    }


@pytest.mark.parametrize(
    ("backends", "counts", "asked", "error", "words"),
    [
        ({"gloo"}, {}, "mpi", ValueError, "backend='mpi': give one of nccl, xccl, ccl, gloo, or None"),
        ({"gloo"}, {}, "nccl", NotImplementedError, "nccl for cuda is not in this torch .*, which finds cpu"),
        ({"gloo", "nccl"}, {}, "nccl", NotImplementedError, "nccl for cuda is not in this torch .*, which finds cpu"),
        ({"gloo"}, {"cuda": 1}, None, NotImplementedError, "nccl for cuda is not in this torch .*, which finds cuda, cpu"),
        ({"gloo"}, {"xpu": 1}, None, NotImplementedError, "xccl for xpu or ccl for xpu is not in this torch"),
    ],
)
def test_missing_backend_is_refused(
    faked: Faked, devices: Any, backends: set[str], counts: dict[str, int], asked: str | None, error: type[Exception], words: str
) -> None:
    devices(backends, **counts)
    with pytest.raises(error, match=words):
        faked.setup(variables(OPENMPI), asked)
    assert faked.environ == variables(OPENMPI)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no group; what a test leaves is taken away."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    yield
    cleanup_distributed()
    if dist.is_initialized():
        dist.destroy_process_group()
    assert not NAMES & os.environ.keys()


ALONE = {"rank": 0, "world_size": 1, "local_rank": 0, "device": torch.device("cpu"), "launcher": "single", "backend": "gloo"}


def test_single_process(alone: None) -> None:
    for _ in range(2):
        assert setup_mpi_distributed("gloo") == ALONE
        x = torch.ones(1)
        dist.all_reduce(x)
        assert x.item() == 1
        assert {name: os.environ.get(name) for name in RENDEZVOUS} == dict(
            zip(RENDEZVOUS, (None, None, "0", "1", "0"), strict=True)
        )
        group = dist.group.WORLD
        assert setup_mpi_distributed() == ALONE and dist.group.WORLD is group
        with pytest.raises(ValueError, match="backend='nccl', but a default process group exists, of backend 'gloo'"):
            setup_mpi_distributed("nccl")
        cleanup_distributed()
        assert not dist.is_initialized() and not NAMES & os.environ.keys()
    cleanup_distributed()


@pytest.mark.cuda
def test_single_process_on_cuda(alone: None) -> None:
    started = setup_mpi_distributed()
    assert (started["backend"], started["device"]) == ("nccl", torch.device("cuda", 0))
    x = torch.ones(1, device=started["device"])
    dist.all_reduce(x)
    assert x.item() == 1


def test_a_failed_start_leaves_nothing(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no"):
        patch.setattr(dist, "init_process_group", fail)
        setup_mpi_distributed("gloo")
    assert not NAMES & os.environ.keys()
    assert setup_mpi_distributed("gloo") == ALONE


def other_group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def test_a_group_of_others_is_reported_and_left(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    group = other_group()
    assert setup_mpi_distributed() == ALONE
    with monkeypatch.context() as patch:
        for name, value in variables("PMI_RANK=0 PMI_SIZE=1 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1").items():
            patch.setenv(name, value)
        assert setup_mpi_distributed() == {**ALONE, "launcher": "mpich"}
        patch.setenv("PMI_SIZE", "2")
        with pytest.raises(ValueError, match=r"mpich says rank 0 of 2, but a default process group exists, .* rank 0 of 1"):
            setup_mpi_distributed()
    cleanup_distributed()
    assert dist.group.WORLD is group


def test_a_group_that_replaced_ours_is_left(alone: None) -> None:
    setup_mpi_distributed("gloo")
    dist.destroy_process_group()
    group = other_group()
    assert setup_mpi_distributed() == ALONE
    cleanup_distributed()
    assert dist.group.WORLD is group and not NAMES & os.environ.keys()


def test_gloo_lets_go_of_its_last_message_before_the_group_ends(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch whose groups join gloo's threads without letting them have the interpreter."""
    done: list[str] = []
    monkeypatch.setattr(launch, "_LETS_GO", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: done.append("waited"))
    monkeypatch.setattr(
        dist, "destroy_process_group", lambda destroy=dist.destroy_process_group: (done.append("destroyed"), destroy())
    )
    setup_mpi_distributed("gloo")
    cleanup_distributed()
    assert done == ["waited", "destroyed"]


def report(rank: int, world_size: int) -> Any:
    started = setup_mpi_distributed()
    cleanup_distributed()
    assert dist.is_initialized() and started["device"] == rank_device()
    return {name: value for name, value in started.items() if name not in ("device", "backend")}


def test_a_group_that_nothing_explains(ranks: Callable[[int], RankPool]) -> None:
    expected = [{"rank": rank, "world_size": 2, "local_rank": rank, "launcher": "unknown"} for rank in range(2)]
    assert ranks(2).run(report) == expected


def test_a_timeout_is_that_of_the_meeting_and_of_the_group(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[dict[str, timedelta]] = []
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **named: met.append(named) or iter([(dist.HashStore(), 0, 0)]))
    for wrong in (5, 0):
        with pytest.raises(ValueError, match=rf"timeout={wrong}: give a datetime\.timedelta"):
            setup_mpi_distributed("gloo", timeout=wrong)  # type: ignore[arg-type]
    faked.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="20000")
    setup_mpi_distributed("gloo", timeout=timedelta(seconds=5))
    assert met == [{"timeout": timedelta(seconds=5)}] and faked.started[0]["timeout"] == timedelta(seconds=5)


def test_an_mpi_of_another_rank_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = types.SimpleNamespace(Get_rank=lambda: 1, Get_size=lambda: 2, bcast=lambda x, root: x)
    mpi4py = types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=world))
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)  # type: ignore[arg-type]
    assert launch._by_mpi(Launch("mpich", 1, 2, 0, mpi=True)) is not None
    assert launch._by_mpi(Launch("mpich", 0, 2, 0, mpi=True)) is None


def test_a_port_is_that_of_its_job_in_every_process() -> None:
    """Python's own hash differs from process to process."""
    assert launch._port(Launch("mpich", 0, 2, 0, LOOPBACK, "job")) == "24824"


def test_groups_of_one_launch_do_not_read_each_others_keys() -> None:
    meeting = launch._Meeting(Launch("single", 0, 1, 0), {})
    meeting.next_store(None).set("key", "old")
    assert not meeting.next_store(None).check(["key"])


def test_two_jobs_on_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a derived port sees nothing of the other; on a port that was exported the process that comes second is refused."""
    store = dist.HashStore()
    jobs = [
        launch._Meeting(Launch("slurm", 1, 2, 1, None, job), {}, derived, store) for job in ("8", "9") for derived in (True, False)
    ]
    one, exported, other, exported_too = jobs
    one.next_store(None).set("key", "mine")
    assert not other.next_store(None).check(["key"])
    for meeting in (one, one, other, exported, exported):  # a process may come again
        meeting._claim(store)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for meeting in (one, exported_too):
        with pytest.raises(RuntimeError, match=r"process \d+ on .* is rank 1 at .*another job .* export another MASTER_PORT"):
            meeting._claim(store)
    launch._Meeting(Launch("torchrun", 1, 2, 1), {}, False)._claim(store)  # whose store outlives a restart


def test_an_address_where_nobody_is(alone: None) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": "9"}
    with (
        mock.patch.dict(os.environ, given),
        pytest.raises(dist.DistNetworkError, match=r"rank 1 of 2 \(environment\) did not meet .* 127.0.0.1:9: MASTER_ADDR must be"),
    ):
        setup_mpi_distributed("gloo", timeout=timedelta(seconds=1))


def test_an_empty_variable_is_set(faked: Faked) -> None:
    faked.setup({**variables(MPICH), "MASTER_ADDR": "", "RANK": ""})
    assert (faked.environ["MASTER_ADDR"], faked.environ["RANK"]) == (LOOPBACK, "3")


def test_a_report_that_is_changed_changes_no_other(alone: None) -> None:
    for _ in range(2):
        setup_mpi_distributed("gloo")["rank"] = 7
    assert setup_mpi_distributed() == ALONE


def test_an_mpi4py_without_an_mpi_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> None:
        raise RuntimeError("cannot load MPI library")

    mpi4py = types.ModuleType("mpi4py")
    mpi4py.__getattr__ = lacking  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    assert launch._by_mpi(Launch("mpich", 0, 2, 0, mpi=True)) is None


def test_a_device_tells_the_local_rank(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group that nothing explains: rank 5 may be the second of its node."""
    bound = types.SimpleNamespace(bound_device_id=torch.device("cuda", 1))
    monkeypatch.setattr(launch, "_default", lambda: bound)
    for name, value in {"is_initialized": True, "get_rank": 5, "get_world_size": 8, "get_backend": "nccl"}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    assert launch._report(None) == {**ALONE, "rank": 5, "world_size": 8, "local_rank": 1, "device": bound.bound_device_id} | {
        "launcher": "unknown",
        "backend": "nccl",
    }


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_starter_is_the_first_without_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by its start as well: the number of a process comes again."""
    with subprocess.Popen([shutil.which("sleep") or "sleep", "9"], env={"A_RANK": "1"}) as ranked:
        while (
            b"A_RANK" not in pathlib.Path(f"/proc/{ranked.pid}/environ").read_bytes()
        ):  # which it has a moment after it has started
            time.sleep(0.001)
        monkeypatch.setattr(os, "getppid", lambda: ranked.pid)
        found, other = launch._starter("A_RANK"), launch._starter("ANOTHER_RANK")
        ranked.kill()
    assert re.fullmatch(rf"{os.getpid()}@[1-9]\d*", found) and other.startswith(f"{ranked.pid}@")
