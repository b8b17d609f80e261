"""Run functions on real processes, one rank each, and get their values or their tracebacks back.

    def total(rank, world_size, x):
        x = x + rank
        dist.all_reduce(x)
        return x

    def test_total(ranks):
        assert ranks(3).run(total, torch.ones(1)) == [6, 6, 6]

Starting a process costs seconds (it imports torch), so the fixture `ranks` keeps its pools for the whole session;
`run_ranks` starts fresh processes for one call. Functions travel by name, so they stand at the top of a module;
arguments and return values travel by value, so tensors among them are CPU tensors.

Each run starts with ``torch.manual_seed(0)`` and under the caller's warning filters, whatever ran before it. Groups
that a function makes and messages that nobody takes do stay behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import pathlib
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
TIMEOUT = 120.0
"""Seconds for one run, the start of the processes included."""
GRACE = 0.5
"""Seconds after the first failure in which other ranks may report theirs too."""


class RankError(RuntimeError):
    """A rank raised or died. `rank` is the first that did; the message holds the traceback of each."""

    def __init__(self, failures: dict[int, str], world_size: int) -> None:
        self.rank = next(iter(failures))
        parts = [f"rank {rank} of {world_size} failed:\n{text.rstrip()}" for rank, text in failures.items()]
        super().__init__("\n\n".join(parts))


def missing_device(device: str, num: int = 1) -> str | None:
    """What this machine lacks to run on `num` devices of a type ("cpu", "cuda", "xpu"), or None if it lacks nothing."""
    if device == "cpu":
        return None
    found = getattr(torch, device).device_count()
    return f"{num} {device} device(s) (torch {torch.__version__} finds {found})" if found < num else None


def missing_ranks(device: str, world_size: int) -> str | None:
    """What this machine lacks to run `world_size` ranks, each with a device of its own, or None if it lacks nothing."""
    backend = BACKENDS[device]
    if not dist.is_available() or not dist.is_backend_available(backend):
        return f"the {backend} backend of torch.distributed"
    return missing_device(device, world_size)


def rank_device() -> torch.device:
    """The device of the calling rank."""
    device = {backend: device for device, backend in BACKENDS.items()}[dist.get_backend()]
    return torch.device(device) if device == "cpu" else torch.device(device, dist.get_rank())


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, device: str = "cpu", timeout: float = TIMEOUT) -> list[Any]:
    """``[fn(rank, world_size, *args) for each rank]`` on processes started for it. Errors, skips: see `RankPool`."""
    with RankPool(world_size, device) as pool:
        return pool.run(fn, *args, timeout=timeout)


class RankPool:
    """`world_size` processes and their default process group, started on the first run and kept for the next ones.

    Skips the test, by the name of what is missing, where there are not enough devices: gloo needs none, nccl and xccl
    one a rank. After a failure the processes are killed; the next run starts new ones.
    """

    def __init__(self, world_size: int, device: str = "cpu") -> None:
        if device not in BACKENDS:
            raise ValueError(f"device {device!r}: one of {', '.join(BACKENDS)}")
        if missing := missing_ranks(device, world_size):
            pytest.skip(f"needs {missing}")
        self.world_size, self.device = world_size, device
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """``[fn(rank, world_size, *args) for each rank]``.

        Raises:
            RankError: `fn` raised on a rank, its value cannot be pickled, or the process died.
            TimeoutError: a rank did not answer in `timeout` seconds; the message says where each of these was.
        """
        job = pickle.dumps((_warning_filters(), pickle.dumps((fn, args))))
        deadline = time.monotonic() + timeout
        try:
            if not self._workers:
                self._start(timeout)
            for _, connection in self._workers:
                with contextlib.suppress(OSError):  # a process that is dead: _collect says so
                    connection.send_bytes(job)
            return self._collect(deadline, timeout)
        except BaseException:  # a test's timeout and Ctrl-C too: an answer that comes later must not meet the next run
            self._stop(kill=True)
            raise

    def close(self) -> None:
        """End the processes; a later run starts new ones."""
        self._stop(kill=False)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self, timeout: float) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.world_size, self.device, self._directory.name, timeout),
                name=f"rank {rank} of {self.world_size}",
                daemon=True,
            )
            process.start()
            theirs.close()  # the process holds the only other end: when it dies, ours reads end-of-file
            self._workers.append((process, ours))

    def _stop(self, *, kill: bool) -> None:
        for process, connection in self._workers:
            connection.close()  # what an idle process takes as its end
            if kill:
                process.kill()
        for process, _ in self._workers:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._workers = []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _collect(self, deadline: float, timeout: float) -> list[Any]:
        values: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in [each for each in waiting if each in ready]:
                rank = waiting.pop(connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank][0]
                    process.join(5)
                    ok, value = False, f"the process ended with exit code {process.exitcode}"
                if ok:
                    values[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            raise RankError(failures, self.world_size)
        if waiting:
            raise TimeoutError(self._where(sorted(waiting.values()), timeout))
        return [values[rank] for rank in range(self.world_size)]

    def _where(self, ranks: list[int], timeout: float) -> str:
        """The stacks of the ranks that did not answer."""
        assert self._directory is not None
        processes = [self._workers[rank][0] for rank in ranks]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
        lines = [f"no answer in {timeout:g} s from rank {', '.join(map(str, ranks))} of {self.world_size}"]
        for rank in ranks:
            path = _stack_file(self._directory.name, rank)
            lines.append(f"rank {rank} was at:\n{path.read_text() if path.exists() else '  its start'}")
        return "\n".join(lines)


# From here on: what runs in the processes.


def _serve(connection: Connection, rank: int, world_size: int, device: str, directory: str, timeout: float) -> None:
    """Answer jobs with ``(True, value)`` or ``(False, traceback)`` until the other end is closed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends us
    with _stack_file(directory, rank).open("w") as stacks:
        faulthandler.register(signal.SIGTERM, file=stacks, chain=True)  # last words: where we hang
        while True:
            try:
                job = connection.recv_bytes()
            except EOFError:
                break
            try:
                if not dist.is_initialized():
                    _init_process_group(rank, world_size, device, directory, timeout)
                answer = pickle.dumps((True, _run(job, rank, world_size)))
            except BaseException:  # sys.exit and pytest.skip in a rank must not leave the others waiting
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
        if dist.is_initialized():
            dist.destroy_process_group()


def _init_process_group(rank: int, world_size: int, device: str, directory: str, timeout: float) -> None:
    device_id = None
    if device != "cpu":
        device_id = torch.device(device, rank)
        getattr(torch, device).set_device(device_id)
    dist.init_process_group(
        BACKENDS[device],
        store=dist.FileStore(f"{directory}/store", world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device_id,
    )


def _run(job: bytes, rank: int, world_size: int) -> Any:
    filters, call = pickle.loads(job)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for each in reversed(filters):  # each one is put before those already there
            warnings.filterwarnings(*each)
        fn, args = pickle.loads(call)  # which imports the module of fn
        torch.manual_seed(0)
        return fn(rank, world_size, *args)


def _warning_filters() -> list[tuple[Any, ...]]:
    """The filters in force (in a test: of setup.cfg and of its marks) as arguments of `warnings.filterwarnings`."""
    return [
        (action, getattr(message, "pattern", message) or "", category, getattr(module, "pattern", module) or "", line)
        for action, message, category, module, line in warnings.filters
    ]


def _stack_file(directory: str, rank: int) -> pathlib.Path:
    return pathlib.Path(directory, f"stack-{rank}.txt")
