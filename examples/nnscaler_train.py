"""Train a small Llama whose sequence nnscaler cuts: the model is written as for one device, ``parallelize`` does the rest.

    torchrun --nproc-per-node 2 examples/nnscaler_train.py                                  # on GPUs, or on the CPU without
    torchrun --nproc-per-node 8 examples/nnscaler_train.py --plan-ngpus 4 --seq-len 131072  # 2 times 4 GPUs
    torchrun --nproc-per-node 4 examples/nnscaler_train.py --heads 2                        # sequence x heads
    torchrun --nproc-per-node 2 examples/nnscaler_train.py --policy autodist                # nnscaler measures and chooses

`plan_ngpus` devices share one row; where there are more, each group of that many takes a row of its own and the gradients are
summed. ``use_zero=1`` spreads the optimizer's state over the groups. docs/nnscaler.md says how nnscaler is installed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from long_context.data import packed_rows
from long_context.nnscaler_engine import Trained, inputs_of
from nnscaler_ring import wrap_ring_attn_func
from nnscaler_ring.annotations.policies import cut, pas_sequence, write_partition_constraints
from nnscaler_ring.annotations.runtime import INSTALL_HINT, nnscaler_runtime


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention inside each document."""
    return wrap_ring_attn_func(q, k, v, cu_seqlens=cu_seqlens)


def main() -> None:
    options = parse_options()
    cuda = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with nullcontext() if cuda else nnscaler_runtime("cpu"):
        try:
            import nnscaler
        except ModuleNotFoundError as error:
            raise SystemExit(INSTALL_HINT) from error
        nnscaler.init()
        train(options, "cuda" if cuda else "cpu")
        nnscaler.uninit()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--policy", choices=["sequence", "autodist"], default="sequence", help="who decides what is cut")
    parser.add_argument("--heads", type=int, default=1, help="parts to cut the heads in, besides the sequence")
    parser.add_argument("--plan-ngpus", type=int, default=None, help="devices that share a row; all where left out")
    parser.add_argument("--seq-len", type=int, default=2048, help="bytes of a row")
    parser.add_argument("--steps", type=int, default=5, help="training steps")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N")
    return options


def parallelized(options: argparse.Namespace, inputs: dict[str, Tensor], device: str) -> Any:
    """The model, cut; its code lies in a folder that all processes of this machine see."""
    import nnscaler

    world_size = dist.get_world_size()
    plan = options.plan_ngpus or world_size
    folder = [tempfile.mkdtemp(prefix="nnscaler_train_") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    policy: Any = cut(sequence=plan // options.heads, heads=options.heads) if options.heads > 1 else pas_sequence
    settings: dict[str, Any] = {"recompute_modules": "Layer"}
    if options.policy == "autodist":
        policy = "autodist"
        constraints = write_partition_constraints(Path(folder[0]) / "cuts.yaml", ["sequence"])
        # Its cache of costs does not know into how many parts a ring was cut, so it measures anew.
        settings = {"partition_constraints_path": str(constraints), "re_profile": True, "profile_dir": folder[0]}
        if device == "cpu":
            settings |= {"mem_constraint": 8, "parallel_profile": False}
    Trained.attention = staticmethod(attention)
    config = nnscaler.ComputeConfig(*(plan, world_size), use_zero=int(world_size > plan), trace_strategy="cpu", pas_config=settings)
    return nnscaler.parallelize(Trained, inputs, policy, config, gen_savedir=folder[0])()


def train(options: argparse.Namespace, device: str) -> None:
    import nnscaler

    rows = packed_rows(options.seq_len)
    model: Any = None
    for step in range(options.steps):
        row = next(rows)
        inputs = inputs_of(row)
        if model is None:
            model = parallelized(options, inputs, device).to(device)
            optimizer = nnscaler.build_optimizer(model, torch.optim.AdamW, lr=3e-3)
        loss = model(**{name: x.to(device) for name, x in inputs.items()})
        loss.backward()
        optimizer.sync_shard_grad()
        groups = dist.get_world_size() // (options.plan_ngpus or dist.get_world_size())
        optimizer.scale_grads(1 / (groups * row.num_targets))  # every group takes the same row here
        norm = optimizer.clip_gnorm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item() / row.num_targets:.4f}, gradient norm {float(norm):.3f}", flush=True)


if __name__ == "__main__":
    main()
