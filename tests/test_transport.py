"""Transports: the local one delivers and counts, the one over processes gives the same bits; `RingComm` has its own file."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring.core import engine
from nnscaler_ring.core.layouts import build
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.relayout import _gather, _relayout
from nnscaler_ring.core.transport import (
    Exchange,
    LocalTransport,
    OneRank,
    ProcessTransport,
    RingComm,
    Walk,
    _wait_at_exit,
    transport_of,
)
from tests import oracle


def passing_on(rank: int, world: int, hops: int) -> Walk:
    """Passes its rank round a ring and returns what it saw; each hop's tensors differ in size and dtype."""
    seen, value = [], rank
    for hop in range(hops):
        dtype = [torch.float32, torch.bfloat16][hop % 2]
        got = torch.empty(hop + 1, dtype=dtype)
        sent = torch.full((hop + 1,), float(value), dtype=dtype)
        wait = yield Exchange([((rank + 1) % world, sent)], [((rank - 1) % world, got)])
        wait()
        value = int(got[-1])
        seen.append(value)
    return seen


@pytest.mark.parametrize("world", [2, 3, 8])
def test_local_delivers_and_counts(world: int) -> None:
    transport = LocalTransport(world)
    seen = transport.run([passing_on(rank, world, world) for rank in transport.ranks])
    assert seen == [[(rank - hop) % world for hop in range(1, world + 1)] for rank in range(world)]
    assert transport.bytes_sent == [sum((hop + 1) * (4, 2)[hop % 2] for hop in range(world))] * world
    transport.run([passing_on(rank, world, 1) for rank in transport.ranks])
    assert transport.bytes_sent[0] == sum((hop + 1) * (4, 2)[hop % 2] for hop in range(world)) + 4, "goes on counting"


def test_local_keeps_the_order_of_messages_to_one_peer() -> None:
    def walk(rank: int) -> Walk:
        got = [torch.empty(1), torch.empty(1)]
        wait = yield Exchange([(1 - rank, torch.tensor([x])) for x in (1.0, 2.0)], [(1 - rank, x) for x in got])
        wait()
        return [x.item() for x in got]

    assert LocalTransport(2).run([walk(0), walk(1)]) == [[1.0, 2.0]] * 2


def once(send: list[int], receive: list[int], size: int = 1) -> Walk:
    wait = yield Exchange([(peer, torch.zeros(1)) for peer in send], [(peer, torch.zeros(size)) for peer in receive])
    wait()


def test_local_finds_plans_that_do_not_fit() -> None:
    with pytest.raises(AssertionError, match="every tensor sent is received"):
        LocalTransport(2).run([once([1], []), once([], [])])
    with pytest.raises(AssertionError, match="sender and receiver agree"):
        LocalTransport(2).run([once([1], []), once([], [0], size=2)])
    with pytest.raises(KeyError):
        LocalTransport(2).run([once([], []), once([], [0])])
    with pytest.raises(AssertionError, match="the same number of exchanges"):
        LocalTransport(2).run([once([1], [1]), passing_on(1, 2, 2)])


def test_a_transport_is_found_by_name_once() -> None:
    assert transport_of("local:5") is transport_of("local:5")
    assert transport_of("local:5").world_size == 5 and list(transport_of("local:5").ranks) == list(range(5))


def test_a_ring_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="RingComm needs a process group: call"):
        RingComm(None)


CALLS = [
    ("contiguous", "ring", {"causal": True}),
    ("zigzag", "ring", {"causal": True}),
    ("stripe", "ring", {}),
    ("zigzag", "all_gather", {"causal": True, "heads_stride": 1}),
    ("contiguous", "halo", {"causal": True, "window": (9, 0), "sinks": 2}),
    ("contiguous", "broadcast", {"window": (3, 4)}),
    ("contiguous", "auto", {"causal": True, "window": (2, 0)}),
]
LENGTH, HEADS, SCALE = 29, (4, 2, 8, 6), 0.3


