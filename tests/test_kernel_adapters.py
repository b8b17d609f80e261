"""The adapters of libraries that are not installed here, on stand-ins of their releases (`releases`).

What stand-ins cannot show is the libraries' own kernels: none of these backends has run on a GPU.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnscaler_ring import cli
from nnscaler_ring.core import kernels
from nnscaler_ring.core.kernels import KERNELS, Case, Grad, Kernel, Scores, choose
from nnscaler_ring.core.kernels.aten import AtenCpu, AtenCuda, AtenXpu
from nnscaler_ring.core.kernels.flash_attn import FlashAttn2
from nnscaler_ring.core.kernels.flash_attn_cute import FlashAttn4
from nnscaler_ring.core.kernels.flash_attn_hopper import FlashAttn3
from nnscaler_ring.core.kernels.packed import Packing
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.kernels.transformer_engine import TransformerEngine
from nnscaler_ring.core.kernels.triton import Triton
from nnscaler_ring.core.mask import build
from nnscaler_ring.core.merge import Results
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.releases import (
    RELEASES,
    RELEASES_2,
    RELEASES_3,
    RELEASES_4,
    RELEASES_TE,
    Release,
    functions_of,
)
from tests.test_kernels import SPANS, TOLERANCE, WINDOWS, check_backward, check_forward, check_lse_gradient, fits, problem

BF16 = torch.bfloat16


# -- installing them ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """``install(release)`` puts a stand-in where the library would be, with a GPU of the kind wanted."""

    def into(release: Release, gpu: tuple[int, int] = (9, 0), **changed: str) -> None:
        release = release._replace(functions={**release.functions, **changed})
        parts = release.module.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[:n])
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        vars(sys.modules[release.module]).update(functions_of(release))
        if isinstance(release.kernel, TransformerEngine):
            vars(sys.modules[release.module])["FusedAttnBackend"] = {"F16_arbitrary_seqlen": "arbitrary"}
            constants = ModuleType("transformer_engine.pytorch.constants")
            constants.TE_DType = {torch.bfloat16: "te bf16", torch.float16: "te fp16"}
            monkeypatch.setitem(sys.modules, constants.__name__, constants)
            monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
        if release.installed:
            folder = tmp_path / f"{release.installed[0]}-{release.installed[1]}.dist-info"
            folder.mkdir(exist_ok=True)
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {release.installed[0]}\nVersion: {release.installed[1]}\n"
            )
            monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
        choose.cache_clear()

    return into


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    yield
    choose.cache_clear()


def case(kernel_dtype: torch.dtype = BF16, dim: int = 64, dim_v: int = 0, **more: Any) -> Case:
    return Case("cuda", kernel_dtype, dim, dim_v or dim, 4, 2, **more)


# -- what the suite asks -----------------------------------------------------------------------------------------------------------


def problems(windows=WINDOWS, heads=((4, 2, 8, 8), (3, 1, 5, 3), (3, 1, 8, 4))) -> Iterator[tuple[Any, ...]]:
    for window, spans, each in itertools.product(windows, SPANS.values(), heads):
        if all(fits(span, window) for span in spans):
            yield spans, window, each


def check_all(kernel: Kernel, dtype: torch.dtype = BF16, **which: Any) -> None:
    """The shared suite's forward and backward, over its spans and windows."""
    ran = 0
    for spans, window, heads in problems(**which):
        p = problem(spans, window, heads, dtype, torch.device("cpu"))
        check_forward(kernel, p, TOLERANCE[dtype])
        check_backward(kernel, p, TOLERANCE[dtype])
        ran += 1
    assert ran


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_the_shared_suite_on_every_release(release: Release, install: Callable[..., None]) -> None:
    install(release)
    release.kernel.check(case())
    own = [window for window in WINDOWS if window[1] == 0 or window == (-1, -1)]
    check_all(release.kernel, windows=own if isinstance(release.kernel, TransformerEngine) else WINDOWS)
    assert choose(release.kernel.name, case()) in KERNELS[release.kernel.name]


