"""Libraries that may be installed: found without importing them, and called by the names that their release gives its parameters.

A release that renames a parameter, adds one that must be given or drops one that is needed is refused by name, never called wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.torch_version import TorchVersion

ALTERNATIVES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "causal": ("is_causal",),
        "is_causal": ("causal",),
        "window_size": ("window_size_left", "window_size_right"),
        "window_size_left": ("window_size",),
        "window_size_right": ("window_size",),
    }
)
"""Names of which a function has one or the other; both are given."""


@dataclass(frozen=True, eq=False)
class Library:
    """A library and what is passed to it besides what a call is about.

    Attributes:
        label: for people.
        module: what has its functions.
        distributions: names under which it may be installed; the version is that of the first that is.
        minimum: the oldest version that is taken.
        neutral: values that change nothing, of parameters that some releases want given.
        optional: parameters that are passed where a release has them.
    """

    label: str
    module: str
    distributions: tuple[str, ...]
    minimum: str = "0"
    neutral: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    @property
    def version(self) -> str:
        """As installed, or empty."""
        for name in self.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return ""

    @property
    def release(self) -> str:
        """Name and version in words."""
        return f"{self.label} ({self.version})" if self.version else self.label

    def unknown(self, what: str) -> NotImplementedError:
        """The error of a release that is not as those that are known."""
        return NotImplementedError(f"{self.release} is a release that is not known here: {what}")

    def loaded(self) -> Any:
        """The module, of a library that was checked."""
        return import_module(self.module)

    def load(self) -> ModuleType:
        """The module, or NotImplementedError that says why it cannot be had."""
        version, top = self.version, self.module.split(".")[0]
        if not version and (top != self.module or find_spec(top) is None):
            raise NotImplementedError(f"{self.label} is not installed")
        if version and TorchVersion(version) < self.minimum:
            raise NotImplementedError(f"{self.release} is older than {self.minimum}")
        try:
            return import_module(self.module)
        except Exception as why:  # an AssertionError where a compiled part is missing, an AttributeError beside another release
            raise NotImplementedError(f"{self.release} cannot be imported: {why!r}") from why

    def check(self, function: Callable[..., Any], given: frozenset[str]) -> None:
        """NotImplementedError unless `function` has the parameters in `given`, and wants no others that are not known."""
        _names(self, function, given)

    def call(self, function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """`function` of what it takes of `given`, and of neutral values for what else it wants."""
        names = _names(self, function, frozenset(given))
        return function(**{name: given[name] if name in given else self.neutral[name] for name in names})


@lru_cache(maxsize=64)
def _names(library: Library, function: Callable[..., Any], given: frozenset[str]) -> tuple[str, ...]:
    """The parameters of `function` that are passed."""
    has = parameters(function)
    lacking = [name for name in sorted(given - library.optional) if not has.keys() & {name, *ALTERNATIVES.get(name, ())}]
    unknown = [name for name, wanted in has.items() if wanted and name not in given and name not in library.neutral]
    if lacking or unknown:
        wrong = [f"has no {', '.join(lacking)}"] * bool(lacking) + [f"wants {', '.join(unknown)}"] * bool(unknown)
        raise library.unknown(f"{_plain(function).__name__} {' and '.join(wrong)}")
    return tuple(name for name, wanted in has.items() if wanted or name in given)


@lru_cache(maxsize=64)
def parameters(function: Callable[..., Any]) -> Mapping[str, bool]:
    """Names of a function's parameters, and whether they must be given."""
    return {name: p.default is p.empty for name, p in inspect.signature(_plain(function)).parameters.items()}


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of the custom op of torch that it may be."""
    return function._init_fn if isinstance(function, CustomOpDef) else function


def capability(label: str, *majors: int) -> tuple[int, int]:
    """Compute capability of the current NVIDIA GPU, or NotImplementedError where it is not one of those."""
    if torch.version.hip:
        raise NotImplementedError(f"{label} is called as its CUDA builds are, not on ROCm")
    if not torch.cuda.is_available():
        raise NotImplementedError(f"{label} needs a GPU, and there is none")
    found = torch.cuda.get_device_capability()
    if found[0] not in majors:
        wanted = ", ".join(f"{major}.x" for major in majors)
        raise NotImplementedError(f"{label} needs a GPU of compute capability {wanted}, not {found[0]}.{found[1]}")
    return found
