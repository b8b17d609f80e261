"""Start the default process group under whatever started this process: torchrun, mpiexec, slurm, or nobody.

What launchers say is data: a row of `LAUNCHERS` names one launcher's environment variables, `detect` reads the first row that
applies, and `setup_mpi_distributed` acts on it. Two things that a group needs no mpiexec says, so they are found here:

- the host of rank 0: 127.0.0.1 where all ranks are on one node; else by MPI where mpi4py can be imported, else the first host that
  slurm names, else an error. Open MPI names mpiexec's own host and hydra each rank's own; neither need be that of rank 0.
- a port, equal on all ranks and another for every job: with the host by MPI, else a hash of what names the job (`Launcher.job`).
  MPICH names no job; on one node the process that started the ranks does instead.

MPI is started only where it is needed: an mpi4py of another MPI than the launcher's may end the process.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pathlib
import re
import socket
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

LOOPBACK = "127.0.0.1"
PORTS = range(16384, 32768)
"""Where derived ports lie: below those that Linux gives to outgoing connections, from 32768 on."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Names of one launcher's environment variables; where there are several, the first that is set counts.

    Args:
        name: what `setup_mpi_distributed` calls it.
        signs: any of these set means that this launcher started the process...
        unless: ...if this one is not set.
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process among those on its node.
        local_size: number of processes on its node.
        job: all that are set name the job together, alike on all ranks.
        nodes: slurm's list of the job's nodes; rank 0 is on the first.
        mpi: on several nodes, mpi4py may tell more.
    """

    name: str
    signs: tuple[str, ...]
    unless: str = ""
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    mpi: bool = False


_TORCH = Launcher(
    name="torchrun",
    signs=("TORCHELASTIC_RUN_ID",),
    rank=("RANK",),
    world_size=("WORLD_SIZE",),
    local_rank=("LOCAL_RANK",),
    local_size=("LOCAL_WORLD_SIZE",),
)
_OPENMPI = Launcher(
    name="openmpi",
    signs=("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    rank=("OMPI_COMM_WORLD_RANK",),
    world_size=("OMPI_COMM_WORLD_SIZE",),
    local_rank=("OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK"),
    local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
    job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    nodes=("SLURM_JOB_NODELIST",),
    mpi=True,
)
_MPICH = Launcher(
    name="mpich",
    signs=("MPI_LOCALRANKID",),
    rank=("PMI_RANK",),
    world_size=("PMI_SIZE",),
    local_rank=("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "LOCAL_RANK"),
    local_size=("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE"),
    job=("PALS_APID", "PMI_JOBID", "PMI_KVSNAME"),
    nodes=("SLURM_JOB_NODELIST",),
    mpi=True,
)
_SLURM = Launcher(
    name="slurm",
    signs=("SLURM_STEP_ID",),
    rank=("SLURM_PROCID",),
    world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    local_rank=("SLURM_LOCALID", "LOCAL_RANK"),
    job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    nodes=("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"),  # the last two keep naming a whole allocation
)
# The order matters: torchrun runs inside the others; mpiexec under slurm starts its helpers by srun, whose variables (one task for
# each node) its ranks inherit; srun --mpi=pmi2 sets PMI_RANK too, but only hydra sets MPI_LOCALRANKID. A batch script has a
# SLURM_PROCID and its job's SLURM_NTASKS, but no step, and ENVIRONMENT=BATCH: nobody started that many of it.
LAUNCHERS = (
    _TORCH,
    _OPENMPI,
    replace(_MPICH, name="intelmpi", signs=("I_MPI_HYDRA_UUID",), job=("I_MPI_HYDRA_UUID",)),
    _MPICH,
    _SLURM,
    replace(_SLURM, signs=("SLURM_PROCID",), unless="ENVIRONMENT"),
    replace(_MPICH, signs=("PMI_RANK", "PMI_SIZE")),
    replace(_TORCH, name="environment", signs=("RANK", "WORLD_SIZE")),
)

BACKENDS = (("nccl", "cuda"), ("xccl", "xpu"), ("ccl", "xpu"), ("gloo", "cpu"))
"""Backends and their devices, the best first. xccl came into torch with 2.7; ccl is that of oneccl_bindings_for_pytorch."""


@dataclass(frozen=True)
class Launch:
    """What a launcher says of one process.

    Args:
        launcher: its name in `LAUNCHERS`, or ``single`` where no launcher started the process.
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process on its node.
        host: of rank 0: 127.0.0.1 where all ranks are on one node, None where the launcher does not tell.
        job: what names the job, or None.
        variable: the variable that told the rank.
        mpi: on several nodes, mpi4py may tell more.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    host: str | None = None
    job: str | None = None
    variable: str = "RANK"
    mpi: bool = False


