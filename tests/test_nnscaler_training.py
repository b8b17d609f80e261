"""Models that nnscaler cuts, trained on a few ranks of gloo against one device: loss and all gradients."""

from __future__ import annotations

import logging
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nnscaler_ring
from nnscaler_ring.annotations.policies import cut, pas_sequence
from nnscaler_ring.annotations.runtime import nnscaler_runtime
from nnscaler_ring.core import layouts
from nnscaler_ring.plugin import (
    summed_cross_entropy,
    wrap_maybe_shuffle,
    wrap_maybe_unshuffle,
    wrap_zigzag_allgather_attn_varlen_func,
)
from tests.distributed import run_ranks
from tests.test_nnscaler_runtime import needs_nnscaler, under_torchrun

BATCH, SEQ, DIM, HEADS, HEADS_K, VOCAB = 2, 16, 16, 4, 2, 32


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[B, S, H, D]`` with rotary positions."""
    early, late = x.chunk(2, dim=3)
    return x * cos + torch.cat((-late, early), dim=3) * sin


class Layer(nn.Module):
    """Attention with grouped heads, and a gated MLP."""

    def __init__(self, attention: str, heads_k: int) -> None:
        super().__init__()
        self.attention, self.heads_k = attention, heads_k
        head = DIM // HEADS
        self.norm1, self.norm2 = Norm(), Norm()
        self.q, self.k, self.v = (nn.Linear(DIM, heads * head, bias=False) for heads in (HEADS, heads_k, heads_k))
        self.o = nn.Linear(DIM, DIM, bias=False)
        if attention == "sinks":
            self.sink = nn.Parameter(torch.randn(HEADS))
        if attention == "adapted":
            self.wide, self.narrow = nn.Parameter(torch.randn(DIM, 2)), nn.Parameter(torch.randn(2, DIM))
        self.gate, self.up, self.down = nn.Linear(DIM, 24), nn.Linear(DIM, 24), nn.Linear(24, DIM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q = nn.functional.linear(h, self.q.weight + self.wide @ self.narrow) if self.attention == "adapted" else self.q(h)
        q = q.view(BATCH, -1, HEADS, DIM // HEADS)
        k = self.k(h).view(BATCH, -1, self.heads_k, DIM // HEADS)
        v = self.v(h).view(BATCH, -1, self.heads_k, DIM // HEADS)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if self.attention == "window":
            y = nnscaler_ring.wrap_sliding_window_attn_func(q, k, v, 3)
        elif self.attention == "zigzag in order":
            y = nnscaler_ring.wrap_zigzag_attn_func(q, k, v, layout="zigzag")
        elif self.attention == "sinks":
            y = nnscaler_ring.wrap_ring_attn_func(q, k, v, 0.7 / math.sqrt(q.size(-1)), learnable_sink=self.sink)
        elif self.attention == "zigzag":
            y = nnscaler_ring.wrap_zigzag_attn_func(q, k, v)
        else:
            y = nnscaler_ring.wrap_ring_attn_func(q, k, v, causal=True)
        x = x + self.o(y.reshape(BATCH, -1, DIM))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Two layers; a summed loss over the tokens."""

    attention, heads_k, times = "ring", HEADS_K, 1

    @staticmethod
    def inputs(seed: int) -> dict[str, Tensor]:
        return batch(seed)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList([Layer(self.attention, self.heads_k) for _ in range(2)])
        self.norm, self.head = Norm(), nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1) * 0.3
        cos, sin = (torch.cat((x, x, x, x), 2).unsqueeze(2).to(self.norm.weight.dtype) for x in (angles.cos(), angles.sin()))
        x = self.embed(tokens)
        for layer in [*self.layers] * self.times:
            x = layer(x, cos, sin)
        return summed_cross_entropy(self.head(self.norm(x)), labels) / (BATCH * SEQ)


class Mqa(Llama):
    heads_k = 1


class Window(Llama):
    attention = "window"


class Sinks(Llama):
    """A parameter that attention reads itself, and a scale that is computed from a shape."""

    attention = "sinks"


class Adapted(Llama):
    """A weight that is computed from others (LoRA)."""

    attention = "adapted"


class Twice(Llama):
    """Weights that are read by several ops."""

    times = 2


class Zigzag(Llama):
    attention = "zigzag"


class Ordered(Llama):
    """Takes its data in zigzag order already, so that no layer has to bring it there."""

    attention = "zigzag in order"


