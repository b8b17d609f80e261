"""The benchmarks of whole schedules and of kernels, on a small world: what they count, that their answers are right, that they run,
and that what fails in them is told and costs nothing else. No times."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import weakref
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import __main__, kernels, options, schedule, trace
from benchmarks.clock import Times, timed
from benchmarks.problem import MASKS, SETUPS, TOLERANCE, Answer, Problem, check, clock_of, difference, noted, title
from benchmarks.schedule import WAYS, Ours, Schedule, Todays
from nnscaler_ring.core.kernels import KERNELS, choose
from nnscaler_ring.core.kernels.aten import AtenCpu
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.kernels.triton import Triton
from tests.interpreter import missing_interpreter, skip_without_triton

P = 4
SETUP = replace(SETUPS["quick"], ranks=P, tokens=32, window=20, product=16)
CASES = [pytest.param(name, way, id=f"{name}-{way.name}") for name, ways in WAYS.items() for way in ways]
KERNELS_OF_CASES = [
    # In Triton's interpreter a world takes seconds.
    pytest.param(*case.values, kernel, id=f"{case.id}-{kernel}", marks=[pytest.mark.slow] if slow else [])
    for case in CASES
    for kernel, slow in (("aten", False), ("triton", case.values[0] != "packed"))
]
TODAYS = [case for case in CASES if not case.values[1].ours]


def setup_for(kernel: str, **sizes: object) -> schedule.Setup:
    """A small setup; skips by the name of what the kernel lacks."""
    setup = replace(SETUP, kernel=kernel, **sizes)
    try:
        choose(kernel, setup.case)
    except NotImplementedError as why:
        pytest.skip(str(why))
    if kernel == "triton":
        skip_without_triton(setup.device)
    return setup


@lru_cache(maxsize=8)
def problem(name: str, kernel: str = "aten") -> tuple[Problem, Answer]:
    made = Problem(setup_for(kernel), name)
    dense = made.dense()
    return made, dense.backward(dense.forward())


def run(of: Schedule) -> list[Times]:
    found = []
    for rank in range(P):
        with of.alone(rank) as each:
            found.append(timed(each, of.problem.kernel, clock_of(SETUP)))
    return found


@pytest.mark.parametrize(("name", "way", "kernel"), KERNELS_OF_CASES)
def test_each_rank_alone_makes_the_calls_of_its_plan(name: str, way: schedule.Way, kernel: str) -> None:
    """And the ranks together give the dense answer."""
    given, want = problem(name, kernel)
    of = (Ours if way.ours else Todays)(given, way)
    assert difference(of.world(), want) < 1e-5
    times = run(of)
    assert [each.forward_calls for each in times] == [p.num_calls for p in of.plans]
    assert [each.both_calls - each.forward_calls for each in times] == [p.num_calls for p in of.back]
    assert all(0 < each.forward_kernels < each.forward < each.both and each.both_kernels < each.both for each in times)
    assert sum(p.pairs for p in of.plans) == sum(p.pairs for p in of.back) == given.one.pairs


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


def test_the_table_has_a_row_a_way_and_one_of_the_dense_call() -> None:
    *_, (text, failed) = schedule.tables(1, replace(SETUP, masks=("full",)))
    rows = cells(text, "full")
    assert [row[1].strip("*") for row in rows] == ["dense call", *(way.name for way in WAYS["full"])] and not failed
    assert all(len(row) == len(schedule.HEADER) for row in rows)
    assert all(float(row[-1]) >= 0 and row[4].endswith("%") for row in rows[1:])
    at = schedule.HEADER.index("rate")
    for row in rows[1:]:  # of one round
        assert row[at + 1] == f"{row[at]} .. {row[at]}", "the range is that of the rate, which it follows"


def cells(text: str, mask: str) -> list[list[str]]:
    """The rows of a mask."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {mask} ")]


def test_on_a_gpu_a_row_also_has_the_share_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = schedule.measure(replace(SETUP, masks=("full",)), "full", 1)
    found.problem.setup = replace(found.problem.setup, device="cuda")
    found.failed["ring, contiguous"] = "why"
    rows = list(schedule._rows(found, 1.0))
    assert {len(row) for row in rows} == {len(schedule._header(found.problem.setup))} == {len(schedule.HEADER) + 1}
    assert all(re.fullmatch(r"\d+%", str(row[-1])) for row in rows if "why" not in str(row[1]))


