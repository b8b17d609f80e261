"""Sequences longer than one device: attention written once as for one device, cut over ranks with the numbers of one device.

The public surface on one page: ops for models (`ops`), per-rank functions under the names people migrate from (`functional`), and
`ContextParallel`. The engine and its parts, for people who write a variant, are in `core`.
"""

from importlib.metadata import PackageNotFoundError, version

from . import plugin as plugin  # registers the ops where nnscaler is installed
from .context import ContextParallel
from .core.mask import Mask, Slice
from .flag_attention import flash_attention, piecewise_attention
from .functional import (
    intel_ring_flash_attn_func,
    intel_ring_flash_attn_kvpacked_func,
    intel_ring_flash_attn_qkvpacked_func,
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_flash_attn_varlen_func,
    llama3_flash_attn_varlen_kvpacked_func,
    llama3_flash_attn_varlen_qkvpacked_func,
    ring_flash_attn_func,
    ring_flash_attn_kvpacked_func,
    ring_flash_attn_qkvpacked_func,
    ring_flash_attn_varlen_func,
    ring_flash_attn_varlen_kvpacked_func,
    ring_flash_attn_varlen_qkvpacked_func,
    ring_sliding_window_attn,
    ring_sliding_window_attn_varlen,
    ring_streaming_llm_attn,
    ring_streaming_llm_attn_varlen,
    stripe_flash_attn_func,
    stripe_flash_attn_kvpacked_func,
    stripe_flash_attn_qkvpacked_func,
    zigzag_ring_flash_attn_func,
    zigzag_ring_flash_attn_kvpacked_func,
    zigzag_ring_flash_attn_qkvpacked_func,
    zigzag_ring_flash_attn_varlen_func,
    zigzag_ring_flash_attn_varlen_kvpacked_func,
    zigzag_ring_flash_attn_varlen_qkvpacked_func,
)
from .integrations.substitute import substitute_hf_flash_attn, update_ring_flash_attn_params, use_ring_attn
from .launch import cleanup_distributed, setup_mpi_distributed
from .ops import (
    wrap_piecewise_attn_func,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_sliding_window_attn_func,
    wrap_streaming_llm_attn_func,
    wrap_stripe_attn_func,
    wrap_ulysses_attn_func,
    wrap_zigzag_attn_func,
)

try:
    __version__ = version("nnscaler-ring")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ContextParallel",
    "Mask",
    "Slice",
    "cleanup_distributed",
    "flash_attention",
    "intel_ring_flash_attn_func",
    "intel_ring_flash_attn_kvpacked_func",
    "intel_ring_flash_attn_qkvpacked_func",
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "piecewise_attention",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_kvpacked_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "ring_sliding_window_attn",
    "ring_sliding_window_attn_varlen",
    "ring_streaming_llm_attn",
    "ring_streaming_llm_attn_varlen",
    "setup_mpi_distributed",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
    "substitute_hf_flash_attn",
    "update_ring_flash_attn_params",
    "use_ring_attn",
    "wrap_piecewise_attn_func",
    "wrap_ring_attn_func",
    "wrap_ring_attn_varlen_func",
    "wrap_sliding_window_attn_func",
    "wrap_streaming_llm_attn_func",
    "wrap_stripe_attn_func",
    "wrap_ulysses_attn_func",
    "wrap_zigzag_attn_func",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_varlen_func",
    "zigzag_ring_flash_attn_varlen_kvpacked_func",
    "zigzag_ring_flash_attn_varlen_qkvpacked_func",
]
