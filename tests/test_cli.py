"""The command line says what `core.scaling` says, and says in one line what is wrong with what it was given."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import packings
from nnscaler_ring import __version__, cli, pictures
from nnscaler_ring.cli import EXAMPLES, main
from nnscaler_ring.core import layouts, mask, scaling
from nnscaler_ring.core.cost import tiles
from nnscaler_ring.core.kernels import KERNELS
from nnscaler_ring.core.plan import ALL_TO_ALL, TRANSPORTS, plan, plans
from nnscaler_ring.core.scaling import NETWORKS, SPEEDS, Shape
from nnscaler_ring.core.teams import teams
from nnscaler_ring.rows import size

ROOT = pathlib.Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture
def run(capsys):
    """``run("plan ...")``: what it prints; JSON is parsed."""

    def run(words: str, *more: str):
        assert main([*shlex.split(words), *more]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out) if "--json" in words else out

    return run


@pytest.fixture
def fails(capsys):
    """``fails("plan ...")``: the one line on stderr of a wrong command line."""

    def fails(words: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main(shlex.split(words))
        out, err = capsys.readouterr()
        assert (exit.value.code, out, err.count("\n")) == (2, "", 1)
        return err.rstrip()

    return fails


def modelled(of, layout="zigzag", transport="ring", world=8, *, cu=None, shape=None, speed="fa2-h100", network="400g", inner=1):
    """The report of a configuration, asked for directly."""
    held = layouts.build(layout, of.q_len, world, cu)
    return asdict(scaling.report(of, held, transport, shape or Shape(), SPEEDS[speed], NETWORKS[network], inner=inner))


CU = np.array([0, 1000, 1200, 4096])
CAUSAL = mask.build(4096, causal=True)
CASES = {
    "--seq-len 4k": modelled(CAUSAL),
    "--seq-len 4096 --mask full --layout contiguous": modelled(mask.build(4096), "contiguous"),
    "--seq-len 4k --window 300 --layout contiguous": modelled(mask.build(4096, causal=True, window=(300, 0)), "contiguous"),
    "--seq-len 4k --mask full --window 300 20": modelled(mask.build(4096, window=(300, 20))),
    "--seq-len 4k --mask full --window -1 20": modelled(mask.build(4096, window=(-1, 20))),
    "--seq-len 4k --window 300 --sinks 4": modelled(mask.build(4096, causal=True, window=(300, 0), sinks=4)),
    "--seq-len 4k --prefix 500": modelled(mask.build(4096, causal=True, prefix=500)),
    "--docs 1000,200,2896": modelled(mask.build(4096, causal=True, cu_seqlens_q=CU), "balanced", cu=CU),
    "--docs 1000,200,2896 --seq-len 4k --layout zigzag-per-document": modelled(
        mask.build(4096, causal=True, cu_seqlens_q=CU), "zigzag-per-document", cu=CU
    ),
    "--seq-per-rank 512 --world-size 8": modelled(CAUSAL),
    "--seq-len 4k --world-size 64": modelled(CAUSAL, world=64),
    "--seq-len 4k --layout stripe": modelled(CAUSAL, "stripe"),
    "--seq-len 4k --world-size 8 --heads-per-team 4": modelled(CAUSAL, inner=4),
    "--seq-len 4k --inner 2 --transport auto": modelled(CAUSAL, transport="auto", inner=2),
    "--seq-len 4k --speed cpu-core": modelled(CAUSAL, speed="cpu-core"),
    "--seq-len 4k --heads 12 --heads-k 4 --head-dim 192 --head-dim-v 128 --batch 3 --dtype-bytes 1 --gradient-bytes 2": modelled(
        CAUSAL, shape=Shape(heads=12, heads_k=4, dim=192, dim_v=128, batch=3, element=1, gradient=2)
    ),
    **{f"--seq-len 4k --transport {name}": modelled(CAUSAL, transport=name) for name in (*TRANSPORTS, ALL_TO_ALL)},
    **{f"--seq-len 4k --network {name}": modelled(CAUSAL, network=name) for name in NETWORKS},
}


@pytest.mark.parametrize("words", CASES)
def test_json_is_the_report(run, words):
    unsaid = [f"{flag} {value}" for flag, value in (("--transport", "ring"), ("--network", "400g")) if flag not in words]
    (row,) = run(f"plan --json {words} {' '.join(unsaid)}")["rows"]
    if "--transport all_to_all" in words:
        assert row["transport"] == "all_to_all" and row["needed"] is None
        row["transport"] = CASES[words]["transport"]
    assert {name: row[name] for name in CASES[words]} == CASES[words]
    assert row["sent_per_rank"] == row["sent"] / row["world_size"]
    assert row["sent_backward_per_rank"] == row["sent_backward"] / row["world_size"]
    assert row["sent_over_needed"] == (row["sent"] / row["needed"] if row["needed"] else None)


def test_table_has_a_row_for_each_combination(run):
    said = run("plan --seq-len 4k --world-size 4,8 2 --layout zigzag,stripe --transport ring halo --network 400g nvlink --tiles")
    lines = said.splitlines()
    assert len(lines) == 4 + 3 * 2 * 2 * 2
    first = modelled(CAUSAL, world=4)
    cells = re.split(r"  +", lines[4].strip())
    assert cells[:5] == ["4", "zigzag", "ring", "1.000", "1.000"]
    assert cells[5:8] == [size(first["sent"]), size(first["sent"] / 4), "1.00"]
    assert cells[8:12] == [
        size(first["sent_backward"]),
        size(first["sent_backward"] / 4),
        str(first["calls"]),
        str(first["merges"]),
    ]
    assert cells[12:] == ["400g", f"{first['forward'] * 1e3:.2f}", f"{first['backward'] * 1e3:.2f}", f"{first['efficiency']:.1%}"]
    assert lines[5].split()[0] == "nvlink"  # the rest is as above


def test_defaults(run):
    rows = run("plan --seq-len 4k --json")["rows"]
    assert [row["network"] for row in rows] == ["nvlink", "400g", "100g"]
    assert {(row["layout"], row["world_size"], row["auto"], row["speed"]) for row in rows} == {("zigzag", 8, True, "fa2-h100")}
    (row,) = run("plan --docs 3k,1k --network 400g --json")["rows"]
    assert row["layout"] == "balanced"


def test_auto_is_what_context_parallel_takes(run):
    window = mask.build(1 << 16, causal=True, window=(1024, 0))
    for words, of in (("", mask.build(1 << 16, causal=True)), ("--window 1024", window)):
        for row in run(f"plan --seq-len 64k {words} --heads 28 --heads-k 4 --json")["rows"]:
            machine = SPEEDS["fa2-h100"], NETWORKS[row["network"]]
            held = layouts.build("zigzag", 1 << 16, 8)
            shape = Shape(heads=28, heads_k=4)
            passes = [scaling.row_transport(of, (held, held), shape, machine, backward) for backward in (False, True)]
            if scaling.best_transport(of, held, shape, *machine) == ALL_TO_ALL:
                assert row["transport"] == ALL_TO_ALL
            else:
                assert [row["transport"], row["transport_backward"]] == passes
    assert run("plan --seq-len 64k --world-size 1 --json")["rows"][0]["sent"] == 0


def test_auto_of_two_passes(run):
    """On a fast network the forward pass of a short ring is grouped; the pass of each is what is modelled and shown."""
    words = "plan --seq-len 16k --network nvlink --speed fa4-h200 --heads 28 --heads-k 4"
    (row,) = run(f"{words} --json")["rows"]
    assert (row["transport"], row["transport_backward"]) == ("grouped_ring", "ring")
    assert "auto: grouped_ring / ring" in run(words)
    parts = {name: run(f"{words} --transport {name} --json")["rows"][0] for name in ("grouped_ring", "ring")}
    assert (row["forward"], row["backward"]) == (parts["grouped_ring"]["forward"], parts["ring"]["backward"])
    run(f"{words} --inner 2 --rank 3 --tiles")


def test_all(run):
    rows = run("plan --docs 3k,1k --layout all --transport all --network 400g --json")["rows"]
    pairs = [(row["layout"], row["transport"]) for row in rows]
    assert pairs == [(layout, transport) for layout in layouts.LAYOUTS for transport in (*TRANSPORTS, ALL_TO_ALL)]
    rows = run("plan --seq-len 4k --layout all --network 400g --json")["rows"]
    assert {row["layout"] for row in rows} == {"contiguous", "zigzag", "stripe", "balanced"}
    rows = run("plan --seq-len 4k --inner 2 4 --transport ring all_to_all --network 400g --json")["rows"]
    assert [(row["inner"], row["transport"]) for row in rows] == [(2, "ring"), (8, "all_to_all"), (4, "ring")]


def test_rank(run):
    held = layouts.build("zigzag", 64, 4)
    whole = plan(mask.build(64, causal=True), held, held, "ring", 1)
    words = "plan --seq-len 64 --world-size 4 --transport ring --network 400g --rank 1"
    assert run(words).endswith(f"\nzigzag, ring, 4 ranks\n{whole}\n")
    walk = run(f"{words} --json")["rows"][0]["plan"]
    assert (walk["rank"], walk["num_calls"], walk["pairs"]) == (1, whole.num_calls, whole.pairs)
    assert [step["rows"] for step in walk["steps"]] == [step.size for step in whole.steps]
    assert walk["steps"][1]["receive"] == [{"peer": m.peer, "rows": m.rows.tolist()} for m in whole.steps[1].receive]
    gathers = words.replace("ring", "all_gather")
    (step,) = run(f"{gathers} --json")["rows"][0]["plan"]["steps"][1:]
    assert step["own"] == [[0, 8, 8, 16], [8, 16, 48, 56]] and {m["peer"] for m in step["receive"]} == {0, 2, 3}
    assert "step 1: 16 own rows, 8 rows from rank 0" in run(gathers) and "from rank 1" not in run(gathers)
    grid = run(f"{words.replace('--rank 1', '--rank 3')} --inner 2")
    assert "rank 3 of 4" in grid and "from rank 1" in grid and "zigzag, ring, 4 ranks in teams of 2" in grid


def test_tiles(run):
    held = layouts.build("contiguous", 4096, 4)
    each = [tiles(walk) for walk in plans(CAUSAL, held, held, "ring")]
    words = "plan --seq-len 4k --world-size 4 --layout contiguous --network 400g --transport ring"
    (row,) = run(f"{words} --json")["rows"]
    assert row["tile_balance"] == pytest.approx(max(each) / np.mean(each))
    (row,) = run(f"{words} --inner 2 --json")["rows"]
    outer = teams(held, 2)
    each = [tiles(walk) for walk in plans(CAUSAL, outer, outer, "ring")]
    assert row["tile_balance"] == pytest.approx(max(each) / np.mean(each))  # each rank has half of the heads
    plain, shown = (run(f"{words} {more}").splitlines()[3:] for more in ("", "--tiles"))
    assert "tiles" not in plain[0] and shown[0].split().index("tiles") == 4
    assert f"  {row['tile_balance']:.3f}  " in run(f"{words} --inner 2 --tiles").splitlines()[-1]


def test_documents_of_files(run, tmp_path, monkeypatch):
    (tmp_path / "lengths.json").write_text("[1000, 200, 2896]")
    (tmp_path / "cu.txt").write_text("0 1000\n1200, 4096\n")
    words = "plan --network 400g --json --transport ring --layout balanced"
    wanted = run(f"{words} --docs 1000,200,2896")
    assert wanted["documents"] == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("1000 200 2896"))
    for option in (f"--lengths {tmp_path / 'lengths.json'}", f"--cu-seqlens {tmp_path / 'cu.txt'}", "--lengths -"):
        assert run(f"{words} {option}") == wanted


@pytest.mark.parametrize(
    "words, said",
    [
        ("plot", "invalid choice: 'plot'"),
        ("plan", "give --seq-len, --seq-per-rank, or documents"),
        ("plan --seq-len 4k --seq-per-rank 4", "not allowed with argument --seq-len"),
        ("plan --seq-len lots", "'lots' is not a number: write it as 65536, 64k or 1m"),
        ("plan --seq-len 0", "at least 1"),
        ("plan --seq-le 64", "unrecognized arguments"),
        ("plan --seq-len -5", "argument --seq-len: -5 is too few: give at least 1"),
        ("plan --seq-len 64 --sinks -1 --window 8", "argument --sinks: -1 is too few: give at least 0"),
        ("plan --seq-len 64 --window -2", "argument --window: -2 is too few: give tokens, 0 or more, or -1 for no limit"),
        ("plan --seq-len 1025m", "1,074,790,400 tokens in all are too many: at most 1,073,741,824 (1,024m)"),
        ("plan --seq-per-rank 512m --world-size 2,4", "2,147,483,648 tokens in all are too many"),
        ("plan --docs 1024m,1", "1,073,741,825 tokens in all are too many"),
        ("plan --seq-len 1048577m", "1048577m is too large: at most 1,099,511,627,776"),
        ("plan --seq-len 64 --world-size 0", "argument --world-size: 0 is too few"),
        ("plan --seq-len 64 --world-size ,", "says nothing"),
        ("plan --seq-len 64 --layout zigzg", "unknown layout 'zigzg': choose one of contiguous, zigzag, stripe"),
        ("plan --seq-len 64 --transport carrier", "unknown transport 'carrier': choose one of auto, ring"),
        ("plan --seq-len 64 --network lan", "unknown network 'lan': choose one of nvlink, 400g, 100g, gloo"),
        ("plan --seq-len 64 --speed warp", "unknown speed 'warp': choose one of fa2-h100"),
        ("plan --seq-len 64 --panels sky", "unknown panel 'sky': choose one of mask, work, timeline"),
        ("plan --docs 10,20 --seq-len 64", "the documents have 30 tokens together, --seq-len says 64"),
        ("plan --docs 10,20 --seq-per-rank 64", "--seq-per-rank says 512"),
        ("plan --docs 10,x", "'x' is not a number"),
        ("plan --docs 0", "no tokens"),
        ("plan --lengths nowhere.json", "No such file"),
        ("plan --seq-len 1m --world-size 8193", "8193 ranks are too many: at most 8,192"),
        ("plan --lengths setup.cfg", "not a list of whole numbers"),
        ("plan --cu-seqlens docs/pictures/packed-64k-0.json", "it must start at 0"),
        ("plan --seq-len 64 --layout zigzag-per-document", "'zigzag-per-document' cuts each document: give --docs"),
        ("plan --seq-len 64 --window 1 2 3", "--window takes LEFT and RIGHT, got 3"),
        ("plan --seq-len 64 --window 8 8", "a causal mask has no RIGHT"),
        ("plan --seq-len 64 --sinks 4", "give --window LEFT"),
        ("plan --seq-len 64 --mask full --prefix 4", "--prefix is of a causal mask"),
        ("plan --seq-len 64 --prefix 65", "--prefix 65: the sequence has 64 tokens"),
        ("plan --docs 20,44 --prefix 45", "--prefix 45: the longest document has 44 tokens"),
        ("plan --seq-len 64 --heads 12", "--heads 12 is no multiple of --heads-k 8"),
        ("plan --seq-len 64 --inner 3", "--heads-per-team 3 does not divide --world-size 8"),
        ("plan --seq-len 64 --inner 2 --transport all_to_all", "leave out --heads-per-team"),
        ("plan --seq-len 64 --rank 8", "ranks of --world-size 8 are 0 to 7"),
        ("plan --seq-len 4k --tiles --world-size 8,128", "at most 64, not 128"),
        ("plan --seq-len 64 --panels mask", "give --plot FILE"),
        ("plan --seq-len 64 --plot mask.jpg", "end the name with .png, .svg, .pdf"),
        ("plan --seq-len 64 --plot nowhere/mask.png", "there is no folder nowhere"),
        ("plan --seq-len 64 --world-size 1,2,3,4,5 --plot mask.png", "up to 4 configurations, not 5"),
        ("kernels --device tpu", "unknown device 'tpu': choose one of cpu, cuda, xpu"),
        ("kernels --heads 3", "--heads 3 is no multiple of --heads-k 8"),
    ],
)
def test_errors(fails, monkeypatch, words, said):
    monkeypatch.chdir(ROOT)
    line = fails(words)
    assert re.match(r"nnscaler-ring( plan| kernels)?: error: ", line) and said in line


def test_nothing_asked_for(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: nnscaler-ring") and EXAMPLES in err


def test_longest_row(run):
    """All counts are right up to the longest row that is taken, whatever the mask."""
    length = cli.LONGEST
    for words, pairs in (("--mask full", length**2), ("", length * (length + 1) // 2), (f"--prefix {length}", length**2)):
        (row,) = run(f"plan --seq-len {length} {words} --transport ring --layout contiguous --network 400g --json")["rows"]
        assert row["pairs"] == pairs and row["efficiency"] == pytest.approx(1 if pairs == length**2 else 8 / 15, rel=1e-3)


def test_files_of_too_many_tokens(fails, tmp_path):
    (tmp_path / "many.txt").write_text(f"{cli.LONGEST + 1}")
    assert "a number above 1,073,741,824" in fails(f"plan --lengths {tmp_path / 'many.txt'}")
    (tmp_path / "many.txt").write_text(f"{cli.LONGEST} 1")
    assert "tokens in all are too many" in fails(f"plan --lengths {tmp_path / 'many.txt'}")


@pytest.mark.parametrize("content", [b"\x89PNG\xff", b"[" * 100_000], ids=["picture", "brackets"])
def test_files_that_are_no_lists(content, fails, tmp_path):
    (tmp_path / "odd").write_bytes(content)
    assert f"{tmp_path / 'odd'}: not a list of whole numbers" in fails(f"plan --lengths {tmp_path / 'odd'}")


def test_a_file_with_a_byte_order_mark(run, tmp_path):
    (tmp_path / "lengths.json").write_text("\ufeff[3, 5]", encoding="utf-8")
    assert run(f"plan --lengths {tmp_path / 'lengths.json'} --network 400g --json")["rows"][0]["seq_len"] == 8


def test_bytes_beyond_64_bits(run):
    words = "plan --seq-len 1024m --batch 1m --transport all_to_all ring --network 400g --layout contiguous --json"
    heads, ring = run(words)["rows"]
    tokens = 1 << 50
    around = 2 * 128 * (32 + 32 + 8 + 8) + 4 * 32  # q, out, k and v of a token in bf16, and its log-sum-exp
    assert heads["sent"] == tokens * around * 7 // 8 > 1 << 63 and ring["sent"] == 7 << 61


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nnscaler_ring", "kernels"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_negative_length(fails, tmp_path):
    (tmp_path / "lengths.json").write_text("[8, -2]")
    assert "a document of -2 tokens" in fails(f"plan --lengths {tmp_path / 'lengths.json'}")


def test_thousands_of_ranks(run):
    start = time.monotonic()
    (row,) = run("plan --seq-len 1m --world-size 4096 --layout contiguous --transport ring --network 400g --json")["rows"]
    assert time.monotonic() - start < 30
    assert (row["world_size"], row["calls"]) == (4096, 4096)


def test_progress(run, monkeypatch):
    bars = []

    class Bar(SimpleNamespace):
        done = 0

        def __enter__(self):
            bars.append(self)
            return self

        def __exit__(self, *why):
            pass

        def update(self):
            self.done += 1

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    words = "plan --seq-len 64 --world-size 2,4 --transport ring halo --json"
    with_bar = run(words)
    (bar,) = bars
    assert (bar.done, bar.total, bar.file, bar.disable) == (12, 12, sys.stderr, None)  # None: only on a terminal
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(words) == with_bar


# -- kernels -----------------------------------------------------------------------------------------------------------------------


def test_kernels(run):
    made = run("kernels --json")["kernels"]
    assert [(x["device"], x["dtype"], x["kernel"]) for x in made] == [
        (device, dtype, name)
        for device in ("cpu", "cuda", "xpu")
        for dtype in ("float32", "bfloat16", "float16", "float64")
        for name in KERNELS
    ]
    assert all(x["usable"] == (x["why_not"] is None) for x in made)
    assert all(x["usable"] for x in made if x["device"] == "cpu" and x["kernel"] in ("aten", "reference"))
    if not torch.cuda.is_available():
        assert all("cuda" in x["why_not"] for x in made if x["device"] == "cuda")


def test_kernels_say_what_they_lack(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    made = run("kernels --device cuda --dtype bfloat16,float32 --head-dim 320 --head-dim-v 64 --json")["kernels"]
    why = {x["dtype"]: x["why_not"] for x in made if x["kernel"] == "aten"}
    assert "up to 256, not 320 and 64" in why["bfloat16"] and "bfloat16 and float16" in why["float32"]
    said = run("kernels --device cuda --dtype bfloat16 --head-dim 320 --heads 4 --heads-k 2 --deterministic")
    assert re.search(r"^cuda +aten +no \(1\)$", said, re.M) and re.search(r"^cuda +reference +yes$", said, re.M)
    assert re.search(r"^\(1\) .*FlashAttention-2", said, re.M)


# -- pictures ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 64, 100])
@pytest.mark.parametrize("cells", [5, 3])
def test_cells_are_means_of_the_mask(length, cells):
    cu = [0, length // 4, length]
    of = mask.build(length, causal=True, window=(length // 3, 0), sinks=1, cu_seqlens_q=cu)
    edges = np.round(np.linspace(0, length, cells + 1)).astype(np.int64)
    blocks = np.add.reduceat(np.add.reduceat(of.as_array().astype(float), edges[:-1], 0), edges[:-1], 1)
    np.testing.assert_allclose(pictures.coverage(of, edges), blocks / np.multiply.outer(np.diff(edges), np.diff(edges)))
    for name in layouts.LAYOUTS:
        held = layouts.build(name, length, 4, np.array(cu))
        mine = np.eye(4)[held.owner()[0]]
        np.testing.assert_allclose(pictures.owners(held, edges), np.add.reduceat(mine, edges[:-1], 0) / np.diff(edges)[:, None])


def test_image_is_exact_for_few_tokens():
    of, held = mask.build(16, causal=True), layouts.build("stripe", 16, 4)
    colours = pictures.colours(4)[held.owner()[0]]
    wanted = np.where(of.as_array()[:, :, None], colours[:, None], 1.0)
    np.testing.assert_allclose(pictures.image(of, held), wanted)


def test_image_of_many_tokens_is_small():
    of = mask.build(1 << 22, causal=True)
    for name in ("zigzag", "stripe"):
        assert pictures.image(of, layouts.build(name, 1 << 22, 4)).shape == (512, 512, 3)


@pytest.mark.parametrize(
    "words",
    [
        "--seq-len 64 --world-size 4 --layout stripe --window 9 --sinks 2 --rank 3",
        "--seq-len 3 --world-size 4 --mask full",
        "--seq-len 64k --transport all_to_all --panels mask work",
        "--seq-len 4k --world-size 16 --inner 4 --transport ring halo --panels work,timeline",
        "--seq-len 8k --world-size 128 --transport ring --panels timeline",
    ],
)
def test_plot(run, tmp_path, words):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    run(f"plan --network 400g {words} --plot {tmp_path / 'made.png'}")
    made = (tmp_path / "made.png").read_bytes()
    assert made.startswith(b"\x89PNG") and len(made) > 5000


def test_plot_as_svg(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    run(f"plan --seq-len 64 --world-size 2 --plot {tmp_path / 'made.svg'} --json")
    made = (tmp_path / "made.svg").read_text()
    assert "<svg" in made


def test_plot_without_matplotlib(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib: pip install matplotlib" in fails("plan --seq-len 64 --plot mask.png")


# -- what is written about it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [line.strip() for line in EXAMPLES.splitlines()[1:]])
def test_examples_of_the_help(run, tmp_path, monkeypatch, line):
    if "--plot" in line:
        pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run(line.removeprefix("nnscaler-ring "))


@pytest.mark.parametrize("line", re.findall(r"^nnscaler-ring (.*)$", (PICTURES / "README.md").read_text(), re.M))
def test_commands_of_the_pictures(run, tmp_path, line):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    name = re.search(r"--plot docs/pictures/(\S+)", line)[1]
    assert (PICTURES / name).is_file()
    run(line.replace(f"--plot docs/pictures/{name}", f"--plot {tmp_path / name}").replace("docs/pictures", str(PICTURES)))
    assert (tmp_path / name).stat().st_size > 5000


def test_lengths_of_the_pictures_are_those_of_the_benchmark():
    assert json.loads((PICTURES / "packed-64k-0.json").read_text()) == packings.lengths(1 << 16, 0)


def test_version_and_help(capsys):
    for words, said in (("--version", f"nnscaler-ring {__version__}"), ("--help", EXAMPLES), ("plan --help", "--heads-per-team")):
        with pytest.raises(SystemExit) as exit:
            main(words.split())
        assert exit.value.code == 0 and said in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(capsys, shell):
    pytest.importorskip("shtab", reason="needs shtab")
    with pytest.raises(SystemExit) as exit:
        main(["--print-completion", shell])
    said = capsys.readouterr().out
    assert exit.value.code == 0 and "kernels" in said
    assert shell == "tcsh" or ("--heads-per-team" in said and "grouped_ring" in said)  # shtab says less there


def test_completion_without_shtab(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "--print-completion needs shtab: pip install shtab" in fails("--print-completion bash")


def test_as_a_module():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nnscaler_ring", "plan", "--lengths", "-", "--network", "400g", "--json"]
    done = subprocess.run(command, input="[3000, 1096]", capture_output=True, text=True, env=env, timeout=120, check=False)
    said_by_nnscaler = "skip apex ops as it is not installed.\n"  # 0.8, where it is installed
    assert done.returncode == 0 and done.stderr in ("", said_by_nnscaler)
    assert json.loads(done.stdout)["rows"][0]["seq_len"] == 4096
