"""What a run takes: seconds in all and inside the kernel's calls, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from nnscaler_ring.core.held import Held
from nnscaler_ring.core.kernels import Kernel


class Clock:
    """CPU seconds of this process where it has one thread, wall time where it has several, events on a GPU.

    A GPU is kept busy by `product` while the host sends the first work, as it is in training: else the time that the host takes
    before the first kernel would be measured too.
    """

    def __init__(self, device: str, threads: int, size: int, dtype: torch.dtype) -> None:
        self.cuda = device == "cuda"
        self._now = time.process_time if threads == 1 else time.perf_counter
        self._matrix = torch.randn(size, size, device=device).to(dtype)

    def start(self) -> Any:
        """A mark before which all work is done, and after which a GPU does not wait for the host."""
        self.wait()
        for _ in range(4 if self.cuda else 0):
            self._matrix @ self._matrix
        return self.mark()

    def product(self, times: int = 10) -> float:
        """Seconds of a matrix product."""
        self._matrix @ self._matrix
        start = self.start()
        for _ in range(times):
            self._matrix @ self._matrix
        end = self.mark()
        self.wait()
        return self.seconds(start, end) / times

    def mark(self) -> Any:
        if not self.cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """After `wait`."""
        passed: float = start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return passed


class Times(NamedTuple):
    """Seconds of one run: its forward pass and both, inside kernel calls and in all, and until the host had sent both; and spans
    that the kernel was called for."""

    forward: float
    both: float
    forward_kernels: float
    both_kernels: float
    host: float
    forward_calls: int
    both_calls: int


class Pass(NamedTuple):
    """A forward pass, and a backward pass from what it returns."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


def timed(run: Pass, kernel: Kernel, clock: Clock) -> Times:
    """One run, timed as a whole and in each call of the kernel; what a call does with what others gave is not in it."""
    inside: list[tuple[Any, Any, int]] = []
    aside: list[list[tuple[Any, Any]]] = [[]]

    def watched(name: str, spans: int) -> Callable[..., Any]:
        call = getattr(kernel, name)

        def wrapper(*args: Any) -> Any:
            aside[-1].clear()
            start = clock.mark()
            result = call(*args)
            inside.append((start, clock.mark(), len(args[spans])))
            aside.append([])
            return result

        return wrapper

    def noted(call: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: Any) -> None:
            start = clock.mark()
            call(*args)
            aside[-1].append((start, clock.mark()))

        return wrapper

    calls = {"forward": watched("forward", 3), "backward": watched("backward", 3)}
    if type(kernel).merge is not Kernel.merge:  # that of `Kernel` calls `forward`
        calls["merge"] = watched("merge", 4)
    with (
        mock.patch.multiple(kernel, **calls),
        mock.patch.multiple(Held, flush=noted(Held.flush), finish=noted(Held.finish)),
    ):
        start, began = clock.start(), time.perf_counter()
        state = run.forward()
        between, first = clock.mark(), len(inside)
        run.backward(state)
        end, host = clock.mark(), time.perf_counter() - began
        clock.wait()
    others = [sum(clock.seconds(a, b) for a, b in marks) for marks in aside]
    kernels = [clock.seconds(a, b) - other for (a, b, _), other in zip(inside, others, strict=False)]
    spans = [number for _, _, number in inside]
    forward, both = clock.seconds(start, between), clock.seconds(start, end)
    return Times(forward, both, sum(kernels[:first]), sum(kernels), host, sum(spans[:first]), sum(spans))


def peak(run: Pass, device: str) -> int:
    """The most bytes that a run holds at once besides what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.backward(run.forward())
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profiler:  # it warns without
        run.backward(run.forward())
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
