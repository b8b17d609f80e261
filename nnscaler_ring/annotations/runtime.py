"""nnscaler where it does not run by itself: on CPU with gloo, on Intel GPUs with xccl, and 0.8 on newer torch.

nnscaler takes CUDA for granted in about a dozen places. :func:`nnscaler_runtime` redirects them for as long as its block
runs, and nothing is patched by importing this module. Every patch first looks whether its target exists and needs it, so
that a release which repairs a place is left alone there.

The block must hold everything that touches nnscaler: parallelising, building the optimizer, and the training loop.

>>> from nnscaler_ring.annotations.runtime import nnscaler_runtime
>>> with nnscaler_runtime("cpu"):  # doctest: +SKIP
...     nnscaler.init()
...     model = nnscaler.parallelize(Model, inputs, policy, nnscaler.ComputeConfig(2, trace_strategy="cpu"))
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_BACKENDS = {"cpu": "gloo", "xpu": "xccl"}

INSTALL_HINT = (
    "nnscaler is not installed. It is not on the package index (the bare name there is nobody's): install a release or "
    "its git repository, 0.8 from https://github.com/microsoft/nnscaler or 0.9 from https://github.com/msrasys/nnscaler, "
    "with --no-deps beside a torch newer than it declares, then dill more-itertools matplotlib psutil pulp pyyaml tqdm "
    "'pybind11<3', and for 0.9 also safetensors regex."
)


class Swap(NamedTuple):
    """One attribute to replace while the block runs."""

    owner: Any
    name: str
    value: Any


@contextmanager
def nnscaler_runtime(device: str = "cpu") -> Iterator[tuple[str, ...]]:
    """Let nnscaler run on `device` inside the block; everything is put back when it ends.

    Args:
        device: "cpu" (collectives by gloo) or "xpu" (by xccl).

    Yields:
        the names of the patches that were needed, for logs and tests.

    Raises:
        ImportError: nnscaler is not installed.
        ValueError: `device` is another one, or "xpu" without such a device.
    """
    _check_device(device)
    try:
        import nnscaler  # noqa: F401  (patches below reach its modules)
    except ModuleNotFoundError as error:
        if error.name == "nnscaler":
            raise ImportError(INSTALL_HINT) from error
        raise
    with ExitStack() as stack:
        applied = []
        for patch in _PATCHES:
            swaps = list(patch(device))
            for swap in swaps:
                _apply(stack, swap)
            if swaps:
                applied.append(patch.__name__.strip("_"))
        yield tuple(applied)


def _check_device(device: str) -> None:
    if device not in _BACKENDS:
        raise ValueError(f"device={device!r}: allowed are {sorted(_BACKENDS)}; CUDA needs no patches")
    if device == "xpu" and not torch.xpu.is_available():
        raise ValueError("device='xpu', but this torch sees no XPU; use device='cpu' or a torch built for XPU")


_ABSENT = object()


def _apply(stack: ExitStack, swap: Swap) -> None:
    # From vars() and not getattr(): a staticmethod or an inherited attribute must come back as what it was.
    before = vars(swap.owner).get(swap.name, _ABSENT)
    setattr(swap.owner, swap.name, swap.value)
    if before is _ABSENT:
        stack.callback(delattr, swap.owner, swap.name)
    else:
        stack.callback(setattr, swap.owner, swap.name, before)


# ------------------------------------------------------------------------------------------------ torch


def _current_device(device: str) -> torch.device:
    # With its type: nnscaler passes the result as `device=`, where a bare index may mean another one.
    return torch.device("cpu") if device == "cpu" else torch.device("xpu", torch.xpu.current_device())


def _cpu_names() -> dict[str, Callable]:
    """What torch.cuda offers and torch.cpu does not. Memory statistics are zero: the host's are not torch's to count."""
    psutil = importlib.import_module("psutil")  # a requirement of nnscaler itself

    def nothing(device: Any = None) -> int:
        return 0

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name="cpu", total_memory=psutil.virtual_memory().total)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    statistics = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return dict.fromkeys(statistics, nothing) | {
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_properties": properties,
        "mem_get_info": mem_get_info,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }


_FUNCTIONS = {name: name for name in ("set_device", "current_stream", "stream", "synchronize")} | {
    "default_stream": "current_stream",  # neither torch.cpu nor torch.xpu has a default stream by that name
}


def _torch_cuda(device: str) -> Iterator[Swap]:
    """torch.cuda's functions that nnscaler calls, by those of the device that is there."""

    def fresh(target: Callable) -> Callable:
        # A function of its own: torch._dynamo, imported in the block, refuses one object under two names.
        return lambda *args, **kwargs: target(*args, **kwargs)

    namespace = getattr(torch, device)
    own = _cpu_names()
    yield Swap(torch.cuda, "current_device", lambda: _current_device(device))
    for name, alias in (_FUNCTIONS | {name: name for name in own}).items():
        target = getattr(namespace, alias, own.get(name) if device == "cpu" else None)
        if target is not None and hasattr(torch.cuda, name):
            yield Swap(torch.cuda, name, fresh(target))
    if device != "cpu":
        yield Swap(torch.cuda, "Stream", namespace.Stream)
        yield Swap(torch.cuda, "Event", namespace.Event)


