"""Tables between host and device, and what a CUDA graph that is captured may not do; the capture is pretended, here is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

from nnscaler_ring import ring_flash_attn_varlen_func, wrap_ring_attn_func
from nnscaler_ring.core import call
from nnscaler_ring.core import device as tables
from nnscaler_ring.core.call import Options, Rows, attend
from nnscaler_ring.core.kernels import Scores, packed
from nnscaler_ring.core.recipe import Recipe, content
from tests.interpreter import skip_without_triton

CPU = torch.device("cpu")


@pytest.fixture
def captured() -> Iterator[list[torch.Tensor]]:
    """The tables that are kept while a graph is captured."""
    kept: list[torch.Tensor] = []
    always = mock.Mock(return_value=True)
    with (
        mock.patch.object(tables, "captures", always),
        mock.patch.object(call, "captures", always),
        mock.patch.object(tables, "_OF_GRAPHS", kept),
    ):
        yield kept


def test_captures_asks_of_gpus_alone() -> None:
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True) as asked:
        assert tables.captures(torch.device("cuda", 1)) and not tables.captures(CPU)
    assert asked.call_count == 1


def test_on_device_takes_what_does_not_lie_together() -> None:
    table = np.arange(12).reshape(3, 4).T
    assert torch.equal(tables.on_device(table, CPU), torch.arange(12).reshape(3, 4).T)


def test_a_graph_keeps_the_tables_that_it_reads_again(captured: list[torch.Tensor]) -> None:
    tables.on_device(np.arange(5), CPU)
    cu = packed.bounds((3, 4), torch.empty(1))
    assert [x.tolist() for x in captured] == [[0, 1, 2, 3, 4], [0, 3, 7]]
    tables._HOST.clear()  # the graph's stays
    assert captured[1].tolist() == cu.tolist() == [0, 3, 7]


def test_a_graph_keeps_the_tables_of_triton(captured: list[torch.Tensor]) -> None:
    skip_without_triton()
    from nnscaler_ring.core.kernels.triton import Triton

    q = torch.randn(1, 64, 1, 16)
    Triton().forward(q, q, q, np.array([[0, 64, 0, 64]]), (-1, 0), Scores(scale=0.25))
    assert len(captured) == 1


def test_what_comes_again_is_made_once_and_sent_once() -> None:
    """But for a graph, which sends its own whenever it runs, and on other streams, which would not wait."""
    makes, sends = mock.Mock(return_value=[np.arange(3)]), mock.Mock(side_effect=lambda x, _: x.clone())
    device, default = torch.device("cuda", 0), object()

    def tables_of(*about: object) -> torch.Tensor:
        return tables.resident(makes, device, *about)[0]

    with (
        mock.patch.object(tables, "send", sends),
        mock.patch.object(tables, "readable", lambda table, _: torch.from_numpy(table)),
        mock.patch.object(tables, "captures", return_value=False) as captures,
        mock.patch.object(torch.cuda, "default_stream", return_value=default),
        mock.patch.object(torch.cuda, "current_stream", return_value=default) as stream,
    ):
        first = tables_of("about", 1)
        assert first is tables_of("about", 1) and (makes.call_count, sends.call_count) == (1, 1)
        stream.return_value = object()
        assert len({id(x) for x in [first, *(tables_of("about", 1) for _ in range(2))]}) == 3
        stream.return_value, captures.return_value = default, True
        assert tables_of("about", 1) is not first and (makes.call_count, sends.call_count) == (1, 4)
        captures.return_value = False
        assert tables_of("about", 1) is first and tables_of("about", 2) is not first
        assert (makes.call_count, sends.call_count) == (2, 5)


def test_what_came_longest_ago_goes_first() -> None:
    """By bytes: many small tables, or few large ones."""
    held, makes = tables._Lately(100), mock.Mock(side_effect=lambda: [torch.empty(10, dtype=torch.int32)])
    for key in (1, 2, 1, 3, 1):
        held.get(key, makes)
    assert makes.call_count == 3 and set(held._tables) == {1, 3}
    held.get(4, lambda: [torch.empty(1000)])
    assert set(held._tables) == {4}, "one is held, whatever its size"


def test_nothing_is_kept_where_nothing_is_captured() -> None:
    before = len(tables._OF_GRAPHS)
    tables.on_device(np.arange(5), CPU)
    packed.bounds((3, 4), torch.empty(1))
    assert len(tables._OF_GRAPHS) == before


def test_boundaries_on_the_gpu_cannot_be_read_during_a_capture(captured: list[torch.Tensor]) -> None:
    q, cu = torch.randn(8, 2, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass it on the CPU"):
        ring_flash_attn_varlen_func(q, q, q, cu, 5, causal=True)
    with pytest.raises(ValueError, match="pass it on the CPU"):
        content(cu)


def test_a_capture_draws_no_seed(captured: list[torch.Tensor]) -> None:
    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(NotImplementedError, match="CUDA graph: pass dropout_seed"):
        wrap_ring_attn_func(q, q, q, dropout_p=0.5)
    assert wrap_ring_attn_func(q, q, q, dropout_p=0.5, dropout_seed=3).shape == q.shape


GRAPHS = {
    "zigzag ring": (Recipe(group="local:4", layout="zigzag", transport="ring"), Options(causal=True), None),
    "window": (Recipe(group="local:4"), Options(causal=True, window_size=(100, 0)), None),
    "documents": (Recipe(group="local:4", layout="balanced"), Options(causal=True), [0, 100, 356, 1024]),
}


@pytest.mark.cuda
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_gives_what_the_call_gives(name: str) -> None:
    """Forward and backward of four ranks, captured once, with numbers that change."""
    recipe, options, documents = GRAPHS[name]
    rows = Rows(seq_len=1024, cu_seqlens_q=None if documents is None else torch.tensor(documents, dtype=torch.int32))
    q, k, v, d_out = (torch.randn(1, 1024, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2, 4))
    qkv = [x.requires_grad_() for x in (q, k, v)]

    def both() -> list[torch.Tensor]:
        out = attend(q, k, v, recipe, options, rows)
        assert isinstance(out, torch.Tensor)
        return [out, *torch.autograd.grad(out, qkv, d_out)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and plans
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(2):
        with torch.no_grad():
            for x in (*qkv, d_out):
                x.copy_(torch.randn_like(x))
        want = both()
        graph.replay()
        for got, expected in zip(captured, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def test_tables_do_not_stay_where_there_is_no_default_stream() -> None:
    assert not tables._may_stay(torch.device("xpu")) and tables._may_stay(torch.device("cpu"))
