"""The ops as nnscaler sees them: annotations from shapes, and every way to cut each op, on two ranks against one device."""

from __future__ import annotations

import inspect
import itertools
import logging
import subprocess
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnscaler_ring
from nnscaler_ring import plugin
from nnscaler_ring.annotations import nnscaler as adapter
from nnscaler_ring.annotations.nnscaler import annotation
from nnscaler_ring.annotations.runtime import nnscaler_runtime
from nnscaler_ring.annotations.spec import SPECS
from nnscaler_ring.core.transport import PretendTransport
from tests.distributed import run_ranks
from tests.test_nnscaler_runtime import needs_nnscaler, under_torchrun

DENSE, PACKED = SPECS["wrap_ring_attn_func"], SPECS["wrap_ring_attn_varlen_func"]


# -- without nnscaler ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "words"),
    [((4, 4), ("h", "h", "h")), ((4, 2), ("(h 2)", "h", "(h 2)")), ((4, 1), ("h", "1", "h")), ((1, 1), ("h", "h", "h"))],
)
def test_annotation_of_heads(heads: tuple[int, int], words: tuple[str, str, str]) -> None:
    q, k, out = words
    shapes = {"q": (2, 16, heads[0], 8), "k": (2, 16, heads[1], 8), "v": (2, 16, heads[1], 6), "cu_seqlens": None}
    assert annotation(DENSE, shapes) == f"b l {q} d^, b l {k} d^, b l {k} e^, ? -> b l {out} e^"
    assert annotation(DENSE, shapes, lse=True) == f"b l {q} d^, b l {k} d^, b l {k} e^, ? -> b l {out} e^, b {out} l"


def test_annotation_of_packed_rows() -> None:
    shapes = {"q": (16, 4, 8), "k": (16, 4, 8), "v": (16, 4, 8), "cu_seqlens_q": (3,), "cu_seqlens_k": (3,)}
    assert annotation(PACKED, shapes, lse=True) == "l h d^, l h d^, l h e^, n3x0^, n4x0^ -> l h e^, h l"


def test_annotation_where_keys_are_of_another_number() -> None:
    shapes = {"q": (16, 4, 8), "k": (24, 4, 8), "v": (24, 4, 8), "cu_seqlens_q": (3,), "cu_seqlens_k": (3,)}
    assert annotation(PACKED, shapes) == "l h d^, m^ h d^, m^ h e^, n3x0^, n4x0^ -> l h e^"


@pytest.mark.parametrize("op", plugin.OPS, ids=lambda op: op.function.__name__)
def test_ops_are_found_where_generated_code_imports_them(op: adapter.Op) -> None:
    module, _, name = op.signature.rpartition(".")
    assert getattr(sys.modules[module], name) is op.function
    parameters = inspect.signature(op.function).parameters
    if op.sequence:
        assert parameters["process_group"].default is None and parameters["ring_size"].default == 1


def test_boundaries_are_of_the_whole_row() -> None:
    assert adapter.boundaries(4, 10).tolist() == [0, 3, 6, 10]
    assert adapter.boundaries(2, 7).dtype == torch.int32


def test_nothing_is_traced_without_a_tracer() -> None:
    assert not adapter.tracing()


@pytest.mark.parametrize(
    "name", ["wrap_ring_attn_func", "wrap_zigzag_attn_func", "wrap_stripe_attn_func", "wrap_ulysses_attn_func"]
)
def test_a_piece_without_its_ring_does_one_rank_s_work(name: str) -> None:
    q, k, v = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3))
    whole = nnscaler_ring.ops.dense_attention(q, k, v, op=name)
    piece = nnscaler_ring.ops.dense_attention(q, k, v, op=name, ring_size=4)
    assert isinstance(piece, Tensor) and isinstance(whole, Tensor)
    assert piece.shape == whole.shape and piece.isfinite().all()
    piece.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_zeros_arrive_where_ranks_are_pretended() -> None:
    from nnscaler_ring.core.transport import Exchange, Walk

    def walk() -> Walk:
        got = torch.ones(2)
        wait = yield Exchange([(0, torch.ones(2))], [(0, got)])
        wait()
        return got

    assert PretendTransport(2, 1).run([walk()])[0].tolist() == [0.0, 0.0]


