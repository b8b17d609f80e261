"""The adapters of torch's own GPU ops, on CPU: calls go through the ops' schemas and meta kernels, results are computed here.

What this cannot show is the ops' own kernels: none has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from nnscaler_ring.core.kernels import Case, choose
from nnscaler_ring.core.kernels import aten as aten_module
from nnscaler_ring.core.kernels.aten import AtenCuda, AtenXpu
from nnscaler_ring.core.kernels.packed import Packing
from tests.releases import attend, check_tensors, cut_lse, differentiate, pad_lse
from tests.test_kernel_adapters import BF16, case, check_all

OLD_FLASH = torch.ops.aten._flash_attention_forward.default._schema.returns[2].name == "philox_seed"
"""That of torch 2.6, flash-attn 2.5: the log-sum-exp of many spans is padded, ``[n, H, rows]``, the random state is two numbers."""


class Ops:
    """``torch.ops.aten`` on CPU: arguments go through the op's schema and its shapes on `meta`; what it gives is computed here."""

    def __init__(self, cudnn_lse_dims: int = 4) -> None:
        self.called: list[str] = []
        self.unshaped: set[str] = set()
        self.dims = cudnn_lse_dims
        self.refused = ""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.aten, name)
        if name.endswith("overrideable") or name.endswith("overrideable_backward"):
            body: Callable[..., Any] = self._overrideable_backward if "backward" in name else self._overrideable
        elif "cudnn" in name:
            body = self._cudnn_backward if "backward" in name else self._cudnn
        elif "flash_attention_" in name and "cpu" not in name:
            body = self._flash_backward if "backward" in name else self._flash
        else:
            return op

        def run(*args: Any, **named: Any) -> Any:
            self.called.append(name)
            meta = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (args, named))
            try:
                shapes = op(*meta[0], **meta[1])
            except NotImplementedError:  # after the schema has been looked at
                if "overrideable" not in name:
                    raise
                self.unshaped.add(name)
                shapes = ()
            if meta[0][0].is_meta and args[0].is_meta:
                return shapes
            if self.refused and self.refused in name:
                raise RuntimeError("cuDNN Frontend error: no such engine")
            results = body(**bound(op, args, named))
            for made, want in zip(results, shapes, strict=False):
                assert not isinstance(want, Tensor) or not isinstance(made, Tensor) or made.numel() == want.numel()
            return results

        run.default = op.default  # type: ignore[attr-defined]
        return run

    def _flash(self, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale,
               window_size_left, window_size_right, **_):  # fmt: skip
        check_tensors(query, key, value)
        window = (window_size_left, 0 if is_causal else window_size_right)
        out, lse = attend(query, key, value, cum_seq_q, cum_seq_k, window, scale, 0.0, nothing=torch.inf)
        if OLD_FLASH:
            lse = lse if cum_seq_q is None else pad_lse(lse, cum_seq_q.diff().tolist())
            state = torch.zeros((), dtype=torch.int64)
        else:
            state = torch.zeros(2, dtype=torch.uint64)
        return out.to(query.dtype), lse, state, state.view(-1)[0], query.new_empty(0)

    def _flash_backward(self, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
                        scale, window_size_left, window_size_right, **_):  # fmt: skip
        check_tensors(grad_out, query, key, value, out)
        if OLD_FLASH and cum_seq_q is not None:
            logsumexp = cut_lse(logsumexp, cum_seq_q.diff().tolist())
        how = (cum_seq_q, cum_seq_k, (window_size_left, window_size_right), scale, 0.0)
        return [x.to(query.dtype) for x in differentiate(grad_out, query, key, value, out, logsumexp, *how)]

    def _cudnn(self, query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale):
        assert attn_bias is None and compute_log_sumexp and (not is_causal or query.shape[2] == key.shape[2])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        check_tensors(q, k, v)
        assert all(map(no_gaps, (q, k, v)))
        out, lse = attend(q, k, v, None, None, (-1, 0 if is_causal else -1), scale, 0.0, nothing=-torch.inf)
        lse = lse.unsqueeze(3) if self.dims == 4 else lse
        return out.to(q.dtype).transpose(1, 2), lse, None, None, q.shape[1], k.shape[1], None, None, None

    def _cudnn_backward(self, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                        cum_seq_k, max_q, max_k, dropout_p, is_causal, scale):  # fmt: skip
        assert attn_bias is None and cum_seq_q is None and cum_seq_k is None and (max_q, max_k) == (query.shape[2], key.shape[2])
        assert logsumexp.dim() == self.dims and philox_seed.dtype == torch.int64
        lse = logsumexp.reshape(logsumexp.shape[:3])
        read = [x.transpose(1, 2) for x in (grad_out, query, key, value, out)]
        assert all(map(no_gaps, read))
        assert read[0].is_contiguous() and read[4].is_contiguous(), "by those of q, k and v alone"
        assert logsumexp.data_ptr() % 16 == 0
        how = (None, None, (-1, 0 if is_causal else -1), scale, 0.0)
        return [x.to(query.dtype).transpose(1, 2) for x in differentiate(*read, lse, *how)]

    def _overrideable(self, query, key, value, attn_bias, dropout_p, is_causal, return_debug_mask, scale):
        """oneDNN's: no log-sum-exp without a gradient; causal is aligned at the first row and key; masks have 4 dims."""
        assert torch.is_grad_enabled() and query.requires_grad and dropout_p == 0.0 and not (is_causal and attn_bias is not None)
        assert attn_bias is None or (attn_bias.dim() == 4 and attn_bias.dtype == query.dtype)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(query, key, value, 0.0, is_causal, attn_mask=attn_bias, scale=scale)
        return out, lse.unsqueeze(3), None, None, query.shape[2], key.shape[2], torch.zeros(()), torch.zeros(()), None

    def _overrideable_backward(self, grad_out, query, key, value, attn_bias, grad_input_mask, out, logsumexp, cum_seq_q, cum_seq_k,
                               max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, scale):  # fmt: skip
        assert query.shape[1] == key.shape[1], "as many key heads as query heads"
        assert logsumexp.shape == (*query.shape[:3], 1) and grad_input_mask == [True, True, True, False]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        read = (grad_out, query, key, value, out, logsumexp.squeeze(3))
        return *flash(*read, 0.0, is_causal, attn_mask=attn_bias, scale=scale), None


