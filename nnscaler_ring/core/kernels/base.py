"""The interface that every kernel backend has, small enough to write one in an afternoon.

Legend: `B` batch, `L` query rows, `M` key rows, `Hq`/`Hk` heads, `D`/`Dv` head dims. ``ValueError`` means that the user is wrong,
``NotImplementedError`` that this backend cannot: the registry then tries the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..intervals import coalesce
from ..merge import Results
from ..sums import Sum

Spans = np.ndarray
"""``[n, 4]`` ``(i0, i1, j0, j1)``: rows ``i0:i1`` of q read rows ``j0:j1`` of k and v. No two spans share a query row."""

Window = tuple[int, int]
"""``(left, right)`` aligned at each span's last row and last key; -1 for no limit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """How scores and weights are made, besides who sees whom.

    The score of query row `i` and key row `j` in a head is ``softcap * tanh(scale * q.k / softcap)`` (``scale * q.k`` for a soft
    cap of 0), less ``alibi * |distance|``, plus ``bias``; ``distance = k_at[j] - q_at[i] - ahead[i]``. Dropout drops the *weight*
    of a pair and divides the others by ``1 - dropout``; log-sum-exps are of all weights.

    Attributes:
        scale, softcap: see above.
        alibi: slopes ``[B or 1, Hq]``, fp32, or None.
        bias: ``[Hq or 1, L, T]`` for these query rows and the *positions* of keys, or None: row `j` has ``bias[:, :, k_at[j]]``.
        dropout: probability, 0 for none.
        seed, batch0, head0: with the positions the counter of the generator, see `philox`; `batch0` and `head0` are the numbers of
            the first batch row and head that are passed.
        q_at, k_at: positions in the whole sequence of query rows ``[L]`` and of key rows ``[M]``, int64; None where neither alibi,
            bias nor dropout is there to need them.
        ahead: by how much positions of keys run ahead of those of queries, int64 ``[L]``; None for 0.
        merged: out is to be merged with that of other calls: fp32 where the backend has it, so that it is rounded once.
    """

    scale: float
    softcap: float = 0.0
    alibi: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    seed: int = 0
    batch0: int = 0
    head0: int = 0
    q_at: Tensor | None = None
    k_at: Tensor | None = None
    ahead: Tensor | None = None
    merged: bool = False

    def of_heads(self, heads: slice) -> Scores:
        """For some of the query heads."""
        alibi = None if self.alibi is None else self.alibi[:, heads]
        bias = self.bias if self.bias is None or self.bias.shape[0] == 1 else self.bias[heads]
        return replace(self, alibi=alibi, bias=bias, head0=self.head0 + (heads.start or 0))

    @property
    def features(self) -> frozenset[str]:
        """What a backend must have for these scores."""
        given = {"softcap": self.softcap, "alibi": self.alibi is not None, "bias": self.bias is not None, "dropout": self.dropout}
        return frozenset(name for name, there in given.items() if there)


def philox(q_at: Tensor, k_at: Tensor, head: Tensor, batch: Tensor, seed: int) -> Tensor:
    """The generator of dropout, Philox 4x32-10 (Salmon et al., 2011): a word in ``[0, 2**32)`` for each pair, int64, broadcast.

    The counter is ``(query position, key position, head, batch row)``, the key the halves of `seed`, the result the first word. A
    pair is dropped where it is below ``round(p * 2**32)``: the same pairs whoever computes them.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> hex(philox(zero, zero, zero, zero, 0).item())
        '0x6627e8d5'
    """
    mask = 0xFFFFFFFF

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # high and low words, in 64 bits with a sign
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & mask

    c0, c1, c2, c3 = q_at, k_at, head, batch
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        high_b, low_b = product(0xCD9E8D57, c2)
        high_a, low_a = product(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


def _unit(x: Tensor) -> Tensor:
    """The least power of 2, 1 or more, by which `x` must be divided to fit into fp16; itself one that fits."""
    most = 2.0**15
    return torch.exp2(torch.ceil(torch.log2(x.abs().amax() / most))).nan_to_num_(nan=1.0).clamp_(1.0, most)


@dataclass(frozen=True)
class Case:
    """What the choice of a backend depends on; `features` are names that `Scores.features` gives, and ``d_lse``."""

    device: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    heads: int
    heads_k: int
    deterministic: bool = False
    features: frozenset[str] = frozenset()

    def __str__(self) -> str:
        named = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.heads}/{self.heads_k} heads of {self.head_dim}, values of {self.head_dim_v}"
        more = [*["deterministic"] * self.deterministic, *sorted(self.features - {"d_lse"})]
        return ", ".join([f"{named} on {self.device}", sizes, *more])


class Kernel(ABC):
    """A backend: attention over spans that share a window, forward with its log-sum-exp, backward from the global one."""

    name: str
    label: str = ""
    """Tells backends of one name and device apart, as versions of a library."""
    features: frozenset[str] = frozenset()
    """What it has of `Scores.features`."""
    takes_d_lse: bool = False
    """`backward` looks at `Grad.d_lse`."""
    rounds: bool = False
    """`backward` gives each span's gradients of keys and values once, in their dtype; else it adds to them in the exact one."""

    def check(self, case: Case) -> None:
        """Nothing, or NotImplementedError that says what this backend lacks for `case`."""
        if lacking := sorted(case.features - self.features - {"d_lse"}):
            raise NotImplementedError(f"it has no {', '.join(lacking)}")
        through_a_value = "d_lse" in case.features and not self.takes_d_lse  # see `differentiate`
        self.check_sizes(replace(case, head_dim_v=case.head_dim_v + 1) if through_a_value else case)

    def offers(self, case: Case) -> bool:
        """Whether ``auto`` may take it; by its name it can be had in any case."""
        return True

    @abstractmethod
    def check_sizes(self, case: Case) -> None:
        """The part of `check` about device, dtype and sizes."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        """Attention of each span.

        Args:
            q: ``[B, L, Hq, D]``, any strides with the last dim contiguous, as k ``[B, M, Hk, D]`` and v ``[B, M, Hk, Dv]``.
            spans: the rows, trimmed: every row of a span sees a key of it.
            window: the window they share.
            scores: how scores are made.

        Returns:
            out ``[B, n, Hq, Dv]`` in q's dtype or, where the backend has it, fp32, and lse ``[B, Hq, n]`` (natural log, fp32,
            float64 for float64) of the spans' rows, span after span.
        """

    def merge(self, results: Results, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        """Add each span's part to the results of q's rows: here as a part that `forward` gives, else in place."""
        out, lse = self.forward(q, k, v, spans, window, scores)
        results.add(coalesce(spans[:, :2]), out, lse.transpose(1, 2).unsqueeze(3))

    def differentiate(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        """`backward` with the gradient of the log-sum-exp, also for a backend that does not take one.

        Such a backend gets one more column: 1 in v and `d_lse` in d_out, which adds `d_lse` to the gradient of every weight, and 0
        in out, so that ``out . d_out`` stays as it is. So it must be without dropout, and take values one wider. In place of 1
        stands a power of 2 where fp16 would not hold `d_lse`.
        """
        if grad.d_lse is None or self.takes_d_lse:
            self.backward(grad, k, v, spans, window, scores)
            return
        column = grad.d_lse.transpose(1, 2).unsqueeze(3)
        unit = _unit(column) if v.dtype == torch.float16 and column.numel() else 1.0
        column = (column / unit).to(grad.d_out.dtype)
        d_out, out = torch.cat([grad.d_out, column], 3), torch.cat([grad.out, torch.zeros_like(column)], 3)
        wide = torch.cat([v, torch.ones_like(v[..., :1]) * unit], 3)
        dv = Sum(wide)
        self.backward(replace(grad, d_out=d_out, out=out, dv=dv, d_lse=None), k, wide, spans, window, scores)
        grad.dv.add(np.array([[0, v.shape[1]]]), dv.total()[..., :-1])

    @abstractmethod
    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        """Add each span's part of dq, dk and dv to the sums in `grad`: as parts that they `add`, or in place, in their `total` or
        where they `place` it."""


@dataclass(frozen=True, eq=False)
class Grad:
    """What a backward call reads of the queries and where it adds.

    Attributes:
        q, out, d_out: ``[B, L, Hq, D or Dv]``; `out` is the result over *all* keys, not of one call.
        lse: ``[B, Hq, L]`` over all keys.
        dq: the sum ``[B, L, Hq, D]`` of the queries.
        dk, dv: the sums ``[B, M, Hk, D or Dv]`` of the buffer's rows.
        d_bias: accumulator like `Scores.bias`, or None where its gradient is not asked for.
        d_lse: ``[B, Hq, L]`` gradient of `lse`, or None: it adds to that of every score, by the weight before dropout.
    """

    q: Tensor
    out: Tensor
    d_out: Tensor
    lse: Tensor
    dq: Sum
    dk: Sum
    dv: Sum
    _: KW_ONLY
    deterministic: bool = False
    d_bias: Tensor | None = None
    d_lse: Tensor | None = None

    @property
    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv to add to in place."""
        return self.dq.total(), self.dk.total(), self.dv.total()
