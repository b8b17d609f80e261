"""Who runs a training step: one device, or a mesh through DTensor.

An engine is a function that builds a `Step`. Every engine starts from the same weights, because each seeds the same
generator, and takes the same batches; so their losses can be compared step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from .data import Batch
from .model import Attention, Llama, LlamaConfig, next_byte_loss

SEED = 0
LEARNING_RATE = 4e-3
ADAM_EPS = 1e-6
"""Well above the rounding of a gradient: with a smaller one AdamW turns the noise of an all but zero gradient into a full
update, and two runs that differ in the last bit would drift apart."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports: the loss before its update, in nats per byte, and the global norm of the gradient."""

    loss: float
    grad_norm: float


Step = Callable[[Batch], StepResult]
"""Trains on one batch, the whole row, which every rank of the engine is given."""


def build_single_device_step(attention: Attention, device: torch.device) -> Step:
    """The reference: plain tensors, one device, no communication."""
    model = _seeded_model(attention, device)
    optimizer = _optimizer(model)

    def step(batch: Batch) -> StepResult:
        loss = _backward(model, optimizer, _place(batch, lambda tensor: tensor.to(device)))
        grad_norm = nn.utils.get_total_norm(_gradients(model))
        optimizer.step()
        return StepResult(loss.item(), grad_norm.item())

    return step


def build_dtensor_step(attention: Attention, device: torch.device, mesh: DeviceMesh) -> Step:
    """The same model and row as DTensors on a mesh of one axis: parameters replicated, the sequence dim sharded."""
    model = distribute_module(_seeded_model(attention, device), mesh)
    optimizer = _optimizer(model)

    def shard(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.to(device), mesh, [Shard(1)])

    def step(batch: Batch) -> StepResult:
        loss = _backward(model, optimizer, _place(batch, shard))
        for parameter in model.parameters():  # each rank has the gradient of its shard of the row: sum them, once
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        grad_norm = nn.utils.get_total_norm(_gradients(model))
        optimizer.step()
        return StepResult(loss.full_tensor().item(), grad_norm.full_tensor().item())

    return step


def _seeded_model(attention: Attention, device: torch.device) -> Llama:
    torch.manual_seed(SEED)
    return Llama(LlamaConfig(), attention).to(device)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS)


def _place(batch: Batch, along_sequence: Callable[[Tensor], Tensor]) -> Batch:
    """The batch where the model is: its ``[1, S]`` tensors by `along_sequence`; ``cu_seqlens`` stays, whole, on the host."""
    return replace(batch, **{name: along_sequence(getattr(batch, name)) for name in ("tokens", "targets", "positions")})


def _backward(model: Llama, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad()
    logits = model(batch.tokens, batch.positions, batch.cu_seqlens)
    loss = next_byte_loss(logits, batch.targets, batch.num_targets)
    loss.backward()
    return loss.detach()


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]
