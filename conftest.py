"""What pytest leaves out: modules whose library is not installed."""

from importlib.util import find_spec

_TRITON = ("fused.py", "kernels/triton_kernels.py")
collect_ignore = [] if find_spec("triton") else [f"nnscaler_ring/core/{name}" for name in _TRITON]
