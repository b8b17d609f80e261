"""nnscaler on CPU and gloo: what is patched, that it is put back, and a training run against one device."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring.annotations import runtime
from nnscaler_ring.annotations.runtime import nnscaler_runtime
from tests.distributed import run_ranks

needs_nnscaler = [pytest.mark.nnscaler, pytest.mark.filterwarnings("ignore")]  # nnscaler's own are not ours to mend


def test_without_nnscaler_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nnscaler", None)
    with pytest.raises(ImportError, match=r"nnscaler is not installed.*github\.com.*--no-deps"), nnscaler_runtime():
        pass


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match=r"device='cuda': allowed are \['cpu', 'xpu'\]"), nnscaler_runtime("cuda"):
        pass


def test_xpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no XPU"), nnscaler_runtime("xpu"):
        pass


def running_mean(x: torch.Tensor) -> torch.Tensor:
    """A registered op whose sequence dim may not be cut."""
    steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    return x.cumsum(1) / steps.view(1, -1, 1)


@functools.cache
def register() -> None:
    import nnscaler

    nnscaler.register_op("b l^ d -> b l^ d")(running_mean)


class Mlp(torch.nn.Module):
    autocast = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.arange(x.shape[1], device=x.device).view(1, -1, 1)  # the device that the tracer tells
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            x = self.down(torch.nn.functional.gelu(self.up(x)))
        return running_mean(x.float()).pow(2).mean()


class AutocastMlp(Mlp):
    autocast = True


def cut_batch(graph: Any, config: Any) -> Any:
    """The batch of the registered op is cut, everything else replicated: its adapters scatter and gather."""
    from nnscaler.ir.operator import IRFwOperation
    from nnscaler.policies import auto_multiref

    auto_multiref(graph)
    for node in graph.select(ntype=IRFwOperation):
        if node.name == "multiref":
            continue
        if node.signature.endswith(".running_mean"):
            pieces = graph.partition(node, node.algorithm("dim"), idx=0, dim=0, num=config.plan_ngpus)
        else:
            pieces = graph.replicate(node, times=config.plan_ngpus)
        for device, piece in enumerate(pieces):
            graph.assign(piece, device)
    return graph


def parallelized(model: type[Mlp], directory: Path, plan: int, runtime: int, **options: Any) -> Any:
    import nnscaler

    register()
    config = nnscaler.ComputeConfig(plan, runtime, trace_strategy="cpu", use_zero=options.pop("use_zero", 0))
    # A name of its own: nnscaler puts each directory on sys.path, where the first module of a name wins, for spawned
    # processes too.
    where = {"gen_savedir": str(directory), "instance_name": directory.name}
    return nnscaler.parallelize(model, {"x": torch.randn(4, 6, 8)}, cut_batch, config, **where, **options)


def patched() -> list[Any]:
    """What the block replaces, as it is now."""
    from nnscaler.codegen.module.module import ModuleCodeGen
    from nnscaler.graph.tracer import wrap_utils
    from nnscaler.graph.tracer.concrete_proxy import ConcreteAttrProxy
    from nnscaler.graph.tracer.metadata import AutocastInfo
    from nnscaler.graph.tracer.torch_fx_patcher import TorchFXPatcher
    from nnscaler.profiler import database

    owners = (torch.cuda, torch.Tensor, torch.nn.Module, dist, wrap_utils, database)
    classes = (ModuleCodeGen, ConcreteAttrProxy, AutocastInfo, TorchFXPatcher)
    return [dict(vars(each)) for each in owners + classes]


@pytest.mark.parametrize("model", [Mlp, AutocastMlp])
class TestCodeGeneration:
    pytestmark = needs_nnscaler

    def test_all_ranks_in_one_process(self, model: type[Mlp], tmp_path: Path) -> None:
        with nnscaler_runtime("cpu"):
            parallelized(model, tmp_path, plan=2, runtime=4, load_module=False)
        codes = [path.read_text() for path in sorted(tmp_path.rglob("gencode*.py"))]
        assert len(codes) == 4
        for code in codes:
            assert f"{__name__}.running_mean(" in code
            assert "device_type='cuda'" not in code
            assert f"torch.autocast(device_type='cpu', dtype=torch.bfloat16, enabled={model.autocast}" in code


class TestPatches:
    pytestmark = needs_nnscaler

    def test_are_put_back_also_after_an_error(self) -> None:
        with nnscaler_runtime("cpu"):
            pass  # what is imported for the first time in the block stays imported
        before = patched()
        with pytest.raises(KeyError), nnscaler_runtime("cpu") as applied:
            assert "torch_cuda" in applied
            assert patched() != before
            raise KeyError
        assert patched() == before

    def test_cuda_calls_mean_the_cpu(self) -> None:
        with nnscaler_runtime("cpu"):
            assert torch.cuda.current_device() == torch.device("cpu")
            torch.cuda.set_device(3)
            torch.cuda.synchronize()
            assert torch.cuda.get_device_properties(0).total_memory > 0
            assert torch.cuda.max_memory_allocated() == 0
            assert torch.ones(1).cuda().device.type == "cpu"
            assert torch.ones(1).pin_memory().device.type == "cpu"
            assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"

    def test_cuda_calls_mean_the_xpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen: list[int] = []
        monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
        monkeypatch.setattr(torch.xpu, "current_device", lambda: chosen[-1])
        monkeypatch.setattr(torch.xpu, "set_device", chosen.append)
        with nnscaler_runtime("xpu"):
            torch.cuda.set_device(1)
            assert torch.cuda.current_device() == torch.device("xpu", 1)
            assert torch.cuda.Stream is torch.xpu.Stream
        assert torch.cuda.Stream is not torch.xpu.Stream

    def test_0_8_needs_more_on_a_newer_torch_than_0_9(self) -> None:
        import nnscaler

        with nnscaler_runtime("cpu") as applied:
            fixed_since = {"fx_purity"} if nnscaler.__version__ == "0.8" and torch.__version__ >= "2.8" else set()
        assert {"fx_purity"} & set(applied) == fixed_since


def under_torchrun(rank: int, world_size: int) -> None:
    """nnscaler asks torchrun's environment where it is."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()} | {"TORCHELASTIC_RUN_ID": "test"})


