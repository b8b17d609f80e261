"""flash-attn 4 compiles, without a GPU, what its adapter asks of it: ``python -m tests.compiled sm_90 128 128``.

Its kernels are written in Python and compiled when first called, for the architecture that FLASH_ATTENTION_ARCH names; under
torch's fake tensors nothing is launched. What is replaced here is only what would ask a driver: a device's properties, and the
tensors from which the compiler takes layouts. For a process of its own: the library reads the environment when it is imported.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import types
from typing import Any

import numpy as np
import torch

from nnscaler_ring.core.kernels import Case, Grad, Scores
from nnscaler_ring.core.kernels.base import Window
from tests import oracle

ONE, MANY = [[0, 512, 0, 512]], [[0, 100, 0, 200], [100, 512, 128, 700]]
WINDOWS: list[Window] = [(-1, -1), (-1, 0), (100, 0), (100, 50), (-1, 30)]


def pretend(capability: tuple[int, int]) -> None:
    """A GPU of this compute capability, as far as compiling asks."""
    import cutlass
    import cutlass.cute as cute
    import flash_attn.cute.interface as interface
    from cutlass.utils import HardwareInfo
    from quack.compile_utils import make_fake_tensor

    from nnscaler_ring.core.kernels import packed

    kinds = {
        torch.bfloat16: cutlass.BFloat16,
        torch.float16: cutlass.Float16,
        torch.float32: cutlass.Float32,
        torch.int32: cutlass.Int32,
    }

    def tensor(
        x: Any, assumed_align: int = 16, leading_dim: int = -1, fully_dynamic: bool = False, enable_tvm_ffi: bool = True
    ) -> Any:
        if x is None:
            return None
        each = max(1, assumed_align // x.element_size())
        return make_fake_tensor(
            kinds[x.dtype], tuple(cute.sym_int() for _ in x.shape), each, None if fully_dynamic else leading_dim
        )

    properties = types.SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132, name="pretended")
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_: capability
    cuda.get_device_properties = lambda *_: properties
    cuda.current_stream = lambda *_: types.SimpleNamespace(cuda_stream=0)
    cuda.device = lambda *_: contextlib.nullcontext()
    interface.to_cute_tensor = tensor
    HardwareInfo.__init__ = lambda *_, **__: None
    HardwareInfo.get_max_active_clusters = lambda *_, **__: 66
    HardwareInfo.get_device_multiprocessor_count = lambda *_: 132
    packed.bounds = lambda counts, like: torch.empty(len(counts) + 1, dtype=torch.int32)


def compile_calls(head_dim: int, head_dim_v: int, heads_k: int) -> int:
    """How many calls compiled, forward and backward; NotImplementedError where the adapter refuses these sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nnscaler_ring.core.kernels.flash_attn_cute import FlashAttn4

    kernel, done = FlashAttn4(), 0
    kernel.check(Case("cuda", torch.bfloat16, head_dim, head_dim_v, 8, heads_k))
    cases: list[Any] = [(*each, {}) for each in itertools.product((ONE, MANY), WINDOWS)]
    cases += [(ONE, (-1, 0), {"d_lse": True}), (MANY, (-1, 0), {"softcap": 30.0}), (MANY, (-1, 0), {"deterministic": True})]
    for spans, window, more in cases:
        with FakeTensorMode():
            q, k, v = (
                torch.empty(1, 704, heads, dim, dtype=torch.bfloat16)
                for heads, dim in ((8, head_dim), (heads_k, head_dim), (heads_k, head_dim_v))
            )
            scores = Scores(scale=0.1, softcap=more.get("softcap", 0.0))
            table = np.array(spans)
            out, lse = kernel.forward(q, k, v, table, window, scores)
            rows = int((table[:, 1] - table[:, 0]).sum())
            assert out.shape == (1, rows, 8, head_dim_v) and lse.shape == (1, 8, rows) and lse.dtype == torch.float32
            whole = q.new_empty(1, 704, 8, head_dim_v)
            sums = oracle.sums((q, k, v))
            stats = torch.empty(1, 8, 704, dtype=torch.float32)
            kernel.backward(
                Grad(
                    q,
                    whole,
                    whole,
                    stats,
                    *sums,
                    deterministic=more.get("deterministic", False),
                    d_lse=stats if "d_lse" in more else None,
                ),
                *(k, v, table, window, scores),
            )
        done += 1
    return done


if __name__ == "__main__":
    arch, *sizes = sys.argv[1:]
    os.environ.update(FLASH_ATTENTION_ARCH=arch, CUTE_DSL_ARCH=f"{arch}a")
    pretend((int(arch[3:-1]), 0))
    with contextlib.redirect_stdout(io.StringIO()):
        found = compile_calls(*map(int, sizes))
    print(found)
