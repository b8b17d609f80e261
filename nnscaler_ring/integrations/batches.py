"""Batches for models of transformers: what `Attention.shard_batch` knows of one, and what its tensors say of documents."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.call import host_table
from ..core.mask import check_cu_seqlens

IGNORED = -100
"""The label of a token without a loss."""

TOKENS = ("input_ids", "inputs_embeds")
ROWS = ("labels", "attention_mask", "position_ids", "seq_idx")
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PARTS = (*TOKENS, *ROWS, *BOUNDS, "num_items_in_batch")
"""What `Attention.shard_batch` knows of a batch."""

TOLD = "Pass what shard_batch gives, positions of ContextParallel.position_ids, or cu_seq_lens_q, the documents' boundaries"


def check_batch(batch: Any) -> dict[str, Any]:
    """What is in a batch; ValueError where a tensor does not fit, or would have to be cut in a way that is not known here."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a mapping of names to tensors, not {type(batch).__name__}")
    batch = {name: x for name, x in batch.items() if x is not None}
    if not batch.keys() & set(TOKENS):
        raise ValueError(f"no input_ids or inputs_embeds among {sorted(batch)}")
    if wrong := [name for name in (*TOKENS, *ROWS) if name in batch and not isinstance(batch[name], Tensor)]:
        raise ValueError(f"{', '.join(wrong)}: give tensors")
    sizes = {name: tuple(batch[name].shape[:2]) for name in TOKENS if name in batch}
    if len(set(sizes.values())) > 1 or any(batch[name].dim() != 2 + (name == "inputs_embeds") for name in sizes):
        shapes = {name: tuple(batch[name].shape) for name in sizes}
        raise ValueError(f"tokens of shapes {shapes}: give input_ids [B, S] or inputs_embeds [B, S, features]")
    (rows, length) = next(iter(sizes.values()))
    others = [name for name, x in batch.items() if name not in PARTS and _has_rows(x)]
    others += [name for name in ("logits_to_keep", "num_logits_to_keep") if name in batch]
    others += ["output_router_logits"] * bool(batch.get("output_router_logits"))
    if others:
        raise ValueError(
            f"{', '.join(others)}: not known here, and a model would take the whole for this rank's. Leave out what is not needed; "
            "cut what goes with tokens with ContextParallel.shard, and put it into the result; embed images and sounds before, on "
            "every rank; token types by which a model lets tokens see later ones are not done"
        )
    for name in ROWS:
        x = batch.get(name)
        kinds = name == "position_ids" and x is not None and x.dim() == 3  # of text, time, height, width
        if x is not None and (x.dim() != 2 + kinds or x.shape[-1] != length or x.shape[-2] not in (1, rows)):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give [B, S] for tokens {(rows, length)}")
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is not None and labels.shape[0] != rows:
        raise ValueError(f"labels of {labels.shape[0]} rows for {rows}")
    if labels is not None and labels.is_floating_point():
        raise ValueError(f"labels of {labels.dtype}: give numbers of tokens, {IGNORED} for none")
    if mask is not None and ((mask != 0) & (mask != 1)).any():
        raise ValueError(
            "attention_mask of other numbers than 0 and 1, as one that is added to scores: give 1 for tokens, 0 for padding"
        )
    if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("attention_mask with padding before tokens: pad at the end, or pack the documents into one row")
    return batch


def _has_rows(x: Any) -> bool:
    """A tensor that may be of tokens, or something that holds one."""
    if isinstance(x, Mapping):
        x = list(x.values())
    return any(map(_has_rows, x)) if isinstance(x, (list, tuple)) else isinstance(x, Tensor) and x.dim() > 0


def content_of(x: Tensor | None) -> str | None:
    """A short string that tensors of one shape, dtype and content share."""
    if x is None:
        return None
    data = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tuple(x.shape)} {x.dtype} {sha256(data).hexdigest()[:16]}"


def alike(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tables hold the same numbers, in whatever dtype."""
    return other is not None and one.tolist() == other.tolist()


def labels_of(labels: Tensor, cu: np.ndarray, mask: Tensor | None, shifted: bool) -> Tensor:
    """For each token the next one of its document, none at its end, or its own; ValueError for one of padding."""
    if shifted:
        labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].clone()
        labels[:, cu[1:] - 1] = IGNORED
    if mask is not None and ((labels != IGNORED) & (mask == 0)).any():
        raise ValueError(f"labels on padding, which sees other tokens here: set them to {IGNORED}")
    return labels


def boundaries(cu_seqlens: Tensor | None, positions: Tensor | None, length: int, mask: Tensor | None = None) -> np.ndarray:
    """Boundaries of the documents, int64 ``[0, ..., length]``; of positions ``[kinds, B, S]`` only given ones, or one document."""
    table = host_table("cu_seqlens", cu_seqlens)
    if positions is not None and positions.dim() == 3:
        begins = (positions == 0).all(0) if mask is None else (positions == 0).all(0) & (mask != 0)
        begin = begins.any(0).nonzero().flatten().tolist()
        if table is None and begin not in ([], [0]):
            raise ValueError(f"position_ids of several kinds begin anew at tokens {begin}: give cu_seqlens")
        positions = None
    if table is not None:
        cu = check_cu_seqlens("cu_seqlens", table.numpy(), length)
        if positions is not None and (begin := sorted(set(starts(positions.cpu().numpy())) - set(cu.tolist()))):
            raise ValueError(f"position_ids begin anew at {[int(at) for at in begin]}, where cu_seqlens has no boundary")
        return cu
    if positions is None:
        return np.array([0, length])
    return starts(positions.cpu().numpy())


def check_numbers(seq_idx: Tensor | None, cu_seqlens: np.ndarray) -> None:
    """ValueError where the numbers of the documents, ``[B or 1, S]``, change inside one."""
    if seq_idx is None:
        return
    changes = {int(at) + 1 for at in (seq_idx[:, 1:] != seq_idx[:, :-1]).any(0).nonzero()}
    if inside := sorted(changes - set(cu_seqlens.tolist())):
        raise ValueError(f"seq_idx changes at {inside}, where the documents have no boundary: give cu_seqlens, or position_ids")


def check_order(positions: np.ndarray, cu_seqlens: np.ndarray) -> None:
    """ValueError where positions fall inside a document, but for padding at its end, where all are alike.

    These are then tokens in the order of another layout, or of documents that the boundaries miss.
    """
    inside = ~np.isin(np.arange(1, positions.shape[1]), cu_seqlens)
    for row, at in zip(*np.nonzero((np.diff(positions, axis=1) < 0) & inside), strict=True):
        rest = positions[row, at + 1 : cu_seqlens[np.searchsorted(cu_seqlens, at + 1, side="right")]]
        if (rest != rest[0]).any():
            raise ValueError(
                f"position_ids fall from {positions[row, at]} to {rest[0]} inside a document of cu_seq_lens_q, at token {at + 1}: "
                f"give tokens as the layout holds them, and all boundaries. {TOLD}"
            )


def starts(positions: np.ndarray) -> np.ndarray:
    """The boundaries of the documents whose tokens have these positions, ``[B or 1, S]``."""
    if positions.ndim != 2 or (positions != positions[:1]).any():
        raise ValueError("position_ids must be [B or 1, S] with equal rows: pack all documents into one row")
    row = positions[0]
    jumps = np.flatnonzero(np.diff(row) != 1) + 1
    if row[jumps].any():
        raise ValueError(f"position_ids neither go on by 1 nor begin anew at 0. {TOLD}")
    return np.concatenate([[0], jumps, [len(row)]])