# -- what fails ------------------------------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, of: object, name: str, way: str, why: Exception) -> None:
    """A function of a schedule raises for a way."""
    function = getattr(of, name)

    def refusing(schedule: Schedule, *args: object) -> object:
        if schedule.way.name == way:
            raise why
        return function(schedule, *args)

    monkeypatch.setattr(of, name, refusing)


@pytest.mark.parametrize("when", ["world", "alone", "_round"])
def test_a_way_that_fails_is_a_row_and_the_others_are_measured(
    when: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Where it is checked and where it is timed; the command says so in the end."""
    emptied = list[int]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    of = schedule if when == "_round" else Todays
    refuse(monkeypatch, of, when, "ring, zigzag", torch.OutOfMemoryError("no room\nfor | this"))
    with pytest.raises(SystemExit, match="failed in part: schedule"):
        command(tmp_path / "new", "schedule", "--masks", "causal,window")
    text = (tmp_path / "new" / "schedule-cpu-quick-masks-causal_window.md").read_text()
    assert capsys.readouterr().out == f"{text}\n" and emptied
    for mask in ("causal", "window"):
        rows = {row[1].strip("*"): row for row in cells(text, mask)}
        (bad,) = [row for name, row in rows.items() if ":" in name]
        assert bad[1] == "ring, zigzag: OutOfMemoryError: no room for / this" and set(bad[2:]) == {"-"}
        assert set(rows) - {bad[1]} == {"dense call", *(way.name for way in WAYS[mask])} - {"ring, zigzag"}
        assert all(row[4].endswith("%") for name, row in rows.items() if name not in ("dense call", bad[1]))


def command(folder: Path, *words: str) -> None:
    __main__.main([*words, "--quick", "--repeats", "1", "--save", "--results", str(folder)])


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ours, "world", lambda of: Answer(*(torch.ones_like(x) for x in problem("full")[1])))
    *_, (text, failed) = schedule.tables(1, replace(SETUP, masks=("full",)))
    said = [row[1] for row in cells(text, "full") if row[4] == "-"][1:]
    assert failed and len(said) == sum(way.ours for way in WAYS["full"]) > 2
    assert all(re.fullmatch(r"\*\*contiguous, \w+\*\*: AssertionError: the result differs by \S+ from .*", each) for each in said)


def test_a_nan_is_a_difference_wherever_it_is() -> None:
    want = problem("full")[1]
    for part in Answer._fields:
        assert not difference(want._replace(**{part: getattr(want, part) * float("nan")}), want) <= 1
        with pytest.raises(AssertionError, match="differs by nan"):
            check(want._replace(**{part: getattr(want, part) * float("nan")}), want, "float32")


def test_a_mask_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AtenCpu, "forward", refusing_forward(AtenCpu.forward, window=20))
    *_, (text, failed) = schedule.tables(1, replace(SETUP, masks=("window", "full")))
    assert failed and [row[1] for row in cells(text, "window")] == ["dense call: RuntimeError: not this window"]
    assert len(cells(text, "full")) == 1 + len(WAYS["full"])


def test_a_device_that_is_lost_on_the_way_is_told_with_who_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access nothing runs any more, the dense call neither."""
    lost, mark = list[int](), schedule.Clock.mark

    def world(of: Schedule) -> Answer:
        lost.append(1)
        raise RuntimeError("illegal access")

    def marked(clock: schedule.Clock) -> object:
        if lost:
            raise RuntimeError("nothing runs")
        return mark(clock)

    monkeypatch.setattr(Todays, "world", world)
    monkeypatch.setattr(schedule.Clock, "mark", marked)
    *_, (text, failed) = schedule.tables(1, replace(SETUP, masks=("full",)))
    said = dict(row[1].strip("*").replace("**", "").split(": ", 1) for row in cells(text, "full"))
    assert failed and said.pop("dense call") == "RuntimeError: nothing runs"
    assert said == {way.name: "not timed" if way.ours else "RuntimeError: illegal access" for way in WAYS["full"]}


def refusing_forward(forward, window: int):
    def refusing(kernel, q, k, v, spans, its_window, scores):
        if its_window[0] == window:
            raise RuntimeError("not this window")
        return forward(kernel, q, k, v, spans, its_window, scores)

    return refusing


def test_what_fails_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the cache is emptied, also where a GPU refuses that."""
    held, at_the_time = list[weakref.ref](), list[object]()

    def empty_cache() -> None:
        at_the_time.extend(each() for each in held)
        raise RuntimeError("an illegal memory access was encountered")

    def fail() -> None:
        big = torch.ones(3)
        held.append(weakref.ref(big))
        raise RuntimeError(f"{big.sum()}")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    failed = dict[str, str]()
    with noted(failed, "one"):
        fail()
    assert failed == {"one": "RuntimeError: 3.0"} and at_the_time == [None]


def test_a_run_that_is_stopped_keeps_the_masks_that_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Full comes last."""
    measure, seen = schedule.measure, list[str]()

    def until_full(setup: schedule.Setup, name: str, repeats: int) -> schedule.Results:
        seen.append(name)
        if name == "full":
            raise KeyboardInterrupt
        return measure(setup, name, repeats)

    monkeypatch.setattr(schedule, "measure", until_full)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path, "schedule")
    assert seen == ["causal", "window", "packed", "full"]
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    assert "\nNot measured: full.\n" in text and "`python -m benchmarks schedule --repeats 1 --device cpu --quick`" in text
    assert [len(cells(text, mask)) for mask in MASKS] == [1 + len(WAYS[mask]) if mask != "full" else 0 for mask in MASKS]


