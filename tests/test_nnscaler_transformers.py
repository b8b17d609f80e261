"""transformers models that nnscaler cuts on the sequence, and on heads, trained against one device: loss and all gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnscaler_ring import wrap_ring_attn_func, wrap_zigzag_attn_func
from nnscaler_ring.integrations.transformers import Attention
from nnscaler_ring.plugin import summed_cross_entropy
from tests.distributed import run_ranks
from tests.test_nnscaler_runtime import needs_nnscaler
from tests.test_nnscaler_training import BATCH, SEQ, Run, all_trained, batch

pytest.importorskip("transformers", "4.48", reason="needs transformers >= 4.48")
from tests.test_transformers import build, has


class Llama(nn.Module):
    """A model in float64 and a summed loss over its tokens."""

    family, op, inputs = "llama", staticmethod(wrap_ring_attn_func), staticmethod(batch)

    def __init__(self) -> None:
        super().__init__()
        self.model = build(self.family, use_cache=False)
        Attention(self.op, type(self).__name__).apply(self.model)
        self.register_buffer("documents", torch.tensor([0, 5, 6, SEQ], dtype=torch.int32))

    def told(self) -> dict[str, Tensor]:
        """Besides tokens and positions."""
        return {}

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False, **self.told()).logits
        return summed_cross_entropy(logits, labels) / (BATCH * SEQ)


class Packed(Llama):
    """Three documents in a row."""

    def told(self) -> dict[str, Tensor]:
        return {"cu_seq_lens_q": self.documents}


class Mistral(Llama):
    family = "mistral"


class Qwen3(Llama):
    family, op = "qwen3", staticmethod(wrap_zigzag_attn_func)


class Gemma2(Llama):
    family = "gemma2"


class Gemma3(Llama):
    family = "gemma3"


MODELS = [model for model in (Llama, Packed, Mistral, Qwen3, Gemma2, Gemma3) if has(model.family)]
RUNS = [Run(model, parts=parts) for model in MODELS for parts in ({}, {"heads": 2})]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("transformers")
    return run_ranks(all_trained, 2, RUNS, folder, timeout=900)


class TestTraining:
    pytestmark = needs_nnscaler

    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
    def test_models(self, found: list[dict[str, Any]], run: Run) -> None:
        for each in found:
            assert "error" not in each[run.name], each[run.name]["error"]
            assert each[run.name]["loss"] < 1e-6 and each[run.name]["grads"] < 1e-5
            assert "_attention(" in each[run.name]["code"], "the op is in the code that ran"