def warn_if_alone(what: str) -> None:
    """Warn where this process was started as one of many and has joined no group: it computes alone what the others do, too."""
    if dist.is_initialized() or not any(sign in os.environ for row in LAUNCHERS for sign in row.signs):
        return
    try:
        launch = detect({"LOCAL_RANK": "0", **os.environ})  # which does not matter here
    except ValueError:  # what says so may have been left by something else
        return
    if launch.world_size > 1:
        level, frame = 1, inspect.currentframe()
        while frame is not None and str(frame.f_globals.get("__name__")).startswith("nnscaler_ring."):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            f"this process is one of {launch.world_size} ({launch.launcher}), but there is no process group, so {what} is of this "
            "process alone: call torch.distributed.init_process_group() or nnscaler_ring.launch.setup_mpi_distributed() first",
            stacklevel=level,
        )


def detect(environ: Mapping[str, str]) -> Launch:
    """What started a process that has these environment variables. An empty variable counts as unset.

    Args:
        environ: the variables.

    Raises:
        ValueError: they contradict each other, or some are missing.

    Example:
        >>> detect({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}).local_rank
        1
        >>> detect({}).launcher
        'single'
        >>> detect({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
        Traceback (most recent call last):
        ...
        ValueError: RANK=2, but WORLD_SIZE=2: ranks go from 0 to 1
    """
    environ = {name: value for name, value in environ.items() if value}
    row = next((each for each in LAUNCHERS if environ.keys() & {*each.signs} and each.unless not in environ), None)
    if row is None:
        return Launch("single", 0, 1, _read(environ, ("LOCAL_RANK",))[1] or 0, LOOPBACK)
    variable, rank = _read(environ, row.rank)
    of_size, world_size = _read(environ, row.world_size)
    of_local, local_rank = _read(environ, row.local_rank)
    of_local_size, local_size = _read(environ, row.local_size)
    if rank is None or world_size is None:
        sign = next(name for name in row.signs if name in environ)
        lacking = " or ".join(row.rank if rank is None else row.world_size)
        raise ValueError(
            f"{sign}={environ[sign]} says that this process has a rank ({row.name}), but {lacking} is unset or empty: set both"
        )
    if world_size < 1:
        raise ValueError(f"{of_size}={world_size}: there is one process at least")
    if rank >= world_size:
        raise ValueError(f"{variable}={rank}, but {of_size}={world_size}: ranks go from 0 to {world_size - 1}")
    if local_rank is None:
        if world_size > 1:
            raise ValueError(f"{' or '.join(row.local_rank)} is unset: export LOCAL_RANK, the rank of this process on its node")
        local_rank = 0
    of_bound, bound = (of_size, world_size) if local_size is None else (of_local_size, local_size)
    if local_rank >= bound:
        raise ValueError(f"{of_local}={local_rank}, but {of_bound}={bound}: local ranks go from 0 to {bound - 1}")
    if bound > world_size:
        raise ValueError(f"{of_bound}={bound}, but {of_size}={world_size}: a node has no more processes than there are")
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank)):
        if name in environ and environ[name] != str(value):
            raise ValueError(f"{name}={environ[name]}, but {row.name} says {value}: unset {name}")
    host = _host(environ, row, world_size, local_size)
    job = "/".join(environ[name] for name in row.job if name in environ)
    if not job and row.mpi and host != LOOPBACK:
        job = environ.get("SLURM_JOB_ID", "")  # of the allocation: mpiexec may have been called more than once in it
    return Launch(row.name, rank, world_size, local_rank, host, job or None, variable, row.mpi)


def _read(environ: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, int | None]:
    """The first of the variables that is set, and its number; None where none is."""
    name = next((name for name in names if name in environ), "")
    value = environ.get(name)
    if value is not None and not (value.isascii() and value.isdecimal()):
        raise ValueError(f"{name}={value}: give a whole number, 0 or more")
    return name, None if value is None else int(value)