def no_gaps(x: Tensor) -> bool:
    """Between batch rows, and strides of a single one that follow from its shape: torch compares them with those of a gradient."""
    return x.stride(0) == x.shape[1] * x.stride(1) if len(x) == 1 else torch.empty_like(x).stride() == x.stride()


def bound(op: Any, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the schema."""
    schema = op.default._schema.arguments
    given = {each.name: each.default_value for each in schema if each.has_default_value()}
    return given | {each.name: x for each, x in zip(schema, args, strict=False)} | named


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Ops:
    made = Ops()
    monkeypatch.setattr(aten_module, "aten", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    choose.cache_clear()
    return made


def test_torchs_flash_attention(ops: Ops) -> None:
    AtenCuda().check(case())
    check_all(AtenCuda())
    assert set(ops.called) == {"_flash_attention_forward", "_flash_attention_backward"}, "short spans are not cuDNN's"


@pytest.mark.parametrize("dims", [3, 4])
def test_cudnn(dims: int, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    ops.dims = dims
    monkeypatch.setattr(aten_module, "_cudnn_lse_dims", lambda: dims)
    monkeypatch.setattr(aten_module, "LONG", 2)
    monkeypatch.setattr(aten_module, "UNIT", 1)
    check_all(AtenCuda(), windows=[(-1, 0), (-1, -1), (2, 1)])
    kinds = {"_scaled_dot_product_cudnn_attention", "_flash_attention_forward"}
    assert set(ops.called) == kinds | {"_scaled_dot_product_cudnn_attention_backward", "_flash_attention_backward"}


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_for_cudnn_have_no_gaps(batch: int) -> None:
    x = torch.randn(batch, 8, 2, 4)
    for rows in (x[:, :4], x[:, 4:], x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        plain = aten_module._plain(rows)
        assert no_gaps(plain) and torch.equal(plain, rows)
        gaps = batch > 1 and rows.numel() < x.numel()
        assert (plain.data_ptr() == rows.data_ptr()) is not gaps, "copied only where there are gaps"


def test_log_sum_exps_of_rows_start_at_16_bytes() -> None:
    """Of one head and one batch row a slice is contiguous as it lies."""
    lse = torch.arange(8.0).view(1, 1, 8)
    for start in range(8):
        rows = Packing(np.array([[start, 8, 0, 8]]), torch.empty(1, 8, 1, 8)).columns(lse)
        assert rows.data_ptr() % 16 == lse.data_ptr() % 16 and torch.equal(rows, lse[:, :, start:])


@pytest.mark.parametrize("refused", ["cudnn_attention", "cudnn_attention_backward"])
def test_what_cudnn_refuses_is_flash_attentions_from_then_on(refused: str, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call, once refused, must not be made again."""
    for name, value in {"LONG": 2, "UNIT": 1, "_REFUSED": list[str]()}.items():
        monkeypatch.setattr(aten_module, name, value)
    ops.refused = refused
    with pytest.warns(UserWarning, match="cuDNN refused a call, FlashAttention-2 is used from now on: cuDNN Frontend error"):
        check_all(AtenCuda(), windows=[(-1, -1)])
    assert sum(refused in name for name in ops.called) == 1
    monkeypatch.setattr(aten_module, "_REFUSED", [])
    ops.refused, ops._cudnn = "", mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access"))  # type: ignore
    with pytest.raises(RuntimeError, match="illegal memory"):
        check_all(AtenCuda(), windows=[(-1, -1)])


def test_what_is_cudnns(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long full spans, and causal ones of as many rows as keys, where it is the faster one and says that it can."""
    release, dims = TorchVersion(torch.__version__), aten_module._cudnn_lse_dims()
    known = {3} if release < "2.7" else {4} if release >= "2.11" else {3, 4}
    assert dims in known, "releases from 2.7 to 2.10 were not tried"
    q, long, full, causal = torch.empty(1, 1, 1, 128, device="meta"), (4096, 4096), (-1, -1), (-1, 0)
    suits = aten_module.suits_cudnn
    assert suits(q, long, full, False) and suits(q, long, causal, False) and suits(q, (2048, 4096), full, False)
    assert not suits(q, (2048, 4096), causal, False), "it is aligned at the first row"
    assert not suits(q, long, full, True), "not deterministic"
    assert not suits(q, (4096, 4160), full, False) and not suits(q, (2050, 2050), causal, False), "each size is prepared anew"
    assert not suits(q, long, (1024, 0), False) and not suits(q, (1, 4096), full, False)
    assert not suits(torch.empty(1, 1, 1, 136, device="meta"), long, full, False)
    for where, name, instead in (
        (torch.cuda, "get_device_capability", lambda *_: (8, 0)),
        (torch.backends.cudnn, "version", lambda: 90100),
        (torch.backends.cuda, "cudnn_sdp_enabled", lambda: False),
        (torch.version, "hip", "6.4"),
    ):
        with monkeypatch.context() as here:
            here.setattr(where, name, instead)
            assert not suits(q, long, full, False), name


def test_torchs_xpu_ops(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Case("xpu", BF16, 64, 64, 4, 2)
    with pytest.raises(NotImplementedError, match=r"has no aten::_scaled_dot_product_fused_attention_overrideable on xpu"):
        AtenXpu().check(asked)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "backward" not in name and key == "XPU"
    )
    with pytest.raises(NotImplementedError, match=r"has no aten::_scaled_dot_product_fused_attention_overrideable_backward on xpu"):
        AtenXpu().check(asked)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key == "XPU")
    AtenXpu().check(asked)
    for wrong, said in ((torch.float64, "not torch.float64"), (BF16, "same bits")):
        with pytest.raises(NotImplementedError, match=said):
            AtenXpu().check(Case("xpu", wrong, 64, 64, 4, 2, deterministic=wrong is BF16))
    check_all(AtenXpu(), torch.float32)
    check_all(AtenXpu(), windows=[(-1, 0), (2, 1)])
    assert set(ops.called) == {
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_fused_attention_overrideable_backward",
    }
    if ops.unshaped:
        pytest.skip(f"its shapes need {' and '.join(sorted(ops.unshaped))} on meta, which torch {torch.__version__} lacks")


def test_deterministic_calls_leave_the_setting_as_it_was() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with aten_module._deterministic(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_wide_values_are_refused_too() -> None:
    with pytest.raises(NotImplementedError, match="up to 256"):
        AtenCuda().check_sizes(Case("cuda", torch.bfloat16, 64, 264, 4, 4))