def on_processes(rank: int, world: int) -> list[list[torch.Tensor]]:
    """This rank's answers to all calls, and its walk over a transport."""
    group = dist.group.WORLD
    transport = transport_of(group.group_name)
    assert isinstance(transport, ProcessTransport) and list(transport.ranks) == [rank]
    assert transport.world_size == world
    assert transport.run([passing_on(rank, world, world)])[0][-1] == rank
    answers = []
    for layout, way, named in CALLS:
        rows = torch.from_numpy(build(layout, LENGTH, world).positions(rank))
        q, k, v, d_out = (x[:, rows] for x in oracle.inputs(0, (2, LENGTH, LENGTH), HEADS))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        recipe = Recipe(group=group.group_name, layout=layout, transport=way, kernel="reference", **named)
        out, lse, _ = engine.attention(*leaves, *[None] * 6, LENGTH, LENGTH, SCALE, 0, str(recipe))
        grads = torch.autograd.grad(out, leaves, d_out)
        answers.append([x.detach() for x in (out, lse, *grads)])
    return answers


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_same_bits(ranks: Any, world: int, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "cpu":
        pytest.skip("compares bits in float64 on CPU; needs --device cpu")
    by_rank = ranks(world).run(on_processes)
    given = oracle.inputs(0, (2, LENGTH, LENGTH), HEADS)
    for n, (layout, way, named) in enumerate(CALLS):
        recipe = Recipe(group=f"local:{world}", layout=layout, transport=way, kernel="reference", **named)
        local = oracle.run(given, SCALE, recipe)
        for rank in range(world):
            rows = torch.from_numpy(build(layout, LENGTH, world).positions(rank))
            for name, whole, own in zip(oracle.Answer._fields, local, by_rank[rank][n], strict=True):
                want = whole[:, :, rows] if name == "lse" else whole[:, rows]
                assert torch.equal(own, want), f"{name} of rank {rank}: {layout}, {way}, {named}"


def interrupted(rank: int, world: int) -> Walk:
    """Fails, as a kernel may that runs out of memory, while messages are under way."""
    yield Exchange([((rank + 1) % world, torch.zeros(1000))], [((rank - 1) % world, torch.empty(1000))])
    raise MemoryError("no room")


def goes_on(rank: int, world: int) -> list[int]:
    transport = transport_of(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    for _ in range(3):
        with pytest.raises(MemoryError, match="no room"):
            transport.run([interrupted(rank, world)])
        gc.collect()
    return transport.run([passing_on(rank, world, world)])[0]


@pytest.mark.parametrize("world", [2, 3])
def test_a_group_outlives_an_error_that_all_ranks_have(ranks: Any, world: int) -> None:
    assert ranks(world).run(goes_on) == [[(rank - hop) % world for hop in range(1, world + 1)] for rank in range(world)]


class Counting(OneRank):
    """Counts waits, of which one may fail."""

    def __init__(self, fails: int) -> None:
        self.starts, self.waits, self._fails = 0, list[int](), fails

    def start(self, exchange: Exchange) -> Callable[[], None]:
        number, self.starts = self.starts, self.starts + 1

        def wait() -> None:
            self.waits.append(number)
            if number == self._fails:
                raise RuntimeError("connection closed by peer")

        return wait


@pytest.mark.parametrize(("fails", "why", "waits"), [(-1, "no room", [0, 0, 1, 2]), (0, "closed by peer", [0])])
def test_nobody_is_waited_for_twice_who_has_gone(fails: int, why: str, waits: list[int]) -> None:
    """After an error in a walk the messages under way are waited for; not after one in a wait, which may have taken minutes."""

    def walk() -> Walk:
        first = yield Exchange([], [])
        yield Exchange([], [])
        yield Exchange([], [])
        first()
        raise MemoryError("no room")

    transport = Counting(fails)
    with pytest.raises((MemoryError, RuntimeError), match=why):
        transport.run([walk()])
    assert transport.waits == waits


def first_meeting(rank: int, world_size: int) -> list[list[int]]:
    """How many elements each all_reduce has that precedes messages on a device that is not the CPU."""
    device = torch.device("meta")
    transport = ProcessTransport(dist.group.WORLD)  # type: ignore[arg-type]
    seen = []
    with mock.patch.object(dist, "all_reduce", lambda x, group: seen.append([x.numel(), group.size()])):
        empty, full = Exchange([], [], device), Exchange([(1 - rank, torch.zeros(3, device=device))], [])
        for exchange in (full, full, empty) if rank else (empty, full, full):
            transport._meet(exchange)
        transport._meet(Exchange([(1 - rank, torch.zeros(3))], []))
    return seen


def test_a_collective_of_the_whole_group_precedes_the_first_message_off_the_cpu(ranks) -> None:
    """oneCCL and NCCL hang where the first messages of a group are of some ranks only."""
    assert ranks(2).run(first_meeting) == [[[1, 2]], [[1, 2]]]


class Devices(LocalTransport):
    """Remembers what exchanges say of their device."""

    def _deliver(self, exchanges: Sequence[Exchange]) -> None:
        seen.append({exchange.device for exchange in exchanges})
        super()._deliver(exchanges)


seen: list[set[torch.device | None]] = []


@pytest.mark.parametrize("way", ["ring", "grouped_ring", "halo", "all_gather", "all_to_all"])
def test_ranks_without_mail_say_where_the_others_is(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of these ranks have no row to send or receive; they take part in the first collective all the same."""
    monkeypatch.setattr("nnscaler_ring.core.passes.transport_of", lambda _: Devices(4))
    seen.clear()
    recipe = Recipe(group="local:4", transport=way, causal=True)
    cu = torch.tensor([0, 32, 48, 64], dtype=torch.int32)
    q, k, v, d_out = oracle.inputs(0, (1, 64, 64), (4, 4, 8, 8))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, *_ = engine.attention(*leaves, cu, cu, *[None] * 4, 64, 64, SCALE, 0, str(recipe))
    out.backward(d_out)
    assert len(seen) > 1 and all(devices == {torch.device("cpu")} for devices in seen)


def test_moving_rows_says_where() -> None:
    """Also where a rank has nothing to move."""
    source, target = build("contiguous", 8, 4), build("zigzag", 8, 4)
    for walk in (_relayout(source, target, 0, [torch.zeros(1, 2, 3)]), _gather(source, 1, 0, torch.zeros(1, 2, 3))):
        assert next(walk).device == torch.device("cpu")


def leaves_a_moment(rank: int, world_size: int) -> int:
    """How often something is registered for the end of the process."""
    _wait_at_exit.cache_clear()
    with mock.patch("atexit.register") as registered:
        for _ in range(3):
            ProcessTransport(dist.group.WORLD)  # type: ignore[arg-type]
        registered.assert_called_with(time.sleep, 0.2)
    return registered.call_count


def test_threads_of_gloo_have_a_moment_at_the_end(ranks) -> None:
    """What one of them drops last would abort the process while Python ends."""
    assert ranks(2).run(leaves_a_moment) == [1, 1]
