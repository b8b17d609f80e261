"""Fine-tune a transformers model on packed rows that are longer than one device would hold, in a plain loop.

    python examples/finetune_transformers.py                                     # one process, a small Llama made here
    torchrun --nproc-per-node 2 examples/finetune_transformers.py                # each holds half of every row
    torchrun --nproc-per-node 8 examples/finetune_transformers.py --model FOLDER --fsdp --seq-len 131072

Documents are this machine's Python sources, bytes for the model made here, tokens where one is loaded. All ranks share each row;
the mean of their losses and gradients is that of one device, whatever their number. It needs transformers and tqdm.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from long_context.data import packed_rows
from long_context.options import positive
from nnscaler_ring import ContextParallel, cleanup_distributed, setup_mpi_distributed
from nnscaler_ring.core.layouts import LAYOUTS
from nnscaler_ring.integrations.transformers import Attention, next_token_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="a folder or name for from_pretrained; a small Llama of random weights where left out")
    parser.add_argument("--layout", default="zigzag", choices=[*LAYOUTS], help="balanced suits rows of many documents")
    parser.add_argument("--seq-len", type=positive, default=4096, help="tokens of a row")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--fsdp", action="store_true", help="shard the weights too (FSDP2); else each rank has all of them (DDP)")
    options = parser.parse_args()
    if options.seq_len < 8:
        parser.error(f"--seq-len {options.seq_len} is too short: give at least 8")
    world = setup_mpi_distributed()
    with contextlib.ExitStack() as stack:
        stack.callback(cleanup_distributed)
        train(options, torch.device(world["device"]), world["world_size"])


def train(options: argparse.Namespace, device: torch.device, world_size: int) -> None:
    """The loop: `shard_batch` is all that differs from one device."""
    transformers.set_seed(0)
    cp = ContextParallel(layout=options.layout)
    attention = Attention(cp)
    model, rows = load(options, attention)
    model = model.to(device).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the name since 5, and before
    if options.fsdp and world_size > 1:
        mesh = init_device_mesh(device.type, (world_size,))
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:  # its layers
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    first = cp.rank == 0
    with tqdm(total=options.steps, unit="step", disable=not first, dynamic_ncols=True) as bar:
        for _ in range(options.steps):
            batch = attention.shard_batch(next(rows), device=device)
            result = model(**batch, use_cache=False)
            loss = next_token_loss(result.logits, batch) if result.loss is None else result.loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach()
            if world_size > 1:
                dist.all_reduce(mean)
            bar.set_postfix_str(f"loss {mean.item() / world_size:.6f}", refresh=False)
            bar.update()
    if first:
        print(f"last loss {mean.item() / world_size:.6f}", flush=True)


def load(options: argparse.Namespace, attention: Attention) -> tuple[Any, Iterator[dict[str, Tensor]]]:
    """The model, and whole batches, the same on every rank."""
    if options.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
        encode = lambda data: tokenizer(bytes(data.astype(np.uint8)).decode(errors="replace"))["input_ids"]  # noqa: E731
    else:
        sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
        encode = lambda data: data.tolist()  # noqa: E731
    return attention.apply(model), batches(encode, options.seq_len)


def batches(encode: Any, seq_len: int) -> Iterator[dict[str, Tensor]]:
    """Rows of `seq_len` tokens, documents one after the other; positions begin anew in each."""
    tokens, positions = list[int](), list[int]()
    for row in packed_rows(seq_len):
        for data in np.split(row.tokens[0].numpy(), row.cu_seqlens[1:-1].tolist()):
            document = encode(data)
            tokens += document
            positions += range(len(document))
        while len(tokens) >= seq_len:
            ids, at = (torch.tensor([x[:seq_len]]) for x in (tokens, positions))
            yield {"input_ids": ids, "labels": ids, "position_ids": at}
            tokens, positions = tokens[seq_len:], positions[seq_len:]


if __name__ == "__main__":
    main()
