"""One rank of a world alone, with all that it would receive: what the ranks of the whole world received is kept and given again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.transport import Exchange, LocalTransport, OneRank, Wait, Walk

Mail = list[list[Tensor]]
"""What a rank receives, exchange by exchange."""


class Recorder(LocalTransport):
    """All ranks in this process; keeps what each receives."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.mail: list[Mail] = [[] for _ in range(world_size)]

    def run(self, walks: Sequence[Walk]) -> list[Any]:
        return super().run([_recorded(walk, mail) for walk, mail in zip(walks, self.mail, strict=True)])


def _recorded(walk: Walk, mail: Mail) -> Walk:
    reply: Wait | None = None
    while True:
        try:
            exchange = walk.send(reply)  # type: ignore[arg-type]
        except StopIteration as end:
            return end.value
        reply = yield exchange
        mail.append([buffer.clone() for _, buffer in exchange.receive])


class Replay(OneRank):
    """One rank alone, which receives again what it received before, from `rewind` on."""

    def __init__(self, world_size: int, rank: int, mail: Mail) -> None:
        self.world_size, self.inner, self.ranks = world_size, 1, (rank,)
        self._mail, self._next = mail, 0
        self._stream: torch.cuda.Stream | None = None

    def rewind(self) -> None:
        self._next = 0

    def start(self, exchange: Exchange) -> Wait:
        mail = self._mail[self._next]
        self._next += 1
        if not mail or not mail[0].is_cuda:
            for (_, buffer), data in zip(exchange.receive, mail, strict=True):
                buffer.copy_(data)
            return lambda: None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for (_, buffer), data in zip(exchange.receive, mail, strict=True):
                buffer.copy_(data, non_blocking=True)
        done = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)