@pytest.mark.parametrize(
    "release", [RELEASES_2[0], RELEASES_2[-1], RELEASES_3[-1], RELEASES_4[-1]], ids=lambda release: release.name
)
def test_float16_and_wide_heads(release: Release, install: Callable[..., None]) -> None:
    install(release)
    check_all(release.kernel, torch.float16, windows=[(-1, 0)], heads=[(4, 2, 8, 8)])
    check_all(release.kernel, windows=[(-1, 0), (2, 1)], heads=[(2, 1, 192, 128), (2, 2, 160, 144), (1, 1, 250, 256)])


@pytest.mark.parametrize("release", [r for r in RELEASES if "2.5" not in r.name and r.kernel.features], ids=lambda r: r.name)
def test_softcap(release: Release, install: Callable[..., None]) -> None:
    install(release)
    release.kernel.check(case(features=frozenset({"softcap"})))
    p = problem(SPANS["documents"], (-1, 0), (4, 2, 8, 8), BF16, torch.device("cpu"))
    scores = Scores(scale=p.scale * 3, softcap=1.5)
    exact = [x.double() for x in p.given]
    got, want = (
        kernel.forward(*given[:3], p.spans, p.window, scores) for kernel, given in ((release.kernel, p.given), (Reference(), exact))
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-2, rtol=2e-2)
    sums = []
    for kernel, given, dtype in ((release.kernel, p.given, torch.float32), (Reference(), exact, torch.float64)):
        sums.append(oracle.sums(given[:3]))
        grad = Grad(given.q if given is p.given else given[0], want[0].to(given[0].dtype), given[3], want[1].to(dtype), *sums[-1])
        kernel.backward(grad, given[1], given[2], p.spans, p.window, scores)
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one.total().double(), other.total(), atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("release", [RELEASES_2[0], RELEASES_2[-1], RELEASES_3[-1], *RELEASES_4], ids=lambda r: r.name)
def test_the_gradient_of_the_log_sum_exp(release: Release, install: Callable[..., None]) -> None:
    install(release)
    release.kernel.check(case(features=frozenset({"d_lse"})))
    check_lse_gradient(release.kernel, BF16, torch.device("cpu"), (4, 2, 8, 6))


@pytest.mark.parametrize("release", [*RELEASES_2, *RELEASES_3, *RELEASES_4], ids=lambda release: release.name)
def test_rows_that_see_nothing(release: Release, install: Callable[..., None]) -> None:
    """Plans have none; a log-sum-exp of +inf would be a merge's end."""
    install(release)
    q, k = (torch.randn(1, rows, 2, 8).to(BF16) for rows in (6, 5))
    for spans, blind in (([(0, 6, 1, 4)], [0, 1, 2]), ([(0, 4, 0, 2), (4, 6, 2, 5)], [0, 1])):
        out, lse = release.kernel.forward(q, k, k, np.array(spans), (-1, 0), Scores(scale=1.0))
        seen = torch.tensor([row not in blind for row in range(6)])
        assert (lse[:, :, ~seen] == -torch.inf).all() and lse[:, :, seen].isfinite().all() and (out[:, ~seen] == 0).all()


@pytest.mark.parametrize("release", [RELEASES_2[0], RELEASES_2[-1], RELEASES_3[-1], RELEASES_4[-1]], ids=lambda r: r.name)
def test_rows_that_start_between_16_bytes(release: Release, install: Callable[..., None]) -> None:
    """As keys and values of unlike head dims lie in a buffer of packed rows; the stand-ins refuse them as they are."""
    install(release)
    for name in ("one", "documents"):
        p = problem(SPANS[name], (-1, 0), (3, 1, 8, 4), BF16, torch.device("cpu"))
        both = torch.cat(p.given[1:3], dim=3)
        p = p._replace(given=p.given._replace(k=both[..., :8], v=both[..., 8:]))
        assert p.given.k.stride(1) * 2 % 16
        check_forward(release.kernel, p, TOLERANCE[BF16])
        check_backward(release.kernel, p, TOLERANCE[BF16])