# -- the command line ------------------------------------------------------------------------------------------------------------


def test_options() -> None:
    plain = given()
    assert options.setup_of(plain) == SETUPS["cpu"] and options.name_of("schedule", plain) == "schedule-cpu"
    words = "--device cuda --kernel triton --ranks 4 --heads 8,2,64 --dtype float16 --masks causal,packed"
    made = given(*words.split())
    asked = {"kernel": "triton", "ranks": 4, "heads": (8, 2, 64), "dtype": "float16", "masks": ("causal", "packed")}
    assert options.setup_of(made) == replace(SETUPS["cuda"], **asked) and options.words_of(made) == words
    assert options.setup_of(given("--quick")) == SETUPS["quick"]
    assert options.setup_of(given("--quick", "--device", "cuda")).dtype == "bfloat16", "which its kernels take"
    with pytest.raises(SystemExit):
        given("--masks", "casual")


def given(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    return parser.parse_args(words)


def test_no_two_setups_have_one_file() -> None:
    values = {"kernel": "aten", "ranks": "8", "tokens": "0", "heads": "2,1,64", "dtype": "float32", "window": "9", "threads": "2"}
    asked = [[], ["--quick"], ["--device", "cuda"], ["--masks", "full,window"]]
    asked += [[f"--{name}", value] for name, value in values.items()]
    names = [options.name_of("schedule", given(*words)) for words in asked]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names), names
    both = [["--tokens", "9", "--kernel", "triton", "--quick", "--dtype", "float16"], ["--quick"]]
    names = [options.name_of("schedule", given("--masks", "full,window", *words)) for words in both]
    assert names == ["schedule-cpu-quick-triton-tokens-9-float16-masks-full_window", "schedule-cpu-quick-masks-full_window"]
    assert options.name_of("schedule", given("--device", "cuda", "--kernel", "aten")) == "schedule-cuda-aten", "as gpu.sh says"


