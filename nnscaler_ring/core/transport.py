"""Two verbs: start an exchange of tensors between ranks, and wait for what it brings.

A *walk* is a generator that yields an `Exchange` whenever rows must travel and gets back a function to wait with. A
`ProcessTransport` drives the one walk of this process over a process group; the `LocalTransport` drives the walks of all ranks of
a world in lockstep inside one process, so that any world size is tested, and timed, without processes.
"""

from __future__ import annotations

import atexit
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Exchange:
    """Tensors to send to peers and buffers to fill from them, as ``(rank in the group, tensor)``; both contiguous.

    `device` is where the tensors of all ranks are, which a rank without any cannot tell; None where every rank has some.
    """

    send: Sequence[tuple[int, Tensor]]
    receive: Sequence[tuple[int, Tensor]]
    device: torch.device | None = None


Wait = Callable[[], None]
Walk = Generator[Exchange, Wait, Any]


class Transport(ABC):
    """Where walks run: `world_size` ranks, of which this process drives the walks of `ranks`.

    In a grid of ranks, rank ``o * inner + i`` is the `i`-th of the `o`-th team: it exchanges messages with the `inner` ranks of its
    team and with the `i`-th of the other teams. `inner` is 1 where the ranks form no grid.
    """

    world_size: int
    inner: int
    ranks: Sequence[int]

    @abstractmethod
    def run(self, walks: Sequence[Walk]) -> list[Any]:
        """Drive one walk for each of `ranks` to its end and return what they return."""


class LocalTransport(Transport):
    """All ranks of a world in this process. Counts what each rank sends.

    Args:
        world_size: number of ranks.
        inner: ranks of a team, in a grid.

    Example:
        >>> transport = LocalTransport(2)
        >>> def swap(rank):
        ...     got = torch.empty(1)
        ...     wait = yield Exchange([(1 - rank, torch.tensor([float(rank)]))], [(1 - rank, got)])
        ...     wait()
        ...     return got.item()
        >>> transport.run([swap(0), swap(1)]), transport.bytes_sent
        ([1.0, 0.0], [4, 4])
    """

    def __init__(self, world_size: int, inner: int = 1) -> None:
        self.world_size, self.inner = world_size, inner
        self.ranks = range(world_size)
        self.bytes_sent = [0] * world_size

    def run(self, walks: Sequence[Walk]) -> list[Any]:
        results: list[Any] = [None] * len(walks)
        replies: list[Wait | None] = [None] * len(walks)
        while True:
            exchanges: list[Exchange] = []
            for rank, walk in enumerate(walks):
                try:
                    exchanges.append(walk.send(replies[rank]))  # type: ignore[arg-type]
                except StopIteration as end:
                    results[rank] = end.value
            if not exchanges:
                return results
            assert len(exchanges) == len(walks), "all ranks of a world yield the same number of exchanges"
            self._deliver(exchanges)
            replies = [_nothing] * len(walks)

    def _deliver(self, exchanges: Sequence[Exchange]) -> None:
        mail: dict[tuple[int, int], list[Tensor]] = {}
        for rank, exchange in enumerate(exchanges):
            for peer, tensor in exchange.send:
                mail.setdefault((rank, peer), []).append(tensor)
                self.bytes_sent[rank] += tensor.numel() * tensor.element_size()
        for rank, exchange in enumerate(exchanges):
            for peer, buffer in exchange.receive:
                tensor = mail[peer, rank].pop(0)
                assert tensor.shape == buffer.shape and tensor.dtype == buffer.dtype, "sender and receiver agree"
                buffer.copy_(tensor)
        assert not any(mail.values()), "every tensor sent is received"


def _nothing() -> None:
    return None


class OneRank(Transport):
    """Drives the walk of one rank."""

    @abstractmethod
    def start(self, exchange: Exchange) -> Wait:
        """Start sending and receiving; the returned function waits until this process may read what arrived."""

    def run(self, walks: Sequence[Walk]) -> list[Any]:
        (walk,) = walks
        waits: list[Wait] = []
        lost = False

        def start(exchange: Exchange) -> Wait:
            wait = self.start(exchange)
            waits.append(wait)

            def waited() -> None:
                nonlocal lost
                lost = True  # unless it comes back
                wait()
                lost = False

            return waited

        try:
            exchange = next(walk)
            while True:
                reply = start(exchange)
                del exchange  # or what it sends would stay until the next one
                exchange = walk.send(reply)
        except StopIteration as end:
            return [end.value]
        except Exception:
            for wait in () if lost else waits:  # what is under way would meet the messages of the group's next call
                with suppress(Exception):
                    wait()
            raise


