"""Train a small Llama on long rows of packed documents, sharded over the sequence, beside the same run on one device.

    python examples/train_long_context.py                              # 2 processes, zigzag, 40 steps of 8,192 bytes
    python examples/train_long_context.py --variant stripe --world-size 4
    torchrun --nproc-per-node 2 examples/train_long_context.py --variant window --seq-len 16384

The model is written once, as for one device (``long_context/model.py``). The sharded run feeds it DTensors whose sequence
dim is cut over all processes, the other run plain tensors; both start from the same weights and see the same bytes, so the
losses must agree at every step. Rank 0 makes the single-device step after each sharded one and shows the difference.

It runs on GPUs (nccl) where there is one for each process, else on the CPU (gloo). It needs tqdm and matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from long_context.data import Batch, packed_rows
from long_context.engines import Step, build_dtensor_step, build_single_device_step
from long_context.model import Attention
from long_context.options import positive
from long_context.report import TOLERANCE, History, differences, save_picture, shares
from long_context.variants import VARIANTS
from nnscaler_ring.annotations.runtime import INSTALL_HINT


def main() -> None:
    options = parse_options()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(launch(options.world_size))
    device = join()
    with ExitStack() as stack:
        stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        train(options, device, stack)


def parse_options() -> argparse.Namespace:
    """The command line, checked: every process of a launch comes to the same verdict by itself."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), default="zigzag", help="the attention and its layout")
    launched = os.environ.get("WORLD_SIZE")  # set by torchrun
    parser.add_argument(
        "--engine", choices=["auto", "dtensor", "nnscaler"], default="auto", help="who cuts; auto: nnscaler if there"
    )
    parser.add_argument("--world-size", type=positive, default=int(launched or 2), help="processes to start")
    parser.add_argument("--seq-len", type=positive, default=8192, help="bytes of a row")
    parser.add_argument("--steps", type=positive, default=40, help="training steps")
    parser.add_argument("--window-size", type=positive, default=512, help="keys before a query that window and streaming show it")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the picture")
    options = parser.parse_args()
    if options.engine == "auto":
        options.engine = "nnscaler" if importlib.util.find_spec("nnscaler") else "dtensor"
    if options.engine == "nnscaler" and not importlib.util.find_spec("nnscaler"):
        parser.error(f"--engine nnscaler: {INSTALL_HINT}")
    if launched and options.world_size != int(launched):
        parser.error(
            f"--world-size {options.world_size} under a launcher of {launched} processes: leave it out, or give both the same"
        )
    if options.seq_len < 8 * options.world_size:
        shortest = 8 * options.world_size
        parser.error(f"--seq-len {options.seq_len} is too short for {options.world_size} processes: give at least {shortest}")
    return options


def launch(world_size: int) -> int:
    """Runs this script again under torchrun and returns its exit status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    threads = max(1, (os.cpu_count() or 1) // world_size)
    return subprocess.call([*torchrun, *sys.argv], env={"OMP_NUM_THREADS": str(threads), **os.environ})


def join() -> torch.device:
    """Joins the process group: nccl where each process of this machine has a GPU, else gloo on the CPU."""
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def build_sharded_step(options: argparse.Namespace, attention: Attention, device: torch.device, stack: ExitStack) -> Step:
    """The step of the engine chosen, over all processes."""
    if options.engine == "nnscaler":
        from long_context.nnscaler_engine import build_nnscaler_step

        return build_nnscaler_step(attention, device, next(packed_rows(options.seq_len)), stack)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    return build_dtensor_step(attention, device, mesh)


def train(options: argparse.Namespace, device: torch.device, stack: ExitStack) -> None:
    """All steps of both runs; rank 0 reports. Raises SystemExit where the losses differ by more than `TOLERANCE`."""
    variant = VARIANTS[options.variant]
    attention = variant.attention(options.window_size)
    rows = packed_rows(options.seq_len)
    sharded_step = build_sharded_step(options, attention, device, stack)
    single_step = build_single_device_step(attention, device)
    sharded, single = History(), History()
    is_first = dist.get_rank() == 0
    with tqdm(total=options.steps, unit="step", disable=not is_first, dynamic_ncols=True) as bar:
        for _ in range(options.steps):
            row = next(rows)
            dist.barrier()  # no process has a head start, so that the time is that of the whole step
            timed_step(sharded_step, row, sharded)
            if is_first:
                timed_step(single_step, row, single)
                show_progress(bar, sharded, single, options.seq_len)
    if is_first:
        report(options, sharded, single)


def timed_step(step: Step, batch: Batch, history: History) -> None:
    started = time.perf_counter()
    history.results.append(step(batch))  # its numbers are on the host, so the device has finished
    history.seconds.append(time.perf_counter() - started)


def show_progress(bar: tqdm, sharded: History, single: History, seq_len: int) -> None:
    difference = abs(sharded.results[-1].loss - single.results[-1].loss)
    bar.set_postfix_str(
        f"loss {sharded.results[-1].loss:.4f} (off by {difference:.1e}), {seq_len / sharded.seconds[-1]:,.0f} tokens/s",
        refresh=False,
    )
    bar.update()


def report(options: argparse.Namespace, sharded: History, single: History) -> None:
    """Prints the speeds, where the picture is, and the largest differences; the last is what a reader looks for."""
    world_size = dist.get_world_size()
    for name, history in ((f"sharded, world size {world_size}", sharded), ("one device", single)):
        speed = history.tokens_per_second(options.seq_len)
        losses = history.series("loss")
        print(f"{name:22} loss {losses[0]:.4f} -> {losses[-1]:.4f}   {speed:10,.0f} tokens/s")
    path = options.output / f"train_long_context-{options.variant}.png"
    title = f"{options.variant} attention: {options.steps} steps of {options.seq_len:,} packed bytes, world size {world_size}"
    first = next(packed_rows(options.seq_len)).cu_seqlens.numpy()
    save_picture(path, title, sharded, single, VARIANTS[options.variant], first, options.window_size, world_size)
    print(f"picture: {os.path.relpath(path)}")
    most = shares(VARIANTS[options.variant], first, options.window_size, world_size).max()
    print(f"the busiest rank has {most:.1%} of the pairs of the first row: zigzag and stripe are even over one sequence, not over")
    print('packed documents as here; for these there is ContextParallel(layout="balanced"), see docs/choosing.md')
    loss = differences(sharded, single, "loss").max()
    grad_norm = differences(sharded, single, "grad_norm").max()
    print(f"engine: {options.engine}")
    print(f"largest difference over {options.steps} steps: loss {loss:.2e}, gradient norm {grad_norm:.2e}", flush=True)
    if not loss <= TOLERANCE:
        raise SystemExit(f"the two runs do not agree: a loss differs by {loss:.2e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