def _host(environ: Mapping[str, str], row: Launcher, world_size: int, local_size: int | None) -> str | None:
    """The host of rank 0, if the launcher tells. Slurm writes ``node[01-03,7],big1`` for node01, node02, node03, node7, big1."""
    nodes = next((environ[name] for name in row.nodes if name in environ), None)
    first = nodes and re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
    one_node = first is not None and first == nodes if local_size is None else local_size == world_size
    return LOOPBACK if one_node else first


class Started(TypedDict):
    """What `setup_mpi_distributed` returns."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str
    backend: str


@dataclass
class _Meeting:
    """Where the ranks of a launch meet. The store outlives the groups: each takes keys of its own in it.

    With a store for each group, a rank that is ahead would meet the last one before it closes, or find what the last group left
    under torchrun, whose agent keeps one store. `derived`: the port is this package's choice, nobody exported one.
    """

    launch: Launch
    variables: dict[str, str]
    derived: bool = False
    store: dist.Store | None = None
    groups: int = 0

    def next_store(self, timeout: timedelta | None) -> dist.Store:
        """The store of the next group; call with the variables set."""
        if self.store is None:
            rank, world_size = self.launch.rank, self.launch.world_size
            within = {} if timeout is None else {"timeout": timeout}
            store = dist.HashStore() if world_size == 1 else next(dist.rendezvous("env://", rank, world_size, **within))[0]
            self._claim(store)
            self.store = store
        self.groups += 1
        return dist.PrefixStore(self._key(str(self.groups)), self.store)

    def _key(self, name: str) -> str:
        job = f"{self.launch.job}/" if self.derived else ""  # another job may have derived the same port
        return f"nnscaler_ring/{job}{name}"

    def _claim(self, store: dist.Store) -> None:
        """RuntimeError where another process has this rank: two jobs would go on as one. torchrun's store outlives restarts."""
        if self.launch.world_size == 1 or self.launch.launcher == "torchrun":
            return
        own = f"process {os.getpid()} on {socket.gethostname()}"
        there = store.compare_set(self._key(f"rank {self.launch.rank}"), "", own).decode()
        if there != own:
            raise RuntimeError(
                f"{there} is rank {self.launch.rank} at {_place(os.environ)}, so this process is of another job that meets there, "
                "too: export another MASTER_PORT for one of the two"
            )


def _place(environ: Mapping[str, str]) -> str:
    return f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"


@dataclass(frozen=True)
class _Made:
    """A default group, and what came with it."""

    group: dist.ProcessGroup
    started: Started
    variables: dict[str, str]


@dataclass
class _Process:
    """What this module did in this process; one, as there is one default group."""

    meeting: _Meeting | None = None
    made: _Made | None = None


_process = _Process()