@lru_cache(maxsize=1)
def _wait_at_exit() -> None:
    """Before Python ends, leave the interpreter for a moment to the threads of groups on the CPU.

    The thread that frees the tensors of a group's last message needs the interpreter for it, and aborts the process if that is
    shutting down already (pytorch#190489). It would have been joined if nothing referred to the group, but torch's caches do.
    """
    atexit.register(time.sleep, 0.2)


_MET: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()
"""The device types on which a group's ranks have met. Nothing here keeps a group alive after it is destroyed."""


class ProcessTransport(OneRank):
    """This process' rank, by non-blocking point-to-point messages in the order of the plan.

    Args:
        group: the ranks; in a grid the ranks of one place in each team.
        team: in a grid, the ranks of this team.
    """

    def __init__(self, group: dist.ProcessGroup, team: dist.ProcessGroup | None = None) -> None:
        self.groups = (group,) if team is None else (group, team)
        self.inner = 1 if team is None else team.size()
        self.world_size = group.size() * self.inner
        self._place = 0 if team is None else team.rank()
        self.ranks = (group.rank() * self.inner + self._place,)
        if any(device.type == "cpu" for device in group._device_types):
            _wait_at_exit()

    @cached_property
    def _peers(self) -> dict[int, tuple[int, dist.ProcessGroup]]:
        """For each rank that this one meets its global rank and their group."""
        group, *team = self.groups
        peers = {n * self.inner + self._place: (rank, group) for n, rank in enumerate(dist.get_process_group_ranks(group))}
        first = self.ranks[0] - self._place
        return peers | {first + n: (rank, of) for of in team for n, rank in enumerate(dist.get_process_group_ranks(of))}

    def start(self, exchange: Exchange) -> Wait:
        self._meet(exchange)
        ops = [dist.P2POp(dist.isend, tensor, *self._peers[peer]) for peer, tensor in exchange.send]
        ops += [dist.P2POp(dist.irecv, tensor, *self._peers[peer]) for peer, tensor in exchange.receive]
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            while works:
                works.pop(0).wait()
            ops.clear()  # which kept the tensors until now

        return wait

    def _meet(self, exchange: Exchange) -> None:
        """One collective of each whole group on each device type before the first message on it, also of ranks without mail.

        NCCL and oneCCL set up their communicator with every rank of the group, and hang where only some take part.
        """
        device = exchange.device or next((tensor.device for _, tensor in (*exchange.send, *exchange.receive)), None)
        if device is None or device.type == "cpu":
            return
        for group in self.groups:
            if device.type not in (met := _MET.setdefault(group, set())):
                met.add(device.type)
                dist.all_reduce(torch.zeros(1, device=device), group=group)


class PretendTransport(OneRank):
    """One rank of a world whose others are not there: it does its own work, sends nothing, and zeros arrive.

    For measuring what one rank's share costs; the results are not those of attention.
    """

    def __init__(self, world_size: int, rank: int, inner: int = 1) -> None:
        self.world_size, self.inner = world_size, inner
        self.ranks = (rank,)

    def start(self, exchange: Exchange) -> Wait:
        for _, buffer in exchange.receive:
            buffer.zero_()
        return _nothing


_NOT_A_MEMBER: Any = dist.GroupMember.NON_GROUP_MEMBER
"""What ``torch.distributed.new_group`` returns on a rank outside the group."""


def member_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group, or the default group for None (None where there is none).

    Raises:
        ValueError: this process is not in the group.
    """
    if group is _NOT_A_MEMBER:
        raise ValueError("this process is not a member of the process group given: call on its members only")
    if group is None and dist.is_initialized():
        return dist.group.WORLD
    return group


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group of a name, as torch's functional collectives find it."""
    group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return group


GRID = "|"
"""Joins the names of a grid's two groups: ranks of one place in each team, ranks of a team."""


def is_local(group: str) -> bool:
    """All ranks of the group are in this process."""
    return group.startswith("local:")


def is_grid(group: str) -> bool:
    """The group is a grid of ranks."""
    return GRID in group or (group.startswith(("local:", "pretend:")) and "x" in group)


@lru_cache(maxsize=64)
def _in_this_process(group: str) -> Transport:
    kind, size, *rank = group.split(":")
    outer, _, inner = size.partition("x")
    world, team = int(outer) * int(inner or 1), int(inner or 1)
    return PretendTransport(world, int(rank[0]), team) if kind == "pretend" else LocalTransport(world, team)