@pytest.mark.parametrize("release", [RELEASES_2[0], RELEASES_3[0], RELEASES_4[0], RELEASES_TE[0]], ids=lambda release: release.name)
def test_deterministic_is_passed_on(release: Release, install: Callable[..., None]) -> None:
    said = []

    def body(name: str, given: dict[str, Any]) -> Any:
        said.extend([given["deterministic"]] if "deterministic" in given else [])
        return release.body(name, given)

    install(release._replace(body=body))
    p = problem(SPANS["one"], (-1, 0), (4, 2, 8, 8), BF16, torch.device("cpu"))
    out, lse = release.kernel.forward(*p.given[:3], p.spans, p.window, Scores(scale=p.scale))
    out, lse = (torch.cat([x, x[:, :4]], 1) for x in (out, lse.mT))  # of all rows
    for deterministic in (False, True):
        sums = oracle.sums(p.given[:3])
        grad = Grad(p.given.q, out, p.given.d_out, lse.mT, *sums, deterministic=deterministic)
        release.kernel.backward(grad, *p.given[1:3], p.spans, p.window, Scores(scale=p.scale))
    assert said == [False, True]


@pytest.mark.parametrize("layout", ["zigzag", "stripe", "contiguous"])
@pytest.mark.parametrize(
    "release", [RELEASES_2[0], *(each[-1] for each in (RELEASES_2, RELEASES_3, RELEASES_4))], ids=lambda r: r.name
)
def test_a_whole_ring(release: Release, layout: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ranks, their results merged and their gradients sent home, as near to dense float64 as dense attention in bf16."""
    install(release)
    monkeypatch.setattr(kernels, "choose", lambda *_: release.kernel)
    given = oracle.inputs(0, (2, 64, 64), (4, 2, 8, 6), BF16)
    for seen in ({}, {"window": (9, 0)}):
        how = Recipe(group="local:5", layout=layout, transport="ring", causal=True, **seen)
        want = oracle.dense(given, build(64, causal=True, **seen).as_array(), 0.4)
        oracle.assert_close(oracle.run(given, 0.4, how), want, 3e-2, (layout, seen))


def test_windows_that_transformer_engine_lacks_run_on_torchs_flash_attention(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(RELEASES_TE[-1])
    asked = []
    for name in ("calls", "backward"):
        monkeypatch.setattr(
            TransformerEngine.elsewhere, name, lambda *given, of=name: asked.append((of, given[-2])) or [], raising=False
        )
    kernel, window = TransformerEngine(), (-1, 2)
    p = problem(SPANS["inside"], window, (4, 2, 8, 8), BF16, torch.device("cpu"))
    kernel.merge(Results(p.given.q, 8, BF16), *p.given[:3], p.spans, window, Scores(scale=1.0))
    kernel.backward(None, *p.given[1:3], p.spans, window, Scores(scale=1.0))
    assert asked == [("calls", window), ("backward", window)]


# -- releases that are not known ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_parameter_that_is_not_known_is_refused_by_name(release: Release, install: Callable[..., None]) -> None:
    for name, signature in release.functions.items():
        kind = ": Tensor" if release.op else ""
        install(release, **{name: f"fancy{kind}, {signature}"})
        with pytest.raises(NotImplementedError, match=f"a release that is not known here: {name} wants fancy") as said:
            release.kernel.check(case())
        assert not release.installed or release.installed[1] in str(said.value)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_parameter_that_has_gone_is_refused_by_name(release: Release, install: Callable[..., None]) -> None:
    for name, signature in release.functions.items():
        for gone in {"softmax_scale", "attn_scale", "window_size"} & set(
            re.findall(r"softmax_scale|attn_scale|window_size", signature)
        ):
            install(release, **{name: signature.replace(gone, f"new_{gone}")})
            with pytest.raises(NotImplementedError, match=rf"{name} has no {gone}"):
                release.kernel.check(case())


@pytest.mark.parametrize("release", [RELEASES_2[-1], RELEASES_3[-1], RELEASES_4[-1], RELEASES_TE[-1]], ids=lambda r: r.name)
def test_a_function_that_has_gone_is_refused(release: Release, install: Callable[..., None]) -> None:
    install(release)
    for name in release.functions:
        delattr(sys.modules[release.module], name)
    with pytest.raises(NotImplementedError, match=r"is a release that is not known here: module .* has no attribute"):
        release.kernel.check(case())


def test_a_result_that_is_not_known_is_refused(install: Callable[..., None]) -> None:
    odd = RELEASES_2[2]
    install(odd._replace(body=lambda name, given: (1, 2, 3)))
    with pytest.raises(NotImplementedError, match=r"flash-attn 2 \(2.6.0\) is a release that is not known here: 3 results"):
        odd.kernel.forward(*[torch.randn(1, 4, 2, 8).to(BF16)] * 3, np.array([(0, 4, 0, 4)]), (-1, -1), Scores(scale=1.0))


@pytest.mark.parametrize(
    ("release", "version", "said"),
    [
        (RELEASES_2[0], "2.3.0", r"flash-attn 2 \(2.3.0\) is older than 2.5.5"),
        (RELEASES_4[0], "4.0.0b8", r"flash-attn 4 \(4.0.0b8\) is older than 4.0.0b9"),
        (RELEASES_TE[0], "2.1.0", r"Transformer Engine \(2.1.0\) is older than 2.2.0"),
        (RELEASES_TE[0]._replace(installed=("transformer_engine_cu12", "")), "2.1.0", r"\(2.1.0\) is older than 2.2.0"),
    ],
)
def test_what_is_too_old(release: Release, version: str, said: str, install: Callable[..., None]) -> None:
    assert release.installed
    install(release._replace(installed=(release.installed[0], version)))
    with pytest.raises(NotImplementedError, match=said):
        release.kernel.check(case())


@pytest.mark.parametrize("error", [AssertionError, AttributeError, ImportError, OSError])
def test_a_library_that_fails_while_it_is_imported(error: type[Exception], install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, it is one that is not there; `auto` takes another, and the command line says why."""
    install(RELEASES_2[-1])

    def fails(name: str) -> None:
        raise error("a compiled part is missing")

    monkeypatch.setattr("nnscaler_ring.core.kernels.installed.import_module", fails)
    with pytest.raises(NotImplementedError, match=r"flash-attn 2 \(2.8.4\) cannot be imported: .*a compiled part is missing"):
        FlashAttn2().check(case())


def test_a_library_that_cannot_be_imported(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(RELEASES_2[-1])
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    with pytest.raises(NotImplementedError, match=r"flash-attn 2 \(2.8.4\) cannot be imported: "):
        FlashAttn2().check(case())


def test_a_package_of_the_same_name_is_not_the_library(install) -> None:
    """flash-attn 4 comes as a part of ``flash_attn``, which is then no flash-attn 2."""
    install(RELEASES_4[-1])
    with pytest.raises(NotImplementedError, match=r"^flash-attn 2 is not installed$"):
        FlashAttn2().check(case())


def test_what_each_adapter_lacks(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    lacks: list[tuple[Release, tuple[int, int], Case, str]] = [
        (RELEASES_2[0], (9, 0), case(features=frozenset({"softcap"})), "_flash_attn_forward has no softcap"),
        (RELEASES_2[-1], (7, 5), case(), r"needs a GPU of compute capability 8.x, 9.x, 10.x, 12.x, not 7.5"),
        (RELEASES_2[-1], (9, 0), case(torch.float32), "takes bfloat16 and float16, not torch.float32"),
        (RELEASES_2[-1], (9, 0), case(dim=257), "head dims up to 256, not 257 and 257"),
        (RELEASES_2[-1], (9, 0), case(features=frozenset({"dropout"})), "it has no dropout"),
        (RELEASES_3[-1], (8, 0), case(), "needs a GPU of compute capability 9.x, not 8.0"),
        (RELEASES_3[-1], (10, 0), case(), "needs a GPU of compute capability 9.x, not 10.0"),
        (RELEASES_3[-1], (9, 0), case(dim=256, deterministic=True), "no deterministic backward for head dims above 192"),
        (RELEASES_4[-1], (8, 6), case(), "needs a GPU of compute capability 9.x, 10.x, not 8.6"),
        (RELEASES_4[-1], (10, 0), case(dim=256), r"not used on Blackwell for head dims padded to \(256, 256\)"),
        (RELEASES_TE[-1], (8, 0), case(dim=192, dim_v=128), r"no backward for head dims \(192, 128\) on a GPU 8.x"),
        (RELEASES_TE[-1], (10, 0), case(deterministic=True), "no deterministic backward on a GPU 10.x with cuDNN 91200"),
    ]
    for release, gpu, asked, said in lacks:
        with monkeypatch.context():
            install(release, gpu)
            with pytest.raises(NotImplementedError, match=said):
                release.kernel.check(asked)
    install(RELEASES_4[-1], (10, 0))
    FlashAttn4().check(case(dim=192, dim_v=128))
    config = ModuleType("flash_attn_config")
    config.CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_LOCAL": True, "FLASHATTENTION_DISABLE_FP16": True}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    install(RELEASES_3[-1])
    with pytest.raises(NotImplementedError, match=r"this build of flash-attn 3 is without LOCAL$"):
        FlashAttn3().check(case())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(NotImplementedError, match="not on ROCm"):
        FlashAttn2().check_gpu(case())


# -- the choice --------------------------------------------------------------------------------------------------------------------


def auto(asked: Case) -> str:
    choose.cache_clear()
    return type(choose("auto", asked)).__name__


@pytest.mark.parametrize(
    ("gpu", "order"),
    [
        ((9, 0), ["FlashAttn4", "FlashAttn3", "AtenCuda"]),
        ((10, 0), ["FlashAttn4", "AtenCuda"]),
        ((8, 0), ["FlashAttn2", "AtenCuda"]),
        ((12, 0), ["FlashAttn2", "AtenCuda"]),
    ],
)
def test_auto_takes_the_fastest_that_is_there(gpu, order: list[str], install, monkeypatch: pytest.MonkeyPatch) -> None:
    releases = {
        "FlashAttn4": RELEASES_4[-1],
        "FlashAttn3": RELEASES_3[-1],
        "FlashAttn2": RELEASES_2[-1],
        "TransformerEngine": RELEASES_TE[-1],
    }
    for release in releases.values():
        install(release, gpu)
    for name in order:
        assert auto(case()) == name
        if name in releases:
            monkeypatch.delitem(sys.modules, releases[name].module)
            monkeypatch.setitem(sys.modules, releases[name].module, None)
    assert auto(case(torch.float32)) == "Triton", "what the libraries lack"
    assert auto(Case("cpu", BF16, 64, 64, 4, 2)) == "AtenCpu"


def test_the_order_names_what_there_is() -> None:
    every = {type(kernel) for each in KERNELS.values() for kernel in each}
    assert every == {FlashAttn2, FlashAttn3, FlashAttn4, AtenCpu, AtenCuda, AtenXpu, TransformerEngine, Triton, Reference}
    for order in kernels.FASTEST.values():
        assert len(set(order)) == len(order) and set(order) <= every


def test_the_command_line_lists_each_version_of_a_library(install, capsys: pytest.CaptureFixture[str]) -> None:
    install(RELEASES_4[-1]._replace(installed=("flash_attn_4", "4.0.0b8")))
    install(RELEASES_2[-1])
    cli.main(["kernels", "--device", "cuda", "--dtype", "bfloat16"])
    said = capsys.readouterr().out
    rows = dict(re.findall(r"^cuda +(\S.*?)  +(\S.*)$", said, re.M))
    assert rows["auto"] == "aten" and rows["aten"] == "yes" and rows["flash_attn (flash-attn 2)"] == "yes"
    assert rows["flash_attn (flash-attn 4)"] == "no (1)" and "(1) flash-attn 4 (4.0.0b8) is older than 4.0.0b9" in said
    assert rows["flash_attn (flash-attn 3)"] == "no (2)" and "(2) flash-attn 3 is not installed" in said
    cli.main(["kernels", "--device", "cuda", "--dtype", "bfloat16", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["auto"] == {"cuda": {"bfloat16": "aten"}}
    (flash,) = (each for each in made["kernels"] if each["kernel"] == "flash_attn")
    assert flash["usable"] and flash["versions"]["flash-attn 2"] is None and "older" in flash["versions"]["flash-attn 4"]


def test_each_says_why_it_is_not_taken() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    for name, labels in (
        ("flash_attn", ["flash-attn 4", "flash-attn 3", "flash-attn 2"]),
        ("transformer_engine", ["Transformer Engine"]),
    ):
        for asked in (Case("cpu", BF16, 64, 64, 4, 2), case()):
            with pytest.raises(NotImplementedError) as said:
                choose(name, asked)
            for label in labels:
                assert f"{name}: {label} is " in str(said.value)


def test_libraries_are_not_imported_before_they_are_used(tmp_path: Path) -> None:
    """Nor by looking whether they are installed."""
    for name in ("flash_attn", "flash_attn_interface", "transformer_engine"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
    text = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from nnscaler_ring.core.kernels import Case, choose
        for dtype in (torch.bfloat16, torch.float32):
            assert choose("auto", Case("cpu", dtype, 64, 64, 4, 2)).name == "aten"
            assert choose("auto", Case("meta", dtype, 64, 64, 4, 2)).name == "reference"
        import nnscaler_ring
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(text)], check=True)


def test_what_is_installed_has_the_signatures_recorded_here() -> None:
    """Where one of the libraries is installed, its functions are bound as any release's."""
    found = []
    for release in (RELEASES_2[-1], RELEASES_3[-1], RELEASES_4[-1]):
        kernel = release.kernel
        assert isinstance(kernel, FlashAttn2 | FlashAttn3 | FlashAttn4)
        try:
            module = kernel.package.load()
        except NotImplementedError:
            continue
        kernel.check_functions(module, frozenset())
        found.append(release.name)
    if not found:
        pytest.skip("needs flash-attn")


@pytest.mark.parametrize(
    ("spans", "apart"),
    [
        ([(0, 8192, 0, 8192)], [1]),
        ([(0, 4096, 0, 4096), (4096, 8192, 4096, 8192)], [2]),  # end to end
        ([(0, 8000, 0, 8000), (8000, 8192, 8200, 8400)], [2]),  # out would be copied, which is more than the keys
        ([(0, 4096, 0, 8192), (4096, 8192, 0, 57344)], [1, 1]),  # keys that are read twice
        ([(0, 100, 0, 100), (200, 300, 200, 300)], [2]),  # little to gather
        ([(0, 4096, 0, 4096), (4096, 6144, 4096, 6144), (7000, 8192, 7000, 8192), (8192, 16384, 9000, 60000)], [2, 1, 1]),
    ],
)
def test_spans_are_gathered_where_that_is_less(spans: list[tuple[int, int, int, int]], apart: list[int]) -> None:
    """8 key heads of 128, 32 query heads, bf16."""
    q, k = (torch.empty(1, 65536, heads, 128, dtype=BF16, device="meta") for heads in (32, 8))
    made = FlashAttn4().groups(q, k, np.array(spans), (-1, 0), False)
    assert [len(group) for group in made] == apart and np.array_equal(np.concatenate(made), spans)
    assert len(FlashAttn4().groups(q[:0], k[:0], np.array(spans), (-1, 0), False)) == 1


def test_spans_of_as_many_rows_and_keys_in_all() -> None:
    """Keys have boundaries of their own wherever one span has not as many as rows."""
    call = Packing(np.array([[0, 4, 0, 8], [4, 12, 8, 12]]), torch.empty(1, 12, 1, 8)).call((-1, -1), Scores(scale=1.0))
    assert call.cu_q is not None and call.cu_q.tolist() == [0, 4, 12]
    assert call.cu_k is not None and call.cu_k.tolist() == [0, 8, 12]


def test_wide_values_are_refused_like_wide_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashAttn2, "package", SimpleNamespace(label="flash-attn 2", load=lambda: None))
    monkeypatch.setattr(FlashAttn2, "check_gpu", lambda self, case: None)
    monkeypatch.setattr(FlashAttn2, "check_functions", lambda self, module, features: None)
    FlashAttn2().check_sizes(Case("cuda", torch.bfloat16, 64, 256, 4, 4))
    with pytest.raises(NotImplementedError, match="up to 256"):
        FlashAttn2().check_sizes(Case("cuda", torch.bfloat16, 64, 264, 4, 4))


def test_flash_attn_4_on_hopper_with_wide_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnscaler_ring.core.kernels.flash_attn_cute.capability", lambda *about: (9, 0))
    FlashAttn4().check_gpu(Case("cuda", torch.bfloat16, 192, 128, 4, 4))
    with pytest.raises(NotImplementedError, match="fewer key heads"):
        FlashAttn4().check_gpu(Case("cuda", torch.bfloat16, 192, 128, 4, 2))
