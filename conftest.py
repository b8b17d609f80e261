"""What pytest leaves out: modules whose library is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["nnscaler_ring/core/kernels/fused.py"]