def transport_of(group: str) -> Transport:
    """The transport of a group's name.

    ``local:N`` for N ranks in this process, ``pretend:N:R`` for rank R of N without the others, ``OxI`` in place of N for a grid of
    O teams of I ranks; else the name of a process group, or of two, joined by `GRID`.
    """
    if is_local(group) or group.startswith("pretend:"):
        return _in_this_process(group)
    return ProcessTransport(*map(resolve_group, group.split(GRID)))


@torch.compiler.assume_constant_result
def rank_in(group: str) -> int:
    """This process's rank in a group; the first where all are in this process."""
    return transport_of(group).ranks[0]


@torch.compiler.assume_constant_result
def num_ranks(group: str) -> int:
    """How many ranks share a sequence in a group."""
    return transport_of(group).world_size


class RingComm:
    """Neighbour exchange on a ring, for people who write a variant: queue sends and receives, `commit`, `wait`.

    Args:
        process_group: the ring; each rank sends to the next higher rank and receives from the next lower. None: the default group.

    Raises:
        ValueError: no group, or one that this process is not in.
        RuntimeError: `commit` twice without `wait`, or `wait` without `commit`.

    Example:
        >>> def on_each_rank(k, v, compute):
        ...     comm = RingComm()
        ...     for step in range(comm.world_size):
        ...         if step + 1 < comm.world_size:
        ...             next_k, next_v = comm.send_recv_kv(k, v)
        ...         compute(k, v)
        ...         if step + 1 < comm.world_size:
        ...             comm.wait()
        ...             k, v = next_k, next_v
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        group = member_of(process_group)
        if group is None:
            raise ValueError("RingComm needs a process group: call torch.distributed.init_process_group first")
        self._transport = ProcessTransport(group)
        self.rank, self.world_size = group.rank(), group.size()
        self._send: list[tuple[int, Tensor]] = []
        self._receive: list[tuple[int, Tensor]] = []
        self._wait: Wait | None = None

    def send_recv(self, to_send: Tensor, recv_tensor: Tensor | None = None) -> Tensor:
        """Queue `to_send` for the next rank; returns the buffer (`recv_tensor`, or a new one) that the previous rank will fill."""
        buffer = torch.empty_like(to_send, memory_format=torch.contiguous_format) if recv_tensor is None else recv_tensor
        if not buffer.is_contiguous():
            raise ValueError(f"recv_tensor of shape {tuple(buffer.shape)} and strides {buffer.stride()} must be contiguous")
        if buffer.dtype != to_send.dtype:  # bytes travel: they would be read as other numbers
            raise ValueError(f"recv_tensor is {buffer.dtype}, to_send {to_send.dtype}: give one dtype")
        self._send.append(((self.rank + 1) % self.world_size, to_send.contiguous()))
        self._receive.append(((self.rank - 1) % self.world_size, buffer))
        return buffer

    def send_recv_kv(
        self, k: Tensor, v: Tensor, k_buffer: Tensor | None = None, v_buffer: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queue k and v, and commit; returns the buffers that hold the previous rank's k and v after `wait`."""
        buffers = self.send_recv(k, k_buffer), self.send_recv(v, v_buffer)
        self.commit()
        return buffers

    def commit(self) -> None:
        """Start what is queued."""
        if self._wait is not None:
            raise RuntimeError("commit called twice: wait for the exchange under way first")
        if self.world_size == 1:  # a rank's message to itself is a copy
            for (_, tensor), (_, buffer) in zip(self._send, self._receive, strict=True):
                buffer.copy_(tensor)
            self._wait = _nothing
        else:
            self._wait = self._transport.start(Exchange(self._send, self._receive))

    def wait(self) -> None:
        """Wait for what was committed."""
        if self._wait is None:
            raise RuntimeError("wait called before commit")
        self._wait()
        self._wait, self._send, self._receive = None, [], []


_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name, torch 2.13


class AllGatherComm:
    """Asynchronous all-gathers, for people who write a variant.

    Args:
        group: the process group; None: the default group.

    Raises:
        ValueError: a group that this process is not in.

    Example:
        >>> def on_each_rank(k):
        ...     comm, everything = AllGatherComm(), k.new_empty(dist.get_world_size() * k.shape[0], *k.shape[1:])
        ...     comm.all_gather(everything, k)
        ...     comm.wait()
        ...     return everything
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = member_of(group)
        self._works: list[dist.Work] = []

    def all_gather(self, output: Tensor, input: Tensor) -> None:
        """Start gathering every rank's `input` ``[n, ...]`` into `output` ``[world_size * n, ...]``, rank after rank."""
        self._works.append(_all_gather(output, input.contiguous(), group=self.group, async_op=True))

    def wait(self) -> None:
        """Wait for every gather started."""
        for work in self._works:
            work.wait()
        self._works = []
