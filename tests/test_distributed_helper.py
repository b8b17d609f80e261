"""The helper that runs functions on real processes: `tests.distributed`."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, RankPool, missing_ranks, rank_device, run_ranks

Ranks = Callable[[int], RankPool]


def sum_of_ranks(rank: int, world_size: int, x: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    total = x.to(rank_device()) + rank
    dist.all_reduce(total)
    return rank, world_size, total.cpu()


def pid(rank: int, world_size: int) -> int:
    return os.getpid()


def num_threads(rank: int, world_size: int) -> int:
    return torch.get_num_threads()


def random_number(rank: int, world_size: int) -> float:
    return torch.rand(()).item()


def fail_on(rank: int, world_size: int, failing: int) -> None:
    if rank == failing:
        raise KeyError("what went wrong")
    wait_for_all(rank, world_size)


def exit_on(rank: int, world_size: int, failing: int) -> None:
    if rank == failing:
        os._exit(7)
    wait_for_all(rank, world_size)


def wait_for_all(rank: int, world_size: int) -> None:
    dist.all_reduce(torch.zeros(1, device=rank_device()))


def sleep_on(rank: int, world_size: int, sleeping: int) -> None:
    if rank == sleeping:
        time.sleep(600)


def return_a_lambda(rank: int, world_size: int) -> Callable[[], None]:
    return lambda: None


def warn(rank: int, world_size: int) -> int:
    warnings.warn("look out", UserWarning, stacklevel=1)
    return rank


@pytest.mark.parametrize("world_size", [2, 3])
def test_values_come_back_in_rank_order(ranks: Ranks, world_size: int) -> None:
    values = ranks(world_size).run(sum_of_ranks, torch.ones(2))
    total = torch.full((2,), world_size + world_size * (world_size - 1) / 2)
    assert [value[:2] for value in values] == [(rank, world_size) for rank in range(world_size)]
    for value in values:
        torch.testing.assert_close(value[2], total)


def test_run_ranks_starts_fresh_processes(ranks: Ranks) -> None:
    pids = run_ranks(pid, 2, device=ranks(2).device)
    assert len({*pids, *ranks(2).run(pid), os.getpid()}) == 5


def test_a_pool_keeps_its_processes(ranks: Ranks) -> None:
    assert ranks(2) is ranks(2)
    assert ranks(2).run(pid) == ranks(2).run(pid)


def test_runs_are_single_threaded_and_reproducible(ranks: Ranks) -> None:
    assert ranks(2).run(num_threads) == [1, 1]
    first = ranks(2).run(random_number)
    assert first[0] == first[1]
    assert ranks(2).run(random_number) == first


@pytest.mark.parametrize(
    ("fn", "says"),
    [(fail_on, r"(?s)Traceback.*in fail_on.*KeyError: 'what went wrong'"), (exit_on, "ended with exit code 7")],
)
def test_a_failure_surfaces_while_the_others_wait_for_that_rank(ranks: Ranks, fn: Callable, says: str) -> None:
    pool = ranks(3)
    before = pool.run(pid)
    start = time.monotonic()
    with pytest.raises(RankError, match=says) as caught:
        pool.run(fn, 1)
    assert time.monotonic() - start < 10
    assert "rank 1 of 3 failed" in str(caught.value)
    assert not set(before) & set(pool.run(pid)), "the pool starts new processes"


def test_first_failure_names_its_rank(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2).run(fail_on, 1)
    assert caught.value.rank == 1


def test_a_hang_ends_and_says_where(ranks: Ranks) -> None:
    pool = ranks(2)
    pool.run(pid)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)no answer in 1 s from rank 1 of 2\n.*in sleep_on"):
        pool.run(sleep_on, 1, timeout=1.0)
    assert time.monotonic() - start < 10


def test_what_cannot_be_pickled(ranks: Ranks) -> None:
    pool = ranks(2)
    before = pool.run(pid)
    with pytest.raises(Exception, match="pickle"):
        pool.run(lambda rank, world_size: None)
    assert pool.run(pid) == before, "the caller's error, found before any rank heard of it"
    with pytest.raises(RankError, match="pickle"):
        pool.run(return_a_lambda)


def test_warnings_are_errors_on_the_ranks_too(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="UserWarning: look out"):
        ranks(2).run(warn)


@pytest.mark.filterwarnings("ignore:look out:UserWarning")
def test_a_warning_that_the_test_ignores_is_ignored_on_the_ranks(ranks: Ranks) -> None:
    assert ranks(2).run(warn) == [0, 1]


def test_missing_devices_skip_by_name() -> None:
    if missing_ranks("cuda", 1000) is None:
        pytest.skip("needs fewer than 1000 GPUs")
    with pytest.raises(pytest.skip.Exception, match=r"nccl|1000 cuda device\(s\)"):
        run_ranks(pid, 1000, device="cuda")


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'tpu': one of cpu, cuda, xpu"):
        RankPool(2, "tpu")
