"""Ulysses: ranks exchange tokens for heads, so that each computes some heads of every token (Jacobs et al., arXiv:2309.14509).

`inner` neighbouring ranks form a *team*. `to_heads` and `to_tokens` are walks of one exchange: from a rank's own tokens with all
heads to all the team's tokens with the rank's share of heads, and back. What happens between them is any plan over the teams, so a
world of ``outer * inner`` ranks runs a ring, or whatever the transport says, between the ranks of one share, and a world of one
team computes as one device does.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import sum_dtype, take
from .teams import Share, Team
from .transport import Exchange, Wait
from .walk import put, room


@dataclass(frozen=True, eq=False)
class Pack:
    """Tensors of one dtype over the same tokens that travel as one.

    Attributes:
        team: who exchanges.
        kind: ``q`` or ``k``: whose heads they have.
        tensors: ``[B, L, H, D]`` of own tokens and all heads, or ``[B, rows, h, D]`` of the team's tokens and the own share.
    """

    team: Team
    kind: str
    tensors: Sequence[Tensor]

    def heads(self, share: Share) -> tuple[int, int]:
        """First and end of a share's heads."""
        return share.q if self.kind == "q" else share.k

    def split(self, rows: Tensor, share: Share | None = None) -> list[Tensor]:
        """Rows ``[n, B, width]`` as a view ``[B, n, h, D]`` for each of the pack's tensors; of the own share where None."""
        first, end = self.heads(share or self.team.share)
        dims = [x.shape[3] for x in self.tensors]
        parts = rows.split([(end - first) * d for d in dims], dim=2)
        return [part.unflatten(2, (end - first, d)).transpose(0, 1) for part, d in zip(parts, dims, strict=True)]

    def rows(self, share: Share | None = None) -> Tensor:
        """The tensors as rows ``[n, B, width]``, of the heads of a share or of all that they have."""
        heads = slice(None) if share is None else slice(*self.heads(share))
        return torch.cat([x[:, :, heads].flatten(2) for x in self.tensors], dim=2).transpose(0, 1).contiguous()


def to_heads(packs: Sequence[Pack]) -> Generator[Exchange, Wait, list[Tensor]]:
    """Own tokens ``[B, L, H, D]`` of all heads -> rows ``[n, B, width]`` of the team's tokens and the own share of heads.

    `Pack.split` tells the tensors in a pack's rows apart.
    """
    outboxes = [[pack.rows(share) for share in pack.team.shares] for pack in packs]
    results, inboxes = [], []
    for pack, outbox in zip(packs, outboxes, strict=True):
        rows = outbox[0].new_empty(pack.team.rows, *outbox[pack.team.place].shape[1:])
        results.append(rows)
        inboxes.append([room(rows, place) for place in pack.team.places])
    wait = yield _exchange(packs, outboxes, inboxes)
    wait()
    for pack, rows, inbox in zip(packs, results, inboxes, strict=True):
        for place, arrived in zip(pack.team.places, inbox, strict=True):
            if len(place) > 1:  # else it came right there
                put(rows, place, arrived)
    return results


def to_tokens(packs: Sequence[Pack]) -> Generator[Exchange, Wait, list[list[Tensor]]]:
    """The inverse: the team's tokens ``[B, rows, h, D]`` -> own tokens ``[B, L, H, D]``; shared key heads are added up in fp32."""
    outboxes = [[take(rows, place) for place in pack.team.places] for pack in packs for rows in [pack.rows()]]
    inboxes = []
    for pack, outbox in zip(packs, outboxes, strict=True):
        own = outbox[pack.team.place]
        widths = [
            sum((pack.heads(share)[1] - pack.heads(share)[0]) * x.shape[3] for x in pack.tensors) for share in pack.team.shares
        ]
        inboxes.append([own.new_empty(*own.shape[:2], width) for width in widths])
    wait = yield _exchange(packs, outboxes, inboxes)
    wait()
    results = []
    for pack, inbox in zip(packs, inboxes, strict=True):
        n, batch, _ = inbox[0].shape
        number = max(pack.heads(share)[1] for share in pack.team.shares)
        dtype = inbox[0].dtype if pack.kind == "q" else sum_dtype(inbox[0].dtype)  # of what is added up
        whole = [inbox[0].new_zeros(batch, n, number, x.shape[3], dtype=dtype) for x in pack.tensors]
        for share, arrived in zip(pack.team.shares, inbox, strict=True):
            for into, part in zip(whole, pack.split(arrived, share), strict=True):
                into[:, :, slice(*pack.heads(share))] += part
        results.append(whole)
    return results


def _exchange(packs: Sequence[Pack], outboxes: Sequence[Sequence[Tensor]], inboxes: Sequence[Sequence[Tensor]]) -> Exchange:
    """One message a pack and peer; what stays on this rank is copied at once."""
    send, receive = [], []
    for pack, outbox, inbox in zip(packs, outboxes, inboxes, strict=True):
        for rank, out, into in zip(pack.team.ranks, outbox, inbox, strict=True):
            if rank == pack.team.rank:
                into.copy_(out)
                continue
            send += [(rank, out)] if out.numel() else []
            receive += [(rank, into)] if into.numel() else []
    return Exchange(send, receive, outboxes[0][0].device)