def setup_mpi_distributed(backend: str | None = None, *, timeout: timedelta | None = None) -> Started:
    """Start the default process group of torch.distributed under torchrun, mpiexec (Open MPI, MPICH, Intel MPI), srun, or alone.

    MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK are set where they are unset, and never changed. A world of one needs
    neither address nor port, and takes none.

    On one node MASTER_ADDR is 127.0.0.1. On several nodes under mpiexec, mpi4py, where it can be imported and belongs to the MPI of
    the launcher, gives the name of rank 0's host and a free port there. Otherwise:

    - MASTER_ADDR is the first host of slurm's list. Without slurm, or where rank 0 is on another, export it.
    - MASTER_PORT is derived from the job's id (PMIX_NAMESPACE and OMPI_MCA_ess_base_jobid of Open MPI, I_MPI_HYDRA_UUID, PALS_APID,
      PMI_JOBID, PMI_KVSNAME, SLURM_JOB_ID and SLURM_STEP_ID); where there is none, on one node, from the process that started the
      ranks. Of some thousand pairs of jobs on one machine, one takes the same port; the later one then fails, and exporting
      MASTER_PORT helps.

    The device is number ``local_rank % device_count`` of its type and becomes the current one. No collective runs here. A default
    group that exists is left alone, like the current device, and reported: calling this twice is calling it once.

    Args:
        backend: ``nccl``, ``xccl``, ``ccl`` or ``gloo``, which also chooses the device. None: nccl where there is CUDA, else xccl
            where there is an XPU (ccl of oneccl_bindings_for_pytorch where torch lacks xccl), else gloo on the CPU.
        timeout: after which a rank gives up waiting for others; torch's own where None: 10 minutes of nccl, else 30.

    Returns:
        ``rank``, ``world_size``, ``local_rank``, ``device`` (a `torch.device`), ``launcher`` (``torchrun``, ``openmpi``, ``mpich``,
        ``intelmpi``, ``slurm``, ``environment`` where only RANK and WORLD_SIZE tell, ``single``, or ``unknown`` for a group that
        exists and that no variable explains), ``backend``.

    Raises:
        ValueError: variables contradict each other or the group that exists, MASTER_ADDR or MASTER_PORT cannot be known, or no such
            backend. Every rank finds this alone, before any communication.
        NotImplementedError: the backend is missing here, or the device is there and its backends are not.
        RuntimeError: ranks did not meet within the timeout, or meet those of another job.

    Example:
        >>> started = setup_mpi_distributed("gloo")  # python example.py, or mpiexec -n 8 python example.py
        >>> started["rank"], started["world_size"], started["device"]
        (0, 1, device(type='cpu'))
        >>> cleanup_distributed()
    """
    if _process.made is not None and not _is_default(_process.made.group):
        cleanup_distributed()  # somebody else destroyed the group: what came with it goes too
    if timeout is not None and not isinstance(timeout, timedelta):
        raise ValueError(f"timeout={timeout!r}: give a datetime.timedelta")
    if dist.is_initialized():
        return _report(backend)
    launch = detect(os.environ)
    backend, kind = _backend_here(backend)
    if _process.meeting is None or _process.meeting.launch != launch:
        _process.meeting = _Meeting(launch, _variables(launch, os.environ), not os.environ.get("MASTER_PORT"))
    device = torch.device(kind)
    if kind != "cpu":
        module = torch.get_device_module(kind)
        device = torch.device(kind, launch.local_rank % module.device_count())
        module.set_device(device)
    variables = {name: value for name, value in _process.meeting.variables.items() if not os.environ.get(name)}
    os.environ.update(variables)
    try:
        dist.init_process_group(
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            store=_process.meeting.next_store(timeout),
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
    except BaseException as why:
        place, told = _place(os.environ), str(why).partition("\n")[0]
        _unset(variables)
        if not isinstance(why, (dist.DistStoreError, dist.DistNetworkError)):
            raise
        raise type(why)(
            f"rank {launch.rank} of {launch.world_size} ({launch.launcher}) did not meet the others at {place}: MASTER_ADDR must "
            f"be the host of rank 0, by a name or address that every node reaches, MASTER_PORT one that is free there; {told}"
        ) from why
    started = Started(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        device=device,
        launcher=launch.launcher,
        backend=backend,
    )
    _process.made = _Made(_default(), started, variables)
    return started.copy()


def cleanup_distributed() -> None:
    """Destroy the default group that `setup_mpi_distributed` made, and unset the variables that it set.

    Does nothing where it made none: a group that somebody else made is theirs to destroy.

    Example:
        >>> cleanup_distributed()
    """
    made, _process.made = _process.made, None
    if made is None:
        return
    if _is_default(made.group):
        if not _LETS_GO:
            time.sleep(0.2)
        dist.destroy_process_group()
    _unset(made.variables)


_LETS_GO = TorchVersion(torch.__version__) >= "2.8"
"""A group that ends lets gloo's threads have the interpreter, to drop its last message; before it may hang (pytorch#154976)."""


def _default() -> Any:
    return dist.group.WORLD


def _is_default(group: dist.ProcessGroup) -> bool:
    return dist.is_initialized() and _default() is group


def _unset(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if os.environ.get(name) == value:
            del os.environ[name]


def _report(backend: str | None) -> Started:
    """What there is to say of the default group that exists."""
    rank, world_size, used = dist.get_rank(), dist.get_world_size(), str(dist.get_backend())
    if backend not in (None, used):
        raise ValueError(f"backend={backend!r}, but a default process group exists, of backend {used!r}: destroy it first")
    if _process.made is not None:
        return _process.made.started.copy()
    launch = detect(os.environ)
    known = launch.launcher != "single" or world_size == 1
    if known and (launch.rank, launch.world_size) != (rank, world_size):
        raise ValueError(
            f"{launch.launcher} says rank {launch.rank} of {launch.world_size}, but a default process group exists, in which this "
            f"process is rank {rank} of {world_size}: destroy it first, or unset what {launch.launcher} set"
        )
    device = _device_of_default()
    guess = rank if device.index is None else device.index
    return Started(
        rank=rank,
        world_size=world_size,
        local_rank=launch.local_rank if known else guess,
        device=device,
        launcher=launch.launcher if known else "unknown",
        backend=used,
    )


def _device_of_default() -> torch.device:
    group = _default()
    if group.bound_device_id is not None:
        return group.bound_device_id
    for kind in (each.type for each in group._device_types):
        if kind != "cpu" and torch.get_device_module(kind).is_available():
            return torch.device(kind, torch.get_device_module(kind).current_device())
    return torch.device("cpu")


def _backend_here(backend: str | None) -> tuple[str, str]:
    """The backend, or the best one, and its device type."""
    here = [kind for kind in ("cuda", "xpu", "cpu") if torch.get_device_module(kind).is_available()]
    rows = [(name, kind) for name, kind in BACKENDS if (kind == here[0] if backend is None else name == backend)]
    if not rows:
        raise ValueError(f"backend={backend!r}: give one of {', '.join(name for name, _ in BACKENDS)}, or None for the best here")
    for name, kind in rows:
        if kind in here and _can(name):
            return name, kind
    wanted = " or ".join(f"{name} for {kind}" for name, kind in rows)
    raise NotImplementedError(
        f"{wanted} is not in this torch {torch.__version__}, which finds {', '.join(here)}: gloo runs on the CPU"
    )


def _can(backend: str) -> bool:
    if backend == "ccl":
        try:
            importlib.import_module("oneccl_bindings_for_pytorch")  # registers it
        except ImportError:
            return False
    return dist.is_backend_available(backend)


def _variables(launch: Launch, environ: Mapping[str, str]) -> dict[str, str]:
    """The rendezvous variables: those of `environ`, and for the others what is known or derived."""
    variables = {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size), "LOCAL_RANK": str(launch.local_rank)}
    if launch.world_size == 1:
        return variables
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"MASTER_PORT={port}: give a port, 1 to 65535, the same on all ranks")
    if not (host and port):
        many = launch.mpi and launch.host != LOOPBACK
        found = (many and _by_mpi(launch)) or (launch.host, _port(launch))
        host, port = host or found[0], port or found[1]
    way_out = "on all ranks" + (", or install mpi4py for the MPI of this mpiexec" if launch.mpi else "")
    if not host:
        both = "MASTER_ADDR, its host" if port else "MASTER_ADDR, its host, and MASTER_PORT, a free port there,"
        raise ValueError(f"{launch.launcher} does not say on which node rank 0 is: export {both} {way_out}")
    if not port:
        raise ValueError(f"{launch.launcher} names no job to derive a port from: export MASTER_PORT, the same {way_out}")
    return variables | {"MASTER_ADDR": host, "MASTER_PORT": port}