def test_a_broken_nnscaler_is_warned_of_and_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "nnscaler.py").write_text("raise OSError('no libcuda')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import nnscaler_ring; print(nnscaler_ring.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == nnscaler_ring.__version__
    assert "nnscaler is installed, but no op was registered: OSError('no libcuda')" in done.stderr


def test_shuffles_and_status_on_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    rows, cu = torch.arange(8.0).view(8, 1), torch.tensor([0, 3, 8], dtype=torch.int32)
    for shuffle in (plugin.wrap_maybe_shuffle, plugin.wrap_maybe_unshuffle, plugin.shuffle_varlen, plugin.unshuffle_varlen):
        assert torch.equal(shuffle(rows, cu), rows)
    with pytest.raises(NotImplementedError, match="enable_ring=False"):
        plugin.wrap_maybe_shuffle(rows, cu, enable_ring=False)
    plugin.print_transformer_engine_status()
    assert "required_version: 2.2.0+" in capsys.readouterr().out


@pytest.mark.parametrize(
    "version, good",
    [("", False), ("2.1.9", False), ("2.2rc1", False), ("2.2", True), ("2.2.0+cu12", True), ("2.3rc1", True), ("2.10.0", True)],
)
def test_versions_of_transformer_engine(version: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if not version:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    found = plugin.get_transformer_engine_info()
    named = found["has_transformer_engine"], found["version_ok"], found["version"]
    assert named == (bool(version), good, version or None)


# -- every cut, on two ranks -----------------------------------------------------------------------------------------------------

B, S, D = 2, 16, 4
TABLE = [0, 6, 16]


class Dense(nn.Module):
    """One op between linear maps, so that its inputs and outputs have gradients."""

    heads_k, packed = 2, False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, n * D).double() for n in (4, self.heads_k, self.heads_k))

    def forward(self, x: Tensor, cu: Tensor) -> Tensor:
        q = self.q(x).view(B, S, 4, D)
        k, v = self.k(x).view(B, S, self.heads_k, D), self.v(x).view(B, S, self.heads_k, D)
        return self.op(q, k, v, cu).pow(2).sum()

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_func(q, k, v)


class DenseMqa(Dense):
    heads_k = 1


class RingPacked(Dense):
    packed = True

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_func(q, k, v, causal=False, softmax_scale=0.3, cu_seqlens=cu)


