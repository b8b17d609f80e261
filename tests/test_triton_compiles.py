"""Every Triton kernel compiles for two generations of GPUs, which the interpreter does not show; none is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from nnscaler_ring.core.kernels.triton import HOPPER, NARROW, WIDE

PLAIN = {"PLAIN": True, "SOFTCAP": False, "ALIBI": False, "BIAS": False, "DROPOUT": False}
OTHERS = {"PLAIN": False, "SOFTCAP": True, "ALIBI": True, "BIAS": False, "DROPOUT": True}
TARGETS = {"narrow": (80, NARROW, 99), "wide": (80, WIDE, 163), "hopper": (90, HOPPER, 227)}
"""Compute capability, blocks and KiB of shared memory."""


def compile_kernel(
    name: str, table: str, key: tuple[int, int], dims: tuple[int, int], flags: dict[str, bool], lse: str = "fp32"
) -> int:
    """Bytes of shared memory of a kernel, compiled without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nnscaler_ring.core.kernels import triton_kernels

    kernel, (capability, sizes, _) = getattr(triton_kernels, name), TARGETS[table]
    blocks = sizes[key][["forward", "grad_queries", "grad_keys"].index(name)]
    dtype, (dim, dim_v) = "bf16" if key[0] == 2 else "fp32", dims
    widths = {
        "D": dim,
        "DV": dim_v,
        "BLOCK_D": max(16, 1 << (dim - 1).bit_length()),
        "BLOCK_DV": max(16, 1 << (dim_v - 1).bit_length()),
    }
    constants = {**widths, "ROWS": blocks.rows, "KEYS": blocks.keys, "PRECISION": "ieee" if key[0] == 4 else "tf32", **flags}
    constants |= {"D_BIAS": flags["BIAS"], "ATOMIC": flags["BIAS"]}
    constants |= {} if flags["ALIBI"] else {"alibi": None, "far_at": None}
    constants |= {} if flags["BIAS"] else {"bias": None, "d_bias": None}
    constants |= {} if flags["ALIBI"] or flags["BIAS"] or flags["DROPOUT"] else {"k_at": None, "q_at": None}
    types = {
        **dict.fromkeys(("q", "k", "v", "out", "d_out", "dq", "dk", "d_v"), f"*{dtype}"),
        **dict.fromkeys(("merged", "delta", "logs", "dq_sum", "dk_sum", "dv_sum", "alibi", "bias", "d_bias"), "*fp32"),
        "lse": f"*{lse}",
        **dict.fromkeys(("q_at", "far_at", "k_at"), "*i64"),
        **dict.fromkeys(("tiles", "visits"), "*i32"),
        **dict.fromkeys(("scale", "softcap", "kept_scale"), "fp32"),
    }
    names = kernel.arg_names
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in names}
    strides = re.compile("(q|k|v|out|merged|do|dq|dk|dv|sum|ks|vs)_[blh]")
    aligned = [n for n, arg in enumerate(names) if signature[arg].startswith("*") or strides.fullmatch(arg)]
    source = ASTSource(
        kernel,
        signature,
        {(n,): constants[arg] for n, arg in enumerate(names) if arg in constants},
        {(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    shared: int = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
    return shared


def check_compiled(cases: str) -> None:
    """Compiles, in a process without the interpreter, the cases that an expression gives; each must fit in its shared memory."""
    program = f"""
from tests.test_triton_compiles import *
for name, table, key, dims, flags, *more in {cases}:
    shared = compile_kernel(name, table, key, dims, flags, *more)
    assert shared <= TARGETS[table][2] << 10, (name, table, key, flags, shared)
    print(name, table, key, shared)
"""
    pytest.importorskip("triton", minversion="3.4")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


KERNELS = ("forward", "grad_queries", "grad_keys")


def test_the_kernels_compile() -> None:
    check_compiled("[(name, 'hopper', (2, 128), (128, 128), PLAIN) for name in KERNELS]")
    check_compiled("[('forward', 'hopper', (2, 128), (128, 128), PLAIN, 'fp64')]")  # where many results are merged


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("table", TARGETS)
def test_every_kernel_compiles(table: str) -> None:
    """Each with all features and heads that fill no block; blocks that another table has too are left to that."""
    less = {"narrow": {}, "wide": NARROW, "hopper": WIDE}[table]
    keys = [key for key, sizes in TARGETS[table][1].items() if sizes != less.get(key)]
    cases = [(name, table, key, (key[1], key[1]), PLAIN) for name in KERNELS for key in keys]
    flags = {**OTHERS, "BIAS": table == "narrow"}
    check_compiled(str([*cases, *((name, table, key, (key[1] - 3, key[1]), flags) for name, _, key, _, _ in cases)]))