REFUSED = {
    "planning --trace x.svg": "planning takes no --trace: it is for schedule",
    "overlap --device cpu": "overlap takes no --device: it is for kernels, schedule",
    "schedule scaling --quick": "scaling takes no --quick: it is for kernels, schedule",
    "kernels --kernel aten": "kernels takes no --kernel: it is for schedule",
    "kernels --ranks 4": "kernels takes no --ranks: it is for schedule",
    "piecewise --tokens 0": "piecewise takes no --tokens: it is for kernels, schedule",
    "--device cpu": "cpu_cost takes no --device: it is for kernels, schedule",
    "schedule --trace x.svg --save": "--trace draws one mask and measures nothing",
    "schedule --trace x.svg --repeats 3": "--trace draws one mask and measures nothing",
    "schedule --trace x.svg --masks full,causal": "--trace draws one mask and measures nothing",
    "schedule --repeats 0": "--repeats is 1 or more, not 0",
    "schedule --results out": "--results is where --save writes: give both",
    "casual": "unknown benchmark casual: choose from cpu_cost, glue, kernels, overlap, ",
}


@pytest.mark.parametrize("words", REFUSED)
def test_an_option_that_nothing_looks_at_is_refused(words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        __main__.main(words.split())
    assert end.value.code == 2 and REFUSED[words] in capsys.readouterr().err


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("there", [True, False], ids=["xdist", "no xdist"])
def test_the_run_on_a_gpu_ends_in_ten_minutes(there: bool, tmp_path: Path) -> None:
    """Each step is interrupted, so that it tells what it has, and killed where it does not listen; a failure is not the end."""
    for name, text in {"timeout": 'echo "$*" >> "$OUT/calls"; false', "python": "true" if there else "false"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "PYTHON": str(tmp_path / "python")}
    done = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh")], env={**os.environ, **given}, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    limits = [re.match(r"--foreground -s INT -k (\d+) (\d+) ", call) for call in calls]
    assert done.returncode == 1 and len(calls) == 6 and all(limits), done.stderr
    assert sum(int(seconds) for limit in limits if limit for seconds in limit.groups()) <= 585
    assert " --tb=short " in calls[0] and ("-m  -p xdist -n 8" in calls[0]) == there == ("-m not slow" not in calls[0])
    for call in calls[1:]:
        words = call.partition("-m benchmarks ")[2].split()
        assert __main__.parsed(words).device == "cuda" and words[0] in __main__.WITH_SETUP


def test_a_picture_of_a_schedule(tmp_path) -> None:
    schedule.draw(replace(SETUP, masks=("causal",)), str(tmp_path / "trace.svg"))
    text = (tmp_path / "trace.svg").read_text()
    assert text.startswith("<svg") and text.endswith("</svg>\n")
    assert "rank 2 of 4" in text and ">cpu</text>" in text and "flash_attention" in text
    bar = trace.Bar("stream 7", "void flash_fwd_kernel<...>", 0.0, 5.0)
    assert (bar.kind, bar._replace(name="Memcpy DtoD").kind, bar._replace(name="_merge").kind) == ("attention", "copy", "merge")


# -- kernels ---------------------------------------------------------------------------------------------------------------------


def test_the_kernels_that_can_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are usable, by mask, with that of `auto` marked; of the others it is said why not."""
    if missing := missing_interpreter():
        monkeypatch.setattr(Triton, "check_sizes", Mock(side_effect=NotImplementedError(f"it needs {missing}")))
    command(tmp_path, "kernels", "--tokens", "64")
    text = (tmp_path / "kernels-cpu-quick-tokens-64.md").read_text()
    assert capsys.readouterr().out == f"{text}\n"
    able, refused = kernels.usable(replace(SETUPS["quick"], tokens=64).case)
    assert {"`aten`", "`reference`"} <= set(able) and len(able) + len(refused) == sum(map(len, KERNELS.values()))
    for mask in MASKS:
        rows = cells(text, mask)
        assert [row[1].strip("*") for row in rows] == list(able)
        assert [row[1] for row in rows if "**" in row[1]] == ["**`aten`**"], "the default on a CPU"
        assert all(len(row) == len(kernels.HEADER) and float(row[3]) > 0 and float(row[5]) > 0 for row in rows)
        assert all(float(row[-1]) <= TOLERANCE["float32"] for row in rows)
    assert "\n`auto` takes `aten`: " in text and all(f"\n- {each}\n" in text for each in refused)


def test_a_kernel_that_fails_is_a_row_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wrong ones too."""
    monkeypatch.setattr(AtenCpu, "forward", refusing_forward(AtenCpu.forward, window=64))
    with pytest.raises(SystemExit, match="failed in part: kernels"):
        command(tmp_path, "kernels", "--masks", "window,full")
    text = (tmp_path / "kernels-cpu-quick-masks-window_full.md").read_text()
    assert "**`aten`**: RuntimeError: not this window" in [row[1] for row in cells(text, "window")]
    assert all(float(row[3]) > 0 for mask in ("window", "full") for row in cells(text, mask) if ":" not in row[1])
    assert "; it failed for window." in text or ": it failed for window." in text
    monkeypatch.setattr(AtenCpu, "backward", lambda *args: None)
    *_, (text, failed) = kernels.tables(1, replace(SETUPS["quick"], masks=("full",)))
    assert failed and re.search(r"\| \*\*`aten`\*\*: AssertionError: the result differs by", text)
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "timed", lambda run, kernel, clock: timed(run, kernel, clock) if kernel.name != "aten" else 1 / 0)
    *_, (text, failed) = kernels.tables(1, replace(SETUPS["quick"], masks=("full",)))
    assert failed and "| **`aten`**: ZeroDivisionError: division by zero |" in text and "it failed for full" in text