class RingLse(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        out, lse, _ = nnscaler_ring.wrap_ring_attn_func(q, k, v, return_attn_probs=True)
        return out * lse.transpose(1, 2).unsqueeze(3)


class ZigzagNatural(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_zigzag_attn_func(q, k, v)


class StripeNatural(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_stripe_attn_func(q, k, v, window_size=(5, 0))


class Ulysses(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ulysses_attn_func(q, k, v)


class Sliding(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_sliding_window_attn_func(q, k, v, 3)


class Streaming(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_streaming_llm_attn_func(q, k, v, 3, 1)


class Varlen(Dense):
    packed = True

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_varlen_func(q[0], k[0], v[0], cu, cu, causal=True)


class Featured(Dense):
    """Tensors besides q, k and v, of which one is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1]).double())
        self.slopes = nn.Buffer(torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_zigzag_attn_func(q, k, v, alibi_slopes=self.slopes, learnable_sink=self.sink, softcap=2.0)


class FeaturedPacked(Dense):
    packed = True

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1]).double())
        self.bias = nn.Parameter(torch.randn(4, S, S).double())

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_varlen_func(
            q[0], k[0], v[0], cu, cu, causal=True, learnable_sink=self.sink, bias=self.bias
        )


class Piecewise(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_piecewise_attn_func(q, k, q * 0.5, k * 2.0, v, 5, True)


class Shuffled(Dense):
    """Zigzag order document by document, into it and back."""

    packed = True

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        q, k, v = (plugin.wrap_maybe_shuffle(x, cu) for x in (q[0], k[0], v[0]))
        out = plugin.wrap_zigzag_allgather_attn_varlen_func(q, k, v, cu, cu, causal=True)
        return plugin.wrap_maybe_unshuffle(out, cu)


MODELS = [Dense, DenseMqa, RingPacked, RingLse, ZigzagNatural, StripeNatural, Ulysses, Sliding, Streaming, Varlen, Featured]
MODELS += [FeaturedPacked, Piecewise, Shuffled]
DENSE_CUTS = [(idx, dim) for idx in range(3) for dim in range(3)]
PACKED_CUTS = [(idx, dim) for idx in range(3) for dim in range(2)]


def cuts_of(model: type[Dense]) -> list[tuple[int, int]]:
    """Every (input, dim) of the op that may be cut."""
    if model is Shuffled:
        return [(0, 0)]  # its four ops at one place
    cuts = PACKED_CUTS if model in (Varlen, FeaturedPacked) else DENSE_CUTS
    return [(idx, dim) for idx, dim in cuts if not (model is DenseMqa and idx > 0 and dim == 2)]


def cut_the_op(idx: int, dim: int, spaces: list[set[tuple[int, int]]], but: str = "") -> Any:
    """A policy that cuts the registered ops (`but` one) at one place and replicates all else; notes what the ops allow."""

    def policy(graph: Any, config: Any) -> Any:
        from nnscaler.ir.operator import IRFwOperation
        from nnscaler.policies import auto_multiref

        auto_multiref(graph)
        for node in graph.select(ntype=IRFwOperation):
            if node.name == "multiref":
                continue
            if node.signature.startswith("nnscaler_ring.") and node.name != but:
                spaces.append(set(node.transform_space()))
                pieces = graph.partition(node, node.algorithm("dim"), idx=idx, dim=dim, num=2)
            else:
                pieces = graph.replicate(node, times=2)
            for device, piece in enumerate(pieces):
                graph.assign(piece, device)
        return graph

    return policy


def every_cut(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """For each model and cut the worst relative error of loss and gradients, or what was raised."""
    torch.set_num_threads(1)
    under_torchrun(rank, world_size)
    found: dict[str, Any] = {}
    with nnscaler_runtime("cpu"):
        import nnscaler

        logging.disable(logging.WARNING)
        nnscaler.init()
        for model in MODELS:
            spaces: list[set[tuple[int, int]]] = []
            for idx, dim in cuts_of(model):
                name = f"{model.__name__}_{idx}_{dim}"
                try:
                    found[name] = error_of(model, cut_the_op(idx, dim, spaces), directory, name)
                except RuntimeError as error:
                    found[name] = repr(error.__cause__ or error)
            found[model.__name__] = spaces[0] if spaces else set()  # only the first rank generates code
        nnscaler.uninit()
    return found


def error_of(model: type[Dense], policy: Any, directory: Path, name: str) -> float:
    import nnscaler

    inputs = {"x": torch.randn(B, S, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    inputs["cu"] = torch.tensor(TABLE, dtype=torch.int32)
    config = nnscaler.ComputeConfig(2, 2, trace_strategy="cpu")
    where = {"gen_savedir": str(directory), "instance_name": name}
    cut = nnscaler.parallelize(model, inputs, policy, config, **where)()
    loss = cut(**inputs) if model.packed else cut(x=inputs["x"], cu=None)  # 0.8 refuses what the model does not read
    loss.backward()
    cut.sync_grad()
    reference = model()
    expected = reference(**inputs)
    expected.backward()
    full, whole = getattr(cut, "fullmap"), dict(reference.named_parameters())  # noqa: B009
    pairs = [(loss.detach(), expected.detach())]
    for name, x in cut.named_parameters():  # of a parameter that is cut with an op this rank has a part
        grad = whole[full[name].orig_name].grad
        assert x.grad is not None and grad is not None
        pairs.append((x.grad, grad[full[name].slicers]))
    return max(float((have - want).abs().max() / want.abs().max().clamp_min(1e-3)) for have, want in pairs)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(every_cut, 2, tmp_path_factory.mktemp("cuts"), timeout=900)


class OfAGroup(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_func(q, k, v, process_group=(0,))


class OfNoKernel(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_func(q, k, v, kernel="no such kernel")


class OfAShape(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_sliding_window_attn_func(q, k, v, q.shape[1] // 4)


class OfALength(Dense):
    packed = True

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        most = {"max_seqlen_q": q.shape[1], "causal": True}
        return plugin.wrap_zigzag_allgather_attn_varlen_func(q[0], k[0], v[0], cu, cu, **most)


class OfATensor(Dense):
    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_func(q, k, v, q.flatten()[0])


class OfTraining(Dense):
    """Traced as it evaluates, when no weight is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def op(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nnscaler_ring.wrap_ring_attn_func(q, k, v, dropout_p=0.5 if self.training else 0.0, dropout_seed=3)


def refuse(rank: int, world_size: int, directory: Path) -> list[str]:
    """What is said of models while code is generated for them."""
    said = []
    with nnscaler_runtime("cpu"):
        import nnscaler

        for model in (OfAGroup, OfNoKernel, OfAShape, OfALength, OfATensor, OfTraining, Shuffled):
            inputs = {"x": torch.zeros(B, S, 8, dtype=torch.float64), "cu": torch.tensor(TABLE, dtype=torch.int32)}
            config = nnscaler.ComputeConfig(2, 2, trace_strategy="cpu")
            policy = cut_the_op(0, 0 if model.packed else 1, [], but="shuffled_rows")
            try:
                nnscaler.parallelize(model, inputs, policy, config, gen_savedir=directory, load_module=False)
            except Exception:
                said.append(traceback.format_exc())
    return said


class TestCuts:
    pytestmark = needs_nnscaler

    def test_what_a_compiler_would_drop_or_find_late_is_refused(self, tmp_path: Path) -> None:
        group, kernel, shape, length, tensor, training, order = run_ranks(refuse, 1, tmp_path)[0]
        assert "process_group=(0,) in a model that is cut: leave it out" in group
        assert "unknown kernel 'no such kernel'" in kernel
        assert "window_size is computed from shapes, tensors or self.training" in shape
        assert "max_seqlen_q is computed from shapes, tensors or self.training" in length
        assert "softmax_scale is computed from shapes, tensors" in tensor
        assert "dropout_p is computed from shapes, tensors or self.training" in training
        assert "cut in other numbers of parts" in order

    @pytest.mark.parametrize("model", MODELS)
    def test_two_ranks_have_the_numbers_of_one(self, cuts: list[dict[str, Any]], model: type[Dense]) -> None:
        for found, (idx, dim) in itertools.product(cuts, cuts_of(model)):
            assert found[f"{model.__name__}_{idx}_{dim}"] < 1e-9, (idx, dim)

    @pytest.mark.parametrize("model", [model for model in MODELS if model is not Shuffled])
    def test_no_cut_is_left_out(self, cuts: list[dict[str, Any]], model: type[Dense]) -> None:
        each_once = {(idx, dim) for idx, dim in cuts_of(model) if idx == 0}  # nnscaler names a cut by its first tensor
        assert cuts[0][model.__name__] == each_once


def test_slopes_of_one_batch_row_are_not_cut_with_it() -> None:
    shapes = {"q": (2, 16, 4, 8), "k": (2, 16, 4, 8), "v": (2, 16, 4, 8), "cu_seqlens": None, "alibi_slopes": (1, 4)}
    assert annotation(SPECS["wrap_ring_attn_func"], shapes) == "b l h d^, b l h d^, b l h e^, ?, 1 h -> b l h e^"
