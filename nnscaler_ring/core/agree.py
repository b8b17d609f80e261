"""Whether ranks call alike, compared before anything else travels where ``NNSCALER_RING_CHECK=1`` asks for it.

A rank cannot see alone that another passed another mask or dtype: rows would go astray, or wait for ever. This costs one small
all-gather and a wait for it in each call, so it is for finding such a mistake, not for training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

from .transport import ProcessTransport, Transport

VARIABLE = "NNSCALER_RING_CHECK"


def asked() -> bool:
    """The environment variable is set, and not to 0; a data loader's worker, which knows no other rank, is not asked."""
    return os.environ.get(VARIABLE, "0") not in ("", "0") and get_worker_info() is None


FACTS = 20
"""Numbers in each comparison, whatever the call: a rank whose own arguments are refused cannot know which call the others make."""


_CAN_BE = "whether their own arguments can be"
_CALL = "what they call"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def check_alike(transport: Transport, call: str, facts: Mapping[str, object], device: torch.device) -> None:
    """ValueError on every rank unless all say the same.

    Args:
        call: what a rank is about to do, for people.
        facts: what it says of that, by names; in one order on all ranks. Compared by their `repr`. Empty on a rank whose own
            arguments are refused.
        device: where messages of these ranks live, or would if the group had a backend for it.
    """
    if not isinstance(transport, ProcessTransport):
        return
    facts = {_CAN_BE: bool(facts), _CALL: call, **facts}
    digests = [hashlib.sha256(repr(fact).encode()).digest()[:8] for fact in facts.values()]
    numbers = [int.from_bytes(each, "little", signed=True) for each in digests]
    assert len(numbers) <= FACTS
    own = [dist.get_rank(), *numbers, *[0] * (FACTS - len(numbers))]
    kinds = [each.type for each in transport.groups[0]._device_types]
    said = torch.tensor([own], device=device if device.type in kinds else kinds[0])
    for group in transport.groups:  # of a grid first the ranks of one place, then with all that they have heard those of a team
        heard = [torch.empty_like(said) for _ in range(group.size())]
        dist.all_gather(heard, said, group=group)
        said = torch.cat(heard)
    ranks, *columns = said.T.tolist()
    if facts[_CAN_BE] and (refused := [rank for rank, can_be in zip(ranks, columns[0], strict=True) if can_be != numbers[0]]):
        raise ValueError(f"{_ranks(sorted(refused))} refused the arguments of this call: the error there says why")
    for name, answers in zip(facts, columns, strict=False):
        if len(set(answers)) > 1:
            alike = [sorted(r for r, x in zip(ranks, answers, strict=True) if x == each) for each in dict.fromkeys(answers)]
            parts = " and ".join(map(_ranks, sorted(alike)))
            shown = repr(facts[name])
            here = shown if len(shown) <= 200 else f"{shown[:200]}..."
            remedy = "make the same calls on every rank, backward passes too" if name == _CALL else "say the same on every rank"
            raise ValueError(f"{parts} differ in {name}; on rank {own[0]} it is {here}: {remedy}")
