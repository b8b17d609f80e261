"""The same training step through nnscaler: `parallelize` cuts the model on the sequence and writes each rank's code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler_ring.annotations.policies import pas_sequence
from nnscaler_ring.annotations.runtime import nnscaler_runtime
from nnscaler_ring.plugin import summed_cross_entropy

from .data import Batch
from .engines import ADAM_EPS, LEARNING_RATE, SEED, Step, StepResult
from .model import Attention, Llama, LlamaConfig

DOCUMENTS = 256
"""Boundaries that a row's `cu_seqlens` is filled up to, with empty documents: nnscaler traces tensors of one shape."""


class Trained(nn.Module):
    """The model and its loss in one module, as nnscaler cuts them together; without arguments, so that it can be rebuilt."""

    attention: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.model = Llama(LlamaConfig(), type(self).attention)

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The sum over the targets of the cross entropy: a sum may be cut, a mean may not."""
        return summed_cross_entropy(self.model(tokens, positions, cu_seqlens), targets)


def build_nnscaler_step(attention: Attention, device: torch.device, row: Batch, stack: ExitStack) -> Step:
    """A step of the model that nnscaler cut; `row` is what it is traced with, `stack` closes its runtime."""
    stack.enter_context(nullcontext() if device.type == "cuda" else nnscaler_runtime(device.type))
    import nnscaler

    nnscaler.init()
    stack.callback(nnscaler.uninit)
    Trained.attention = staticmethod(attention)
    folder = [tempfile.mkdtemp(prefix="train_long_context_") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    world_size = dist.get_world_size()
    config = nnscaler.ComputeConfig(world_size, world_size, trace_strategy="cpu")
    model: Any = nnscaler.parallelize(Trained, inputs_of(row), pas_sequence, config, gen_savedir=folder[0])().to(device)
    optimizer: Any = nnscaler.build_optimizer(model, torch.optim.AdamW, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS)

    def step(batch: Batch) -> StepResult:
        loss = model(**{name: x.to(device) for name, x in inputs_of(batch).items()})
        loss.backward()
        optimizer.sync_shard_grad()
        optimizer.scale_grads(1 / batch.num_targets)
        grad_norm = float(optimizer.clip_gnorm())
        optimizer.step()
        optimizer.zero_grad()
        return StepResult(loss.item() / batch.num_targets, grad_norm)

    return step


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The arguments of `Trained` for a row, its boundaries filled up."""
    bounds = batch.cu_seqlens
    if len(bounds) > DOCUMENTS:
        raise ValueError(f"{len(bounds) - 1} documents in a row: raise DOCUMENTS, which is {DOCUMENTS}")
    filled = torch.cat((bounds, bounds[-1:].expand(DOCUMENTS - len(bounds))))
    return {"tokens": batch.tokens, "targets": batch.targets, "positions": batch.positions, "cu_seqlens": filled}