def _port(launch: Launch) -> str | None:
    """A port derived from what names the job."""
    job = launch.job or (_starter(launch.variable) if launch.host == LOOPBACK else None)
    return job and str(PORTS[zlib.crc32(job.encode()) % len(PORTS)])


def _by_mpi(launch: Launch) -> tuple[str, str] | None:
    """The host of rank 0 and a free port there, by MPI; None where mpi4py is missing or of another MPI than the launcher's."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed; installed without an MPI
        return None
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):  # another MPI takes each process for a world
        return None
    with socket.socket() as probe:
        probe.bind(("", 0))
        return world.bcast((socket.gethostname(), str(probe.getsockname()[1])), root=0)


def _starter(variable: str) -> str:
    """What names the process that started the ranks of this node: the nearest ancestor without a rank of its own.

    Not simply the parent, which may be a shell or a wrapper around each rank.
    """
    pid = os.getppid()
    while True:
        process = pathlib.Path("/proc", str(pid))
        try:
            fields = process.joinpath("stat").read_text().rpartition(")")[2].split()  # those from the third on, state
            ranked = f"\0{variable}=".encode() in b"\0" + process.joinpath("environ").read_bytes()
        except OSError:  # no /proc; the process of another user
            return str(pid)
        if not ranked:
            return f"{pid}@{fields[19]}"  # its start time
        pid = int(fields[1])
