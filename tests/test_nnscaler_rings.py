"""Rings from made-up index maps, without nnscaler; and from nnscaler's own graphs, where it is installed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnscaler_ring.annotations import rings
from nnscaler_ring.annotations.rings import Collective, IndexMap, Piece, check_collectives, check_order, derive_rings, scaled_groups
from nnscaler_ring.annotations.runtime import nnscaler_runtime

# B batch, L sequence, H heads: the first three dims of a made-up output tensor of 4 x 12 x 4 x 8.
B, L, H = 0, 1, 2
SHAPE = (4, 12, 4, 8)


def cut(*steps: tuple[int, int], replicas: int = 1, devices: list[int] | None = None, tensor: int = 7) -> list[Piece]:
    """The pieces after cutting dims one inside the other, each `num` times, on ascending devices unless told."""
    maps: list[IndexMap] = [tuple((0, size) for size in SHAPE)]
    for dim, num in steps:
        maps = [part for each in maps for part in split(each, dim, num)]
    order = iter(devices or range(len(maps) * replicas))
    return [
        Piece(100 * tensor + index, next(order), tensor, each, L, SHAPE[L])
        for index, each in enumerate(maps)
        for _ in range(replicas)
    ]


def split(index_map: IndexMap, dim: int, num: int) -> list[IndexMap]:
    start, stop = index_map[dim]
    size = (stop - start) // num
    edges = [(start + i * size, start + (i + 1) * size) for i in range(num)]
    return [(*index_map[:dim], edge, *index_map[dim + 1 :]) for edge in edges]


def by_device(pieces: list[Piece]) -> dict[int, tuple[int, ...]]:
    found = derive_rings(pieces)
    assert set(found) == {(piece.cid, piece.device) for piece in pieces}
    return {device: ring for (_, device), ring in found.items()}


def each_own(*each: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {device: ring for ring in each for device in ring}


@pytest.mark.parametrize("num", [1, 2, 3, 4, 6])
def test_sequence(num: int) -> None:
    assert by_device(cut((L, num))) == each_own(tuple(range(num)))


@pytest.mark.parametrize("dim", [B, H])
def test_a_piece_with_the_whole_sequence_is_its_own_ring(dim: int) -> None:
    assert by_device(cut((dim, 4))) == each_own((0,), (1,), (2,), (3,))


@pytest.mark.parametrize("other", [B, H])
def test_two_dims_in_both_orders(other: int) -> None:
    assert by_device(cut((L, 3), (other, 2))) == each_own((0, 2, 4), (1, 3, 5))
    assert by_device(cut((other, 2), (L, 3))) == each_own((0, 1, 2), (3, 4, 5))


def test_three_dims_and_two_cuts_of_one() -> None:
    assert by_device(cut((B, 2), (L, 2), (H, 2))) == each_own((0, 2), (1, 3), (4, 6), (5, 7))
    assert by_device(cut((L, 2), (H, 2), (L, 3))) == each_own((0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11))


def test_replicas() -> None:
    assert by_device(cut((L, 2), replicas=3)) == each_own((0, 3), (1, 4), (2, 5))
    assert by_device(cut((L, 2), replicas=2, devices=[0, 2, 1, 3])) == each_own((0, 1), (2, 3))
    assert by_device(cut((H, 2), replicas=2)) == each_own((0,), (1,), (2,), (3,))
    assert by_device(cut(replicas=2)) == each_own((0,), (1,))


def test_pipeline_stages_and_two_calls_on_the_same_devices() -> None:
    stages = cut((L, 2), tensor=1) + cut((L, 2), devices=[2, 3], tensor=2)
    assert by_device(stages) == each_own((0, 1), (2, 3))
    calls = cut((L, 4), tensor=1) + cut((L, 2), (H, 2), tensor=2)
    found = derive_rings(calls)
    assert [found[piece.cid, piece.device] for piece in calls] == [(0, 1, 2, 3)] * 4 + [(0, 2), (1, 3), (0, 2), (1, 3)]


def test_the_order_of_the_pieces_does_not_matter() -> None:
    pieces = cut((L, 3), (H, 2), replicas=2)
    assert derive_rings(pieces) == derive_rings(pieces[::-1]) == derive_rings(pieces[5:] + pieces[:5])


def test_devices_that_ascend_along_each_ring_may_be_in_any_order_otherwise() -> None:
    assert by_device(cut((H, 2), (L, 2), devices=[0, 2, 1, 3])) == each_own((0, 2), (1, 3))


@pytest.mark.parametrize("devices", [[1, 0, 2], [2, 1, 0], [0, 2, 1]])
def test_refuses_devices_that_do_not_ascend(devices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not ascend.*assign them to \(0, 1, 2\)"):
        derive_rings(cut((L, 3), devices=devices))


def test_refuses_two_chunks_on_one_device() -> None:
    with pytest.raises(ValueError, match="two of them on one; cut the sequence in as many parts"):
        derive_rings(cut((L, 4), devices=[0, 0, 1, 1]))


def test_refuses_uneven_replication() -> None:
    pieces = cut((L, 2))
    with pytest.raises(ValueError, match=r"some on more than others; replicate every piece"):
        derive_rings([*pieces, dataclasses.replace(pieces[1], device=2)])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_refuses_chunks_that_do_not_tile(missing: int) -> None:
    pieces = cut((L, 3))
    del pieces[missing]
    with pytest.raises(ValueError, match="do not tile the sequence; cut"):
        derive_rings(pieces)


def test_refuses_chunks_that_overlap() -> None:
    halves, thirds = cut((L, 2)), cut((L, 3))
    with pytest.raises(ValueError, match="do not tile"):
        derive_rings([halves[0], *thirds[1:]])


def test_refuses_chunks_of_different_length() -> None:
    halves, quarters = cut((L, 2)), cut((L, 4), devices=[2, 3, 4, 5])
    with pytest.raises(ValueError, match="differ in length; cut the sequence in equal parts"):
        derive_rings([halves[0], *quarters[2:]])


def test_groups_of_every_scale_unit() -> None:
    assert scaled_groups([(0, 1), (0, 1)], 2, 4) == [(0, 1), (2, 3)]
    assert scaled_groups([(0, 2), (1, 3)], 4, 8) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert scaled_groups([(1,), (0, 1, 2)], 3, 3) == [(0, 1, 2)]  # a ring of one needs no group


def test_ranks_of_a_node_that_no_ring_was_derived_for() -> None:
    with pytest.raises(ValueError, match=r"no ring is known.*not called with 'some\.op'"):
        rings.ring_ranks(SimpleNamespace(signature="some.op"), 0, 2)


def gathered(*ranges: tuple[int, tuple[int, int]]) -> Collective:
    return Collective("AllGatherPrim", "k", tuple((device, ((0, 4), edge)) for device, edge in ranges))


def test_collectives_over_chunks_in_the_order_of_their_ranks() -> None:
    check_collectives([gathered((1, (4, 8)), (0, (0, 4))), gathered((0, (0, 8)), (3, (0, 8)))])
    with pytest.raises(ValueError, match=r"tensor k .* devices \(0, 2, 1, 3\).*sequence outer and heads inner"):
        check_collectives([gathered((0, (0, 2)), (2, (2, 4)), (1, (4, 6)), (3, (6, 8)))])


def test_orders_of_rows_that_differ() -> None:
    check_order({})
    check_order({"shuffle": [(0, 1), (2, 3)], "attend": [(0, 2), (1, 3)]})
    for rings_of in ({"shuffle": [(0, 1, 2, 3)], "attend": [(0, 1), (2, 3)]}, {"attend": [(0, 1), (2,)]}):
        with pytest.raises(ValueError, match=r"other numbers of parts.*attend"):
            check_order(rings_of)


# ------------------------------------------------------------------------------------------ nnscaler


def marker(q: torch.Tensor, k: torch.Tensor, ring: tuple[int, ...] | None = None) -> torch.Tensor:
    """Stands in for attention with keys of one head: what counts here is which ring its code is given."""
    return q * k


def emit(node: Any, args: list[str], kwargs: dict[str, str], runtime_devid: int, plan_ndevs: int, _: int) -> str:
    return f"{node.signature}({', '.join(args)}, ring={rings.ring_ranks(node, runtime_devid, plan_ndevs)})"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = torch.nn.Linear(8, 32), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q(x).view(4, 12, 4, 8), self.k(x).view(4, 12, 1, 8)
        return marker(q, k).sum()


@functools.cache
def register() -> str:
    import nnscaler

    nnscaler.register_op("b l h d^, b l 1 d^ -> b l h d^", emit_fn=emit)(marker)
    return f"{__name__}.marker"


def policy(steps: tuple[tuple[int, int], ...], devices: list[int] | None) -> Callable[[Any, Any], Any]:
    """Cut the marked op as told, replicate the rest."""

    def pas(graph: Any, config: Any) -> Any:
        from nnscaler.ir.operator import IRFwOperation
        from nnscaler.policies import auto_multiref

        auto_multiref(graph)
        for node in graph.select(ntype=IRFwOperation):
            pieces = [node]
            for dim, num in steps if node.signature == register() else ():
                cuts = [graph.partition(each, each.algorithm("dim"), idx=0, dim=dim, num=num) for each in pieces]
                pieces = list(itertools.chain(*cuts))
            if node.name != "multiref":
                times = config.plan_ngpus // len(pieces)
                pieces = [copy for each in pieces for copy in graph.replicate(each, times=times)]
                for device, piece in zip(devices or range(len(pieces)), pieces, strict=True):
                    graph.assign(piece, device)
        return graph

    return pas


@pytest.fixture
def generated(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """``generated(runtime, steps)``: the code of every rank for a plan of 4 devices."""

    def generate(runtime: int, steps: tuple[tuple[int, int], ...], devices: list[int] | None = None) -> list[str]:
        import nnscaler

        config = nnscaler.ComputeConfig(4, runtime, trace_strategy="cpu")
        options = {"gen_savedir": str(tmp_path), "load_module": False, "reuse": "override"}
        nnscaler.parallelize(Model, {"x": torch.randn(4, 12, 8)}, policy(steps, devices), config, **options)
        return [path.read_text() for path in sorted(tmp_path.rglob("gencode*.py"))]

    with nnscaler_runtime("cpu"):
        remove = rings.install({register(): L - 4})  # counted from the end works too
        yield generate
        remove()


def ring_of(code: str) -> tuple[int, ...]:
    (ring,) = re.findall(r"ring=\(([\d, ]+)\)", code)
    return tuple(int(rank) for rank in ring.split(",") if rank.strip())


nnscaler_graph = [pytest.mark.nnscaler, pytest.mark.filterwarnings("ignore")]  # nnscaler's own are not ours to mend
MESHES = {
    "sequence": (((L, 4),), [(0, 1, 2, 3)]),
    "sequence x heads": (((L, 2), (H, 2)), [(0, 2), (1, 3)]),
    "batch x sequence": (((B, 2), (L, 2)), [(0, 1), (2, 3)]),
    "sequence x batch": (((L, 2), (B, 2)), [(0, 2), (1, 3)]),
    "sequence x replicas": (((L, 2),), [(0, 2), (1, 3)]),
    "heads": (((H, 4),), [(0,), (1,), (2,), (3,)]),
    "replicas": ((), [(0,), (1,), (2,), (3,)]),
}


class TestNnscalerGraph:
    pytestmark = nnscaler_graph

    @pytest.mark.parametrize("runtime", [4, 8])
    @pytest.mark.parametrize("mesh", MESHES)
    def test_every_rank_gets_its_ring_and_creates_all(self, generated: Callable[..., list[str]], mesh: str, runtime: int) -> None:
        steps, expected = MESHES[mesh]
        codes = generated(runtime, steps)
        rank_rings = {rank: tuple(unit + d for d in ring) for unit in range(0, runtime, 4) for ring in expected
                      for rank in (unit + d for d in ring)}  # fmt: skip
        assert {rank: ring_of(code) for rank, code in enumerate(codes)} == rank_rings
        created = [re.findall(r"self\.init_group\(ranks=[\[(]([\d, ]+)[\])]\)", code) for code in codes]
        assert all(each == created[0] for each in created)
        groups = [tuple(map(int, filter(str.strip, each.split(",")))) for each in created[0]]
        assert {ring for ring in rank_rings.values() if len(ring) > 1} <= set(groups)

    @pytest.mark.parametrize(
        ("steps", "devices", "message"),
        [
            (((L, 4),), [3, 2, 1, 0], "do not ascend"),
            (((H, 2), (L, 2)), None, "sequence outer and heads inner"),
            (((H, 2), (B, 2)), None, "the inner one must be of the dimension"),
        ],
    )
    def test_refuses_what_nnscaler_would_compute_wrongly(
        self, generated: Callable[..., list[str]], steps: Any, devices: list[int] | None, message: str
    ) -> None:
        with pytest.raises(RuntimeError) as error:
            generated(4, steps, devices)
        causes = list(iter_causes(error.value))
        assert isinstance(causes[-1], ValueError)
        assert message in str(causes[-1])

    def test_the_hook_comes_out_again(self) -> None:
        from nnscaler.codegen.module.module import ModuleCodeGen

        before = ModuleCodeGen.get_comm_groups
        remove = rings.install({})
        assert ModuleCodeGen.get_comm_groups is not before
        remove()
        assert ModuleCodeGen.get_comm_groups is before


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def test_ops_of_one_shape_on_other_devices_have_rings_of_their_own() -> None:
    def op(tensor: int, devices: tuple[int, ...]) -> list[Piece]:
        return [Piece(10 * tensor + n, device, tensor, ((4 * n, 4 * n + 4),), 0, 8) for n, device in enumerate(devices)]

    found = derive_rings([*op(1, (0, 3)), *op(2, (1, 2))])
    assert found == {(10, 0): (0, 3), (11, 3): (0, 3), (20, 1): (1, 2), (21, 2): (1, 2)}


def test_a_ring_is_that_of_the_devices_scale_unit() -> None:
    node = SimpleNamespace(signature="op")
    setattr(node, rings._RING, (0, 2))
    assert rings.ring_ranks(node, 1, 4) == (0, 2) and rings.ring_ranks(node, 6, 4) == (4, 6)