def batch(seed: int) -> dict[str, Tensor]:
    """Tokens, labels and positions, in natural order."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=random)
    positions = torch.arange(SEQ).expand(BATCH, SEQ).contiguous()
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "positions": positions}


class Packed(Llama):
    """A row of documents, put in zigzag order once at the model's start and back at its end."""

    @staticmethod
    def inputs(seed: int) -> dict[str, Tensor]:
        row = {name: x.flatten() for name, x in batch(seed).items()}
        return {"tokens": row["tokens"], "labels": row["labels"], "cu_seqlens": torch.tensor([0, 10, 32], dtype=torch.int32)}

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.q, self.k, self.v = (nn.ModuleList([nn.Linear(DIM, DIM, bias=False) for _ in range(2)]) for _ in "qkv")

    def forward(self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[override]
        x = wrap_maybe_shuffle(self.embed(tokens), cu_seqlens)
        for layers in zip(self.q, self.k, self.v, strict=True):
            q, k, v = (layer(x).view(-1, HEADS, DIM // HEADS) for layer in layers)
            y = wrap_zigzag_allgather_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True)
            x = x + y.reshape(-1, DIM)
        return summed_cross_entropy(self.head(wrap_maybe_unshuffle(x, cu_seqlens)), labels) / (BATCH * SEQ)


@dataclass(frozen=True)
class Run:
    """One model, one way to cut it."""

    model: type[Llama] = Llama
    parts: dict[str, int] = field(default_factory=dict, hash=False)
    plan: int = 2
    use_zero: int = 0
    recompute: bool = False
    stages: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        words = [self.model.__name__, *(f"{k}{v}" for k, v in self.parts.items()), f"plan{self.plan}", f"zero{self.use_zero}"]
        words += [f"stages{len(self.stages) + 1}", "recompute" if self.recompute else "keep", str(self.dtype)[6:]]
        return "_".join(words)

    @property
    def options(self) -> dict[str, Any]:
        """The policy's."""
        options: dict[str, Any] = {"recompute_modules": "Layer"} if self.recompute else {}
        return options | ({"stages": list(self.stages), "pipeline_nmicros": 2} if self.stages else {})


def trained(run: Run, directory: Path) -> dict[str, Any]:
    """Loss and gradients of a step by nnscaler beside those on one device, as relative errors; and the code it ran."""
    import nnscaler

    world_size = dist.get_world_size()
    config = nnscaler.ComputeConfig(
        *(run.plan, world_size),
        trace_strategy="cpu",
        use_zero=run.use_zero,
        pas_config=run.options,
        use_end2end=bool(run.stages),
    )
    policy = cut(**run.parts) if run.parts else pas_sequence
    # A name of its own: the first module of a name on sys.path wins.
    where = {"gen_savedir": str(directory), "instance_name": run.name}
    inputs = [run.model.inputs(seed) for seed in range(2 if run.stages else 1)]
    if run.model is Ordered:
        held = layouts.build("zigzag", SEQ, run.plan)
        order = torch.cat([torch.from_numpy(held.positions(r)) for r in range(run.plan)])
        fed = [{name: x[:, order] for name, x in each.items()} for each in inputs]
    else:
        fed = inputs
    model = nnscaler.parallelize(run.model, fed[0], policy, config, module_dtype=run.dtype, **where)()
    optimizer = nnscaler.build_optimizer(model, torch.optim.SGD, lr=1.0)
    if run.stages:
        loss = sum(model.train_step([tuple(each.values()) for each in fed]))
    else:
        loss = model(**fed[0])
        loss.backward()
    optimizer.sync_shard_grad()
    optimizer.scale_grads(run.plan / world_size)
    norm = optimizer.clip_gnorm() if run.dtype == torch.bfloat16 else math.nan  # it refuses float64
    optimizer.step()
    states: list[Any] = [None] * world_size
    dist.all_gather_object(states, model.state_dict())
    merged = nnscaler.merge_state_dicts(states)
    after = merged[0] if isinstance(merged, tuple) else merged
    code = Path(str(sys.modules[type(model).__module__].__file__)).read_text()
    reference = Llama if run.model is Ordered else run.model
    return {"code": code, **errors(reference().double(), inputs, float(loss), float(norm), after)}


def errors(reference: nn.Module, inputs: list[dict[str, Tensor]], loss: float, norm: float, after: Any) -> dict[str, float]:
    """Relative errors of the loss, the gradient norm, and the worst gradient, which a step of plain SGD tells."""
    expected = torch.stack([reference(**each) for each in inputs]).sum()
    expected.backward()
    parameters = dict(reference.named_parameters())
    grads = {name: x.grad for name, x in parameters.items() if x.grad is not None}
    assert set(grads) == set(parameters) <= set(after)
    steps = {name: x.detach() - after[name].double() for name, x in parameters.items()}
    worst = max(float((steps[name] - grad).abs().max() / grad.abs().max()) for name, grad in grads.items())
    size = float(torch.stack([grad.norm() for grad in grads.values()]).norm())
    return {"loss": abs(loss / float(expected) - 1), "norm": abs(norm / size - 1), "grads": worst}


def all_trained(rank: int, world_size: int, runs: list[Run], directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    under_torchrun(rank, world_size)
    with nnscaler_runtime("cpu"):
        import nnscaler

        logging.disable(logging.WARNING)
        nnscaler.init()
        found: dict[str, Any] = {}
        for run in runs:
            try:
                found[run.name] = trained(run, directory)
            except RuntimeError as error:  # alike on every rank: nnscaler raises before anything runs
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                found[run.name] = {"error": repr(cause)}
        nnscaler.uninit()
        return found


ON_TWO = [
    Run(),
    Run(Zigzag),
    Run(Ordered),
    Run(Window),
    Run(Mqa),
    Run(Sinks),
    Run(Packed),
    Run(recompute=True),
    Run(use_zero=1, plan=1),
    Run(parts={"heads": 2}),
    Run(parts={"batch": 2}),
    Run(dtype=torch.bfloat16),
]

BOTH_ORDERS = [{"sequence": 2, "heads": 2}, {"heads": 2, "sequence": 2}]
ON_FOUR = [
    Run(plan=4),
    Run(Ordered, plan=4),
    Run(plan=4, parts={"sequence": 2, "heads": 2}),
    Run(plan=4, parts={"heads": 2, "sequence": 2}),
    Run(plan=4, parts={"batch": 2, "sequence": 2}, recompute=True),
    Run(plan=4, parts={"sequence": 2}),
    Run(Mqa, plan=4, parts={"sequence": 2, "heads": 2}),
    Run(Sinks, plan=4, parts={"sequence": 2}),
    Run(Sinks, plan=4, parts={"batch": 2}),
    Run(Sinks, plan=4, parts={"heads": 2, "sequence": 2}),
    *(Run(model, plan=4, parts=parts) for model in (Adapted, Twice) for parts in BOTH_ORDERS),
    Run(Packed, plan=4),
    Run(Packed, plan=4, parts={"sequence": 2}),
    Run(Packed, plan=4, parts={"sequence": 2, "heads": 2}),
    Run(Zigzag, plan=2, use_zero=1),
    Run(plan=4, stages=("layers.1",)),
]
REFUSED = {
    Run(Mqa, plan=4, parts={"heads": 2, "sequence": 2}): "sequence outer and heads inner",
    Run(Sinks, plan=4, parts={"sequence": 2, "heads": 2}): "heads outer and sequence inner",
}
"""nnscaler would permute the gradients of the key head, or of the sink."""


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(all_trained, 2, ON_TWO, tmp_path_factory.mktemp("two"), timeout=600)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(all_trained, 4, [*ON_FOUR, *REFUSED], tmp_path_factory.mktemp("four"), timeout=600)


def check(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Every rank has the loss and the gradients of one device; in bfloat16 roughly, and steps of it say nothing."""
    for found in (each[run.name] for each in ranks):
        assert "error" not in found, found["error"]
        if run.dtype == torch.bfloat16:
            assert found["loss"] < 1e-2 and found["norm"] < 3e-2
        else:
            assert found["loss"] < 1e-5 and found["grads"] < 1e-5


class TestTraining:
    pytestmark = needs_nnscaler

    @pytest.mark.parametrize("run", ON_TWO, ids=lambda run: run.name)
    def test_on_two_ranks(self, on_two: list[dict[str, Any]], run: Run) -> None:
        check(run, on_two)

    @pytest.mark.parametrize("run", ON_FOUR, ids=lambda run: run.name)
    def test_on_four_ranks(self, on_four: list[dict[str, Any]], run: Run) -> None:
        check(run, on_four)

    @pytest.mark.parametrize("run", REFUSED, ids=lambda run: run.name)
    def test_what_nnscaler_would_get_wrong_is_refused(self, on_four: list[dict[str, Any]], run: Run) -> None:
        assert REFUSED[run] in on_four[0][run.name]["error"]  # the rank that generates the code
        assert all("error" in each[run.name] for each in on_four)

    @pytest.mark.parametrize("run", [Run(), Run(Zigzag)], ids=lambda run: run.name)
    def test_the_loss_is_all_that_travels_outside_the_ops(self, on_two: list[dict[str, Any]], run: Run) -> None:
        for each in on_two:
            adapters = re.findall(r"nnscaler\.runtime\.adapter\.(?:nn\.)?(\w+)\(", each[run.name]["code"])
            assert adapters.count("Reducer") == 1, "the gradients of the weights"
            local = {"Reducer", "chunk"}  # a rank's part of the tokens, labels and positions, which all have whole
            assert [name for name in adapters if name not in local] == ["allreduce_identity"]
