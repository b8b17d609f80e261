"""The engine: masks, layouts and transports as data, one loop that walks the plan made of them, kernels behind one interface."""

from .merge import flatten_varlen_lse, unflatten_varlen_lse, update_out_and_lse
from .transport import AllGatherComm, RingComm

__all__ = ["AllGatherComm", "RingComm", "flatten_varlen_lse", "unflatten_varlen_lse", "update_out_and_lse"]