RUNS = [(Mlp, 2, 0), (Mlp, 1, 1), (Mlp, 1, 3), (AutocastMlp, 2, 1)]
"""(model, plan_ngpus, ZeRO stage) on two ranks."""


def train(rank: int, world_size: int, directory: Path) -> list[list[tuple[float, ...]]]:
    """(loss, gradient norm, both of the same model on one device) of three steps of each run."""
    under_torchrun(rank, world_size)
    with nnscaler_runtime("cpu"):
        import nnscaler

        nnscaler.init()
        trained = []
        for index, (cls, plan, use_zero) in enumerate(RUNS):
            model = parallelized(cls, directory / f"run{index}", plan, world_size, use_zero=use_zero)()
            trained.append(train_one(model, cls(), plan / world_size))
        nnscaler.uninit()
        return trained


def train_one(model: Any, reference: torch.nn.Module, scale: float) -> list[tuple[float, ...]]:
    import nnscaler

    optimizer = nnscaler.build_optimizer(model, torch.optim.AdamW, lr=0.01)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    steps = []
    for x in torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(1)):
        loss = model(x)
        loss.backward()
        optimizer.sync_shard_grad()
        optimizer.scale_grads(scale)  # every scale unit sees the same batch here
        norm = optimizer.clip_gnorm(0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected = reference(x)
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        steps.append(tuple(float(value) for value in (loss, norm, expected, expected_norm)))
    return steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[tuple[float, ...]]]]:
    """What `train` returned on each of two ranks."""
    return run_ranks(train, 2, tmp_path_factory.mktemp("trained"))


class TestTraining:
    pytestmark = needs_nnscaler

    @pytest.mark.parametrize("index", range(len(RUNS)))
    def test_two_ranks_follow_one_device(self, trained: list[list[list[tuple[float, ...]]]], index: int) -> None:
        tolerance = 1e-2 if RUNS[index][0] is AutocastMlp else 1e-5
        for rank in trained:
            for *values, expected, expected_norm in rank[index]:
                assert values == pytest.approx([expected, expected_norm], rel=tolerance)


def collect(rank: int, world_size: int) -> list[tuple[list[float], list[list[float]]]]:
    """reduce_scatter and all_to_all by gloo itself where it has them, then where it refuses."""

    def refusing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("ProcessGroupGloo does not support this")

    found = []
    for refuse in (False, True):
        if refuse:  # as gloo of torch 2.6 does by itself
            dist.reduce_scatter = dist.all_to_all = refusing
        with nnscaler_runtime("cpu"):
            rows = list((torch.arange(6.0) + 10 * rank).view(3, 2))
            reduced, arrived = torch.empty(2), [torch.empty(2) for _ in rows]
            dist.reduce_scatter(reduced, rows)
            dist.all_to_all(arrived, rows)
            found.append((reduced.tolist(), [row.tolist() for row in arrived]))
    return found


class TestCollectives:
    pytestmark = needs_nnscaler

    def test_that_gloo_of_torch_2_6_lacks(self) -> None:
        for rank, found in enumerate(run_ranks(collect, 3)):
            reduced = [6.0 * rank + 30, 6.0 * rank + 33]
            arrived = [[2.0 * rank + 10 * source, 2.0 * rank + 1 + 10 * source] for source in range(3)]
            assert found == [(reduced, arrived)] * 2


def test_a_lost_connection_is_not_an_op_that_gloo_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    for name in ("reduce_scatter", "all_to_all"):
        monkeypatch.setattr(dist, name, gone)
    for name in ("reduce_scatter_tensor", "all_to_all_single"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: None)
    x = torch.zeros(2)
    for swap in runtime._gloo_collectives("cpu"):
        with pytest.raises(RuntimeError, match="Connection closed"):
            swap.value(x if swap.name == "reduce_scatter" else [x], [x])


def test_groups_are_made_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: seen.append((args, kwargs)))
    (swap,) = runtime._process_group("cpu")
    swap.value("nccl", device_id=0, rank=0)
    assert seen == [(("gloo",), {"rank": 0})]


def test_what_is_swapped_comes_back_as_it_was() -> None:
    class Base:
        made = staticmethod(int)

    class Derived(Base):
        pass

    with contextlib.ExitStack() as stack:
        runtime._apply(stack, runtime.Swap(Base, "made", float))
        runtime._apply(stack, runtime.Swap(Derived, "made", str))
    assert isinstance(vars(Base)["made"], staticmethod) and "made" not in vars(Derived)


def test_tensors_for_a_gpu_are_made_on_the_cpu() -> None:
    assert runtime._Redirected("cpu").zeros(2, device="cuda").device.type == "cpu"
