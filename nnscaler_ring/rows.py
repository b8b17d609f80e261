"""A configuration in figures: as a row of a table, as JSON, as a column of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from .core.layout import Layout
from .core.mask import Mask
from .core.plan import ALL_TO_ALL, plan
from .core.scaling import (
    NETWORKS,
    SPEEDS,
    Report,
    Shape,
    Timeline,
    best_transport,
    most_head_bytes,
    of_busiest,
    rank_pairs,
    report,
    timeline,
)
from .core.steps import Message, RankPlan, among
from .core.teams import deal, teams
from .pictures import Column, figures, tokens


@dataclass(frozen=True, eq=False)
class Row:
    """A configuration, as asked for and as `scaling.report` has it.

    Attributes:
        mask: who sees whom.
        held: which rank holds which tokens.
        layout, asked, network, speed: names; `asked` is the transport, or ``auto``.
        transport: what ``auto`` came to, forward.
        shape: the layer.
        made: the report; its transport is that between teams.
    """

    mask: Mask
    held: Layout
    layout: str
    asked: str
    transport: str
    network: str
    speed: str
    shape: Shape
    made: Report

    @property
    def key(self) -> tuple[object, ...]:
        """All but the network and what follows from it."""
        return (self.made.world_size, self.made.inner, self.layout, self.asked, self.way)

    @property
    def way(self) -> str:
        """The transport in words."""
        back = "" if self.made.transport == self.made.transport_backward else f" / {self.made.transport_backward}"
        return f"auto: {self.transport}{back}" if self.asked == "auto" else self.transport

    @property
    def title(self) -> str:
        """The configuration in words, without its mask."""
        grid = self.made.inner if self.transport != ALL_TO_ALL else 1
        return f"{self.layout}, {self.way}, {self.made.world_size} ranks" + (f" in teams of {grid}" if grid > 1 else "")

    @property
    def teams(self) -> Layout:
        """Which team of ranks that share heads holds what; which rank where none do."""
        return teams(self.held, self.made.inner)

    @cached_property
    def pairs(self) -> np.ndarray:
        """Visible pairs of each team."""
        return rank_pairs(self.mask, self.teams)

    def team_plan(self, team: int, backward: bool = False) -> RankPlan:
        """What each rank of a team does, with its heads."""
        transport = self.made.transport_backward if backward else self.made.transport
        return plan(self.mask, self.teams, self.teams, transport, team)

    def plan(self, rank: int) -> RankPlan:
        """What a rank does between the exchanges for heads."""
        return among(self.team_plan(rank // self.made.inner), self.made.inner, rank % self.made.inner)

    def per_rank(self, work: np.ndarray) -> np.ndarray:
        """What each rank has of its team's work, by its heads: ``[world_size]``."""
        shares = deal(self.shape.heads, self.shape.heads_k, self.made.inner)
        return np.outer(work, [(s.q[1] - s.q[0]) / self.shape.heads for s in shares]).ravel()

    def as_dict(self) -> dict[str, Any]:
        """What JSON has of it: the report's fields, and what they tell."""
        made = self.made
        named = {"seq_len": self.mask.q_len, "layout": self.layout, "network": self.network, "speed": self.speed}
        told = {
            "transport": self.transport,
            "auto": self.asked == "auto",
            "pairs": int(self.pairs.sum()),
            "sent_per_rank": made.sent / made.world_size,
            "sent_backward_per_rank": made.sent_backward / made.world_size,
            "sent_over_needed": made.sent / made.needed if made.needed else None,
        }
        return {**named, **asdict(made), **told}

    def passes(self, rank: int) -> tuple[Timeline, Timeline]:
        """The forward and backward pass of a rank, as `scaling.report` models the slowest: with the heads of who has most."""
        shares = deal(self.shape.heads, self.shape.heads_k, self.made.inner)
        machine = (of_busiest(self.shape, shares), SPEEDS[self.speed], NETWORKS[self.network])
        walk, back = (self.team_plan(rank // self.made.inner, backward) for backward in (False, True))
        first, last = most_head_bytes(self.shape, shares, self.held)
        return timeline(walk, *machine, False, first), timeline(back, *machine, True, last)

    def column(self, rank: int | None = None) -> Column:
        """What a picture shows of it; the timeline of a rank, of the slowest where None."""
        if rank is None:
            rank = self.made.slowest * self.made.inner
            whose = f"rank {rank}, the slowest"
        else:
            whose = f"rank {rank}"
        walk = f"{whose}: {SPEEDS[self.speed].name}; {NETWORKS[self.network].name}"
        return Column(self.title, self.mask, self.teams, self.per_rank(self.pairs), walk, *self.passes(rank))


def measure(mask: Mask, held: Layout, shape: Shape, *, layout: str, transport: str, inner: int, network: str, speed: str) -> Row:
    """A configuration's row; ``auto`` picks as `ContextParallel` does."""
    machine, asked = (SPEEDS[speed], NETWORKS[network]), transport
    if asked == "auto" and inner == 1 and held.world_size > 1:
        transport = ALL_TO_ALL if best_transport(mask, held, shape, *machine) == ALL_TO_ALL else "auto"
    made = report(mask, held, transport, shape, *machine, inner=inner)
    return Row(mask, held, layout, asked, made.transport if transport == "auto" else transport, network, speed, shape, made)


def plan_dict(walk: RankPlan) -> dict[str, Any]:
    """A rank's plan for JSON: what `str` of it says, whole."""

    def moves(messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [{"peer": m.peer, "rows": m.rows.tolist()} for m in messages]

    steps = [
        {
            "rows": step.size,
            "send": moves(step.send),
            "receive": moves(step.receive),
            "own": step.own.tolist(),
            "calls": [{"window": list(calls.window), "spans": calls.spans.tolist()} for calls in step.calls],
        }
        for step in walk.steps
    ]
    counted = ("rank", "world_size", "q_rows", "k_rows", "num_calls", "num_merges", "rows_sent", "grad_rows_sent", "pairs")
    return {**{name: getattr(walk, name) for name in counted}, "steps": steps}


def table(rows: Sequence[Row], tiles: bool = False) -> str:
    """The rows for people; what the row above says of the same configuration is left out.

    Args:
        rows: at least one.
        tiles: also the balance of tiles, where every rank was planned.
    """
    lines = [_cells(row, tiles) for row in rows]
    said = {name: {line[n][1] for line in lines} for n, (name, _) in enumerate(lines[0])}
    unsaid = ["tokens"] * (len(said["tokens"]) == 1) + ["team"] * (said["team"] == {""})
    kept = [n for n, (name, _) in enumerate(lines[0]) if name not in unsaid]
    header = [lines[0][n][0] for n in kept]
    body = [[line[n][1] for n in kept] for line in lines]
    for n, (above, row) in enumerate(pairwise(rows), start=1):
        if above.key == row.key:
            body[n][:-4] = [""] * (len(kept) - 4)
    widths = [max(map(len, cells)) for cells in zip(header, *body, strict=True)]
    pad = [str.ljust if name in ("layout", "transport", "network") else str.rjust for name in header]
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(pad, cells, widths, strict=True)).rstrip() for cells in [header, *body])


def _cells(row: Row, tiles: bool) -> list[tuple[str, str]]:
    """The columns of a row and what they say; the last four depend on the network."""
    made, world = row.made, row.made.world_size
    return [
        ("ranks", str(world)),
        ("tokens", tokens(row.mask.q_len)),
        ("team", str(made.inner) if made.inner > 1 and row.transport != ALL_TO_ALL else ""),
        ("layout", row.layout),
        ("transport", row.way),
        ("balance", f"{made.balance:.3f}"),
        *([("tiles", f"{made.tile_balance:.3f}")] if tiles else []),
        ("sent", size(made.sent)),
        ("a rank", size(made.sent / world)),
        ("/needed", f"{made.sent / made.needed:.2f}" if made.needed else "-"),
        ("backward", size(made.sent_backward)),
        ("a rank", size(made.sent_backward / world)),
        ("calls", f"{made.calls:,}"),
        ("merges", f"{made.merges:,}"),
        ("network", row.network),
        ("fwd ms", figures(made.forward * 1e3)),
        ("bwd ms", figures(made.backward * 1e3)),
        ("efficiency", f"{made.efficiency:.1%}"),
    ]


def size(count: float) -> str:
    """Bytes in three figures or more.

    Example:
        >>> size(0), size(1536), size(30_064_771_072)
        ('0 B', '1.54 kB', '30.1 GB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, _ = count / 1000, units.pop(0)
    return f"{count:,.0f} B" if units[0] == "B" else f"{figures(count)} {units[0]}"