def test_a_comparison_that_is_stopped_keeps_the_masks_that_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = kernels.measure

    def until_full(setup: kernels.Setup, mask: str, *rest) -> kernels.Results:
        if mask == "full":
            raise KeyboardInterrupt
        return measure(setup, mask, *rest)

    monkeypatch.setattr(kernels, "measure", until_full)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path, "kernels")
    text = (tmp_path / "kernels-cpu-quick.md").read_text()
    assert "\nNot measured: full, window, packed.\n" in text and cells(text, "causal") and not cells(text, "full")


def test_the_verdict() -> None:
    ratios = {"causal": {"a": 1.0, "b": 1.2}, "full": {"a": 1.0, "b": 0.5, "c": 0.9}, "window": {"a": 1.0}, "packed": {}}
    said = "`auto` takes a: the fastest for causal, window; for full b takes 0.50 of its time; it failed for packed."
    assert kernels.verdict("a", ratios) == said
    assert kernels.verdict("a", {}) == "`auto` takes a: nothing was measured."


def test_kernels_are_told_apart() -> None:
    assert title(KERNELS["flash_attn"][0]) == "`flash_attn` (flash-attn 4)" and title(AtenCpu()) == "`aten`"


# -- the host --------------------------------------------------------------------------------------------------------------------


class NothingFromTheHost(TorchDispatchMode):
    """Raises where an op takes numbers from the host to the device, which here is `meta`: on a GPU it would wait for that."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read, made = ([x for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in ((args, kwargs), result))
        if any(x.device.type == "cpu" for x in read) and any(x.is_meta for x in made):
            raise AssertionError(f"{func} waits for the host")
        return result


@pytest.mark.parametrize(("name", "way"), TODAYS)
def test_no_rank_of_today_takes_anything_from_the_host(name: str, way: schedule.Way) -> None:
    given = Problem(SETUP, name)
    given.q, given.k, given.v, given.d_out = (x.to("meta") for x in (given.q, given.k, given.v, given.d_out))
    given.kernel = Reference()
    of = Todays(given, way)
    of.world()
    for rank in range(P):
        with of.alone(rank) as each, NothingFromTheHost():
            each.backward(each.forward())


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", ["aten", "triton"])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_no_rank_waits_for_the_device(name: str, way: schedule.Way, kernel: str) -> None:
    """Torch raises where the host would wait; tables of documents are on the host."""
    given = Problem(setup_for(kernel, device="cuda", tokens=1024, heads=(4, 2, 64), dtype="bfloat16"), name)
    of = (Ours if way.ours else Todays)(given, way)
    dense = given.dense()
    check(of.world(), dense.backward(dense.forward()), "bfloat16")
    for rank in range(P):
        with of.alone(rank) as each:
            each.backward(each.forward())  # plans, and tables that are pinned once
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                each.backward(each.forward())
            finally:
                torch.cuda.set_sync_debug_mode("default")
