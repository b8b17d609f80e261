"""The benchmark of whole schedules, on a small world: what it counts, that its answers are right, that it runs. No times."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from benchmarks import schedule, trace
from benchmarks.clock import Times, timed
from benchmarks.schedule import SETUPS, WAYS, Ours, Problem, Schedule, Todays, clock_of, difference

P = 4
SETUP = replace(SETUPS["quick"], ranks=P, tokens=96, window=40, product=16)
CASES = [pytest.param(name, way, id=f"{name}-{way.name}") for name, ways in WAYS.items() for way in ways]


@lru_cache(maxsize=4)
def problem(name: str) -> tuple[Problem, schedule.Answer]:
    made = Problem(SETUP, name)
    dense = made.dense()
    return made, dense.backward(dense.forward())


def run(of: Schedule) -> list[Times]:
    found = []
    for rank in range(P):
        with of.alone(rank) as each:
            found.append(timed(each, of.problem.kernel, clock_of(SETUP)))
    return found


@pytest.mark.parametrize(("name", "way"), CASES)
def test_each_rank_alone_makes_the_calls_of_its_plan(name: str, way: schedule.Way) -> None:
    """And the ranks together give the dense answer."""
    given, want = problem(name)
    of = (Ours if way.ours else Todays)(given, way)
    assert difference(of.world(), want) < 1e-5
    times = run(of)
    assert [each.forward_calls for each in times] == [p.num_calls for p in of.plans]
    assert [each.both_calls for each in times] == [2 * p.num_calls for p in of.plans]
    assert all(0 < each.forward_kernels < each.forward < each.both and each.both_kernels < each.both for each in times)
    assert sum(p.pairs for p in of.plans) == given.one.pairs


@pytest.mark.parametrize("way", [WAYS["causal"][0], WAYS["causal"][4], WAYS["causal"][6]], ids=lambda way: way.name)
def test_a_rank_alone_gives_what_it_gives_among_the_others(way: schedule.Way) -> None:
    """The mail is replayed in order: its results are its rows of the world's, to the bit."""
    given, _ = problem("causal")
    of = (Ours if way.ours else Todays)(given, way)
    world = of.world()
    for rank in range(P):
        at = torch.from_numpy(of.layout.positions(rank))
        with of.alone(rank) as each:
            for _ in range(2):
                state = each.forward()
                grads = each.backward(state)
                out = state if way.ours else state[0]
                assert torch.equal(out, world.out[:, at])
                assert all(torch.equal(g, w[:, at]) for g, w in zip(grads, world[2:], strict=True))


def test_the_algorithms_of_today_merge_step_by_step() -> None:
    given, _ = problem("causal")
    merges = {way.name: {p.num_merges for p in Todays(given, way).plans} for way in WAYS["causal"] if not way.ours}
    assert merges == {
        "ring, contiguous": {0, 1, 2, 3},
        "ring, zigzag": {P - 1},
        "ring, stripe": {P - 1},
        "all-gather, zigzag": {0},
    }


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ours, "world", lambda of: schedule.Answer(*(torch.ones_like(x) for x in problem("causal")[1])))
    with pytest.raises(AssertionError, match="causal, zigzag, auto: the result differs by"):
        schedule.measure(SETUP, "causal", 1)


def test_the_table_has_a_row_a_way_and_one_of_the_dense_call() -> None:
    lines = schedule.table(1, replace(SETUP, masks=("full",))).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| full ")]
    assert [row[1].strip("*") for row in rows] == ["dense call", *(way.name for way in WAYS["full"])]
    assert all(len(row) == len(schedule.HEADER) for row in rows)
    assert all(float(row[-1]) >= 0 and row[4].endswith("%") for row in rows[1:])


def test_options() -> None:
    parser = argparse.ArgumentParser()
    schedule.add_options(parser)
    plain = parser.parse_args([])
    assert schedule.setup_of(plain) == SETUPS["cpu"] and schedule.name_of(plain) == "schedule-cpu"
    words = "--device cuda --kernel triton --ranks 4 --heads 8,2,64 --dtype float16 --masks causal,packed"
    given = parser.parse_args(words.split())
    asked = {"kernel": "triton", "ranks": 4, "heads": (8, 2, 64), "dtype": "float16", "masks": ("causal", "packed")}
    assert schedule.setup_of(given) == replace(SETUPS["cuda"], **asked)
    assert schedule.words_of(given) == words and schedule.name_of(given) == "schedule-cuda-triton-float16"
    assert schedule.setup_of(parser.parse_args(["--quick"])) == SETUPS["quick"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--masks", "casual"])


def test_a_picture_of_a_schedule(tmp_path) -> None:
    schedule.draw(replace(SETUP, masks=("causal",)), str(tmp_path / "trace.svg"))
    text = (tmp_path / "trace.svg").read_text()
    assert text.startswith("<svg") and text.endswith("</svg>\n")
    assert "rank 2 of 4" in text and ">cpu</text>" in text and "flash_attention" in text
    bar = trace.Bar("stream 7", "void flash_fwd_kernel<...>", 0.0, 5.0)
    assert (bar.kind, bar._replace(name="Memcpy DtoD").kind, bar._replace(name="_merge").kind) == ("attention", "copy", "merge")


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "way"), [case for case in CASES if case.values[1].ours])
def test_no_rank_waits_for_the_device(name: str, way: schedule.Way) -> None:
    """Torch raises where the host would wait; tables of documents are on the host."""
    setup = replace(SETUP, device="cuda", tokens=1024, heads=(4, 2, 64), dtype="bfloat16", kernel="aten")
    given = Problem(setup, name)
    of = Ours(given, way)
    dense = given.dense()
    assert difference(of.world(), dense.backward(dense.forward())) < schedule.TOLERANCE["bfloat16"]
    for rank in range(P):
        with of.alone(rank) as each:
            each.backward(each.forward())  # plans, and tables that are pinned once
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                each.backward(each.forward())
            finally:
                torch.cuda.set_sync_debug_mode("default")