def _cuda_methods(device: str) -> Iterator[Swap]:
    """`tensor.cuda()` and `module.cuda()`; 0.9 moves a module there before it builds its gradient buckets.

    It also pins memory that it is about to send, which takes a device to pin it for.
    """

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(_current_device(device))

    def module_cuda(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # Not self.to(): nnscaler's modules refuse every device there but cpu and cuda.
        return self._apply(lambda tensor: tensor.to(_current_device(device)))

    yield Swap(torch.Tensor, "cuda", tensor_cuda)
    yield Swap(torch.nn.Module, "cuda", module_cuda)
    if device == "cpu":
        yield Swap(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)


def _process_group(device: str) -> Iterator[Swap]:
    """nnscaler asks for nccl by name when no group exists yet."""
    original = dist.init_process_group

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if backend == "nccl":
            backend = _BACKENDS[device]
            kwargs.pop("device_id", None)  # nnscaler gives a bare index, which names a CUDA device
        return original(backend, *args, **kwargs)

    yield Swap(dist, "init_process_group", init_process_group)


def _unsupported(error: RuntimeError) -> bool:
    return "does not support" in str(error)


def _gloo_collectives(device: str) -> Iterator[Swap]:
    """gloo of torch 2.6 has no reduce_scatter and no all_to_all of lists, but both of one tensor.

    It refuses before it sends anything and on every rank alike, so trying first is safe.
    """
    reduce_scatter, all_to_all = dist.reduce_scatter, dist.all_to_all

    @functools.wraps(reduce_scatter)
    def scatter(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        try:
            return reduce_scatter(output, input_list, *args, **kwargs)
        except RuntimeError as error:
            if not _unsupported(error):
                raise
        flat = torch.cat([tensor.reshape(-1) for tensor in input_list])
        return dist.reduce_scatter_tensor(output.view(-1), flat, *args, **kwargs)

    @functools.wraps(all_to_all)
    def exchange(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any = None, async_op: bool = False) -> Any:
        try:
            return all_to_all(outputs, inputs, group=group, async_op=async_op)
        except RuntimeError as error:
            if not _unsupported(error):
                raise
        sizes = [tensor.numel() for tensor in outputs]
        arrived = outputs[0].new_empty(sum(sizes))
        flat = torch.cat([tensor.reshape(-1) for tensor in inputs])
        dist.all_to_all_single(arrived, flat, sizes, [tensor.numel() for tensor in inputs], group=group)
        for output, part in zip(outputs, arrived.split(sizes), strict=True):
            output.copy_(part.view(output.shape))
        return None  # done already: no handle, which nnscaler takes for a blocking call

    if device == "cpu":
        yield Swap(dist, "reduce_scatter", scatter)
        yield Swap(dist, "all_to_all", exchange)


# --------------------------------------------------------------------------------------------- nnscaler


class _Redirected:
    """`torch` for one nnscaler module that writes "cuda" as a literal: the same names, another device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("empty", "empty_like", "zeros", "zeros_like", "ones", "tensor", "autocast"):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            for key in ("device", "device_type"):
                if kwargs.get(key) == "cuda":
                    kwargs[key] = self._device
            return found(*args, **kwargs)

        return call


def _cuda_literals(device: str) -> Iterator[Swap]:
    """Modules that create tensors (or profile under autocast) on "cuda" by its name."""
    for name in ("nnscaler.utils", "nnscaler.parallel", "nnscaler.runtime.dtensor", "nnscaler.profiler.database"):
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        source = inspect.getsource(module)
        if "device='cuda'" in source or "device_type='cuda'" in source:
            yield Swap(module, "torch", _Redirected(device))


def _module_to(device: str) -> Iterator[Swap]:
    """0.9's modules refuse `.to()` any device but cpu and cuda."""
    from nnscaler.runtime.module import CubeModule

    original = CubeModule.to
    if device == "cpu" or original is torch.nn.Module.to:
        return

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        wanted = torch._C._nn._parse_to(*args, **kwargs)[0]
        return self.cuda() if wanted is not None and wanted.type == device else original(self, *args, **kwargs)

    yield Swap(CubeModule, "to", to)


def _tracer_device(device: str) -> Iterator[Swap]:
    """While a model is traced, `<tensor>.device` says cuda whatever is true, and `.is_cuda` says yes."""
    from nnscaler.graph.tracer.concrete_proxy import ConcreteAttrProxy

    original = ConcreteAttrProxy.__init__

    def init(self: Any, root: Any, attr: str) -> None:
        original(self, root, attr)
        if attr == "device" and self.value == torch.device("cuda"):
            self.value = torch.device(device)
        elif attr == "is_cuda":
            self.value = False

    # The tracer takes the innermost frame outside its own files for the user's line.
    init.__code__ = init.__code__.replace(co_filename=original.__code__.co_filename)
    yield Swap(ConcreteAttrProxy, "__init__", init)


def _autocast(device: str) -> Iterator[Swap]:
    """Autocast is recorded and written into the generated code for cuda alone, which is silently off elsewhere."""
    from nnscaler.codegen.module.module import ModuleCodeGen
    from nnscaler.graph.tracer.metadata import AutocastInfo

    literal = "torch.autocast(device_type='cuda'"
    if literal not in inspect.getsource(ModuleCodeGen):
        return
    from_context, emit_segment = AutocastInfo.from_context.__func__, ModuleCodeGen.emit_segment

    @functools.wraps(from_context)
    def recorded(cls: type) -> Any:
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return dataclasses.replace(from_context(cls), cuda_enabled=enabled, cuda_dtype=dtype)

    @functools.wraps(emit_segment)
    def emitted(self: Any, *args: Any, **kwargs: Any) -> list[str]:
        lines = emit_segment(self, *args, **kwargs)
        return [line.replace(literal, f"torch.autocast(device_type='{device}'") for line in lines]

    yield Swap(AutocastInfo, "from_context", classmethod(recorded))
    yield Swap(ModuleCodeGen, "emit_segment", emitted)


def _fused_norm(device: str) -> Iterator[Swap]:
    """apex's fused gradient norm is for CUDA; without it nnscaler takes torch's."""
    from nnscaler.runtime import gnorm

    if getattr(gnorm, "multi_tensor_l2norm_available", False):
        yield Swap(gnorm, "multi_tensor_l2norm_available", False)


def _fx_purity(device: str) -> Iterator[Swap]:
    """0.8 on torch 2.8 or newer: fx hands `is_impure` one argument more than nnscaler's replacement takes."""
    from nnscaler.graph.tracer.torch_fx_patcher import TorchFXPatcher

    original = TorchFXPatcher.is_impure_new
    takes, given = (len(inspect.signature(f).parameters) for f in (original, torch.fx.Node.is_impure))
    if takes < given:
        yield Swap(TorchFXPatcher, "is_impure_new", staticmethod(lambda node, *_, **__: original(node)))


def _autowrap(device: str) -> Iterator[Swap]:
    """0.8 on torch 2.13: some of torch's functions belong to a nameless pybind11 class, which the tracer fails to look up."""
    from nnscaler.graph.tracer import wrap_utils

    leaves = wrap_utils.default_autowrap_leaf_function
    kept = {f: info for f, info in leaves.items() if not getattr(f, "__qualname__", "").startswith("pybind11_detail")}
    if len(kept) < len(leaves):
        yield Swap(wrap_utils, "default_autowrap_leaf_function", kept)


_PATCHES: tuple[Callable[[str], Iterator[Swap]], ...] = (
    _torch_cuda,
    _cuda_methods,
    _process_group,
    _gloo_collectives,
    _cuda_literals,
    _module_to,
    _tracer_device,
    _autocast,
    _fused_norm,
    _fx_purity,
    _autowrap,
)
