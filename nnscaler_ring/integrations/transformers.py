"""Hugging Face transformers, 4.48 and newer: an attention implementation bound to a `ContextParallel`.

A model's layers call the implementation that their config names, with this rank's tokens. What a layer says (scale, window, soft
cap, sinks, dropout) goes to `ContextParallel.attention`; which tokens these are is said by the batch: `Attention.shard_batch` cuts
one, and gives boundaries of packed documents and positions along. What a process keeps are the name in
transformers' tables, a mark on a model's modules and, where nnscaler traces, two methods of those tables.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..annotations import nnscaler
from ..annotations.dtensor import local
from ..context import ContextParallel
from ..core.agree import asked, check_alike
from ..core.call import announced, host_table
from ..core.layouts import looks_at_documents
from ..core.mask import check_cu_seqlens
from ..core.transport import transport_of
from . import families

IGNORED = -100
"""The label of a token without a loss."""

REMEMBERED = 16
"""Tensors that told of documents and are remembered, two a batch of `shard_batch`."""


_APPLIED = "_nnscaler_ring_attention"
"""Where a module keeps the `_Applied` of the `Attention` that it was given."""


class _Applied:
    """The name and the target of an `Attention`: one made later under the same name may have another target.

    Of this process: a module that was saved and loaded has none.
    """

    def __init__(self, name: str, target: str) -> None:
        self.name, self.target = name, target

    def __deepcopy__(self, memo: Any) -> _Applied:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


class Attention:
    """An attention implementation of transformers, registered under a name when it is made.

    Args:
        target: a `ContextParallel` whose ranks each pass their shard of the tokens, or a ``wrap_*_attn_func`` op for a model that
            nnscaler cuts, or that runs on DTensors or whole.
        name: by which models find it; each target needs its own.
        any_model: take models also of families that are not in `families.FAMILIES`, those compared with one device. Others may look
            at other tokens outside of their attention, which nobody would notice.

    Raises:
        ValueError: a name that transformers takes for one of its own.

    Example:
        >>> attention = Attention(ContextParallel(None, layout="zigzag"))
        >>> # model = attention.apply(AutoModelForCausalLM.from_pretrained("..."))
        >>> # loss = model(**attention.shard_batch({"input_ids": input_ids, "labels": labels})).loss
    """

    _hint = "give shard_batch the boundaries"

    def __init__(self, target: ContextParallel | Callable[..., Any], name: str = "nnscaler_ring", any_model: bool = False) -> None:
        if any(word in name for word in ("flash", "paged", "eager", "sdpa", "flex")):
            raise ValueError(f"name={name!r}: transformers takes it for an implementation of its own")
        if not isinstance(target, ContextParallel) and not callable(target):
            raise ValueError(f"target {target!r}: give a ContextParallel, or a wrap_*_attn_func op")
        self.target = target
        self.name = name
        self.any_model = any_model
        self._padded = False
        self._applied = _Applied(name, str(target._recipe) if isinstance(target, ContextParallel) else repr(target))
        self._known: OrderedDict[tuple[Any, ...], _Told] = OrderedDict()
        register(name, self, refuse_masks)
        if not isinstance(target, ContextParallel) and "nnscaler" in sys.modules:
            _let_nnscaler_trace()

    def __repr__(self) -> str:
        return f"Attention({self.target!r}, name={self.name!r})"

    def __deepcopy__(self, memo: Any) -> Attention:
        return self  # a copy of a model shares its group

    @property
    def _world_size(self) -> int:
        return self.target.world_size if isinstance(self.target, ContextParallel) else 1

    def apply(self, model: Any) -> Any:
        """Make a model use this implementation; returns it.

        Raises:
            NotImplementedError: a model that would be wrong, or that nobody has compared with one device.
            ValueError: another `Attention` was made under this name since.
        """
        self._check_name()
        families.check_model(model, self.any_model)
        families.check_config(model.config, self._world_size)
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(self.name)
        else:  # before 4.53
            for module in model.modules():
                if hasattr(module, "config"):
                    module.config._attn_implementation = self.name
        for module in model.modules():
            setattr(module, _APPLIED, self._applied)
            if hasattr(module, "_update_causal_mask"):  # before 4.53: it makes a mask of all pairs
                module._update_causal_mask = _no_mask
        return model

    def _check_name(self) -> None:
        if registered(self.name)[0] is not self:
            self._refuse_name()

    def _refuse_name(self) -> NoReturn:
        raise ValueError(f"another Attention was made under the name {self.name!r}: give each a name=")

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What a layer calls.

        Args:
            query: ``[B, Hq, L, D]``; key ``[B, Hk, L, D]``; value ``[B, Hk, L, Dv]``.
            attention_mask: None; padding is for `shard_batch` to check.
            sliding_window: tokens that each one sees, itself counted, in the whole sequence.
            s_aux: logits ``[Hq]`` of learned sinks.
            kwargs: ``position_ids`` ``[B, L]`` and ``cu_seq_lens_q``, int32 boundaries of the documents packed in the whole row;
                without these positions begin anew in each document.

        Returns:
            ``[B, L, Hq, Dv]`` and None.

        Raises:
            ValueError: a mask; keys other than the queries'; positions that do not say where documents begin.
            NotImplementedError: attention weights asked for, or a kind of attention that is not told by its arguments.
        """
        applied = getattr(module, _APPLIED, None)
        if applied is not None and applied.name == self.name and applied.target != self._applied.target:
            self._refuse_name()
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        first = getattr(module, "layer_idx", None) == 0
        if first and not self.any_model:
            families.check_family(module.config)
        if first:
            families.check_config(module.config, self._world_size)
        families.check_layer(module, kwargs, causal, sliding_window)
        if attention_mask is not None:
            raise ValueError(_NO_MASK)
        if key.shape[2] != query.shape[2]:
            raise ValueError(
                f"{query.shape[2]} queries and {key.shape[2]} keys: generation with a cache and cross attention are not cut; pass "
                f"use_cache=False, or {_GENERATE}"
            )
        if self._padded and not causal:
            raise NotImplementedError("padding without a causal mask, where tokens see it: pack the documents into one row")
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        options: dict[str, Any] = {"softmax_scale": scaling, "dropout_p": dropout, "softcap": softcap or 0.0}
        options |= {"learnable_sink": s_aux, "window_size": window}
        if not isinstance(self.target, ContextParallel):
            traced = nnscaler.tracing()  # what tensors contain is not known then
            cu_seqlens = kwargs.get("cu_seq_lens_q") if traced else self._documents(kwargs, query.shape[2], first)[0]
            return self.target(q, k, v, causal=causal, cu_seqlens=cu_seqlens, **options), None
        cu_seqlens, seq_len = self._documents(kwargs, query.shape[2], first)
        out = self.target.attention(q, k, v, "causal" if causal else "full", cu_seqlens=cu_seqlens, seq_len=seq_len, **options)
        assert isinstance(out, Tensor)
        return out, None

    def _documents(self, kwargs: Mapping[str, Any], tokens: int, first: bool) -> tuple[Tensor | None, int | None]:
        """Boundaries of the documents, None for one, and the tokens of the whole sequence, None where ranks hold as many each.

        What a batch says that `shard_batch` did not make is looked at in the `first` layer, once a forward pass.
        """
        cu_seqlens, position_ids = local(kwargs.get("cu_seq_lens_q")), kwargs.get("position_ids")
        if torch.compiler.is_compiling():
            if cu_seqlens is None:
                raise NotImplementedError("documents under torch.compile: pass cu_seq_lens_q, as shard_batch does")
            if isinstance(self.target, ContextParallel) and self.target._uneven:
                raise NotImplementedError("ranks with different numbers of tokens under torch.compile: pad the row")
            return cu_seqlens, None
        said = cu_seqlens if position_ids is None else position_ids
        if said is None:
            if self._world_size > 1:
                raise ValueError(f"the model does not tell attention which tokens these are. {_TOLD}")
            return None, None
        known = self._known.get(key := _identity(said))
        if known is None or (first and not known.ours):
            table = host_table("cu_seq_lens_q", cu_seqlens)
            known = self._remember(said, table if position_ids is None else self._read(position_ids, tokens, table))
        self._known.move_to_end(key)
        if cu_seqlens is not None:
            self._agree(cu_seqlens, known, first)
        return self._told(known.cu_seqlens), int(known.cu_seqlens[-1])

    def _agree(self, cu_seqlens: Tensor, known: _Told, first: bool) -> None:
        """ValueError for boundaries that are not those of the tokens: beside positions that are known they would go unseen."""
        told = self._known.get(_identity(cu_seqlens))
        if told is None or (first and not told.ours):
            told = self._remember(cu_seqlens, host_table("cu_seq_lens_q", cu_seqlens))
        if told.cu_seqlens is not known.cu_seqlens and told.cu_seqlens.tolist() != known.cu_seqlens.tolist():
            raise ValueError(
                f"cu_seq_lens_q is {told.cu_seqlens.tolist()}, these tokens were cut with {known.cu_seqlens.tolist()}: {self._hint}"
            )

    def _told(self, cu_seqlens: Tensor) -> Tensor | None:
        """Boundaries as calls take them: None for one document, but for layouts that look at documents."""
        cp = self.target
        looks = isinstance(cp, ContextParallel) and looks_at_documents(cp._recipe.layout)
        return cu_seqlens if len(cu_seqlens) > 2 or looks else None

    def _remember(self, said: Tensor, cu_seqlens: Tensor | None, ours: bool = False) -> _Told:
        """For the layers to come; the tensor that said it is kept, so that no other is taken for it."""
        assert cu_seqlens is not None
        self._known[_identity(said)] = told = _Told(said, cu_seqlens, ours)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return told

    def _read(self, position_ids: Tensor, tokens: int, cu_seqlens: Tensor | None) -> Tensor:
        """Boundaries of the documents: from the positions of all ranks' tokens, or those given, which must fit the positions."""
        if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
            raise NotImplementedError(f"position_ids of shape {tuple(position_ids.shape)} for {tokens} tokens. {_TOLD}")
        cp = self.target
        if not isinstance(cp, ContextParallel) or cp.world_size == 1:
            if cu_seqlens is not None:
                return cu_seqlens
            whole = position_ids.full_tensor() if isinstance(position_ids, DTensor) else position_ids
            return torch.from_numpy(_starts(whole.cpu().numpy()))
        documents = None if cu_seqlens is None else self._told(cu_seqlens)
        length = None if cu_seqlens is None else int(cu_seqlens[-1])
        if length is None and tokens in cp._uneven:
            raise ValueError(
                f"ranks have had different numbers of tokens, so {tokens} here may be of several lengths: pass cu_seq_lens_q, "
                f"[0, S] for one sequence. {_TOLD}"
            )
        row = cp.unshard(position_ids.contiguous(), 1, cu_seqlens=documents, seq_len=length).cpu().numpy()
        held = [cp._layout(row.shape[1], documents).positions(rank) for rank in range(cp.world_size)]
        begins = set() if cu_seqlens is None else set(cu_seqlens.tolist())
        if all((row[0][at] == np.arange(len(at))).all() for at in held) and not {int(at[0]) for at in held} <= begins:
            raise ValueError(_UNTOLD.format(tokens - 1))
        if cu_seqlens is None:
            return torch.from_numpy(_starts(row))
        _check_order(row, cu_seqlens.numpy())
        return cu_seqlens

    def shard_batch(
        self, batch: Mapping[str, Any], cu_seqlens: Tensor | None = None, device: torch.device | str | None = None
    ) -> dict[str, Any]:
        """This rank's part of a batch that every rank has whole.

        Args:
            batch: ``input_ids`` or ``inputs_embeds`` ``[B, S(, ...)]``, and where there are any ``position_ids`` ``[B or 1, S]``,
                which begin at 0 in each document; ``cu_seq_lens_q``; ``attention_mask`` ``[B, S]`` of ones, or with padding at the
                end where attention is causal; ``labels`` ``[B, S]``, unshifted, -100 for none; ``num_items_in_batch``, tokens with
                a loss of all the batches that make a step. What is no tensor is passed on.
            cu_seqlens: int32 boundaries of documents packed in the row ``[0, ..., S]``; what the batch says where None.
            device: of the result; that of the batch where None.

        Returns:
            The batch for the model: shards, with ``position_ids`` and ``cu_seq_lens_q`` (of the whole row). With labels also
            ``shift_labels``, the next tokens of this rank's tokens, none across documents, and ``num_items_in_batch`` over the
            number of ranks: so the mean of the ranks' losses, and of their gradients as DDP and FSDP take it, is that of one
            device. Where the library's loss does not take ``shift_labels`` (4.48), no labels: see `next_token_loss`.

        Raises:
            ValueError: no tokens, fewer than ranks; tensors that do not fit, or that are none of these; a mask with padding that is
                not at the end; labels on padding.

        Example:
            >>> attention = Attention(ContextParallel(None))  # of one rank
            >>> row = torch.tensor([[5, 6, 7]])
            >>> batch = attention.shard_batch({"input_ids": row, "labels": row})
            >>> batch["shift_labels"].tolist(), batch["position_ids"].tolist()
            ([[6, 7, -100]], [[0, 1, 2]])
        """
        cp = self.target
        if not isinstance(cp, ContextParallel):
            raise ValueError(f"{self!r} takes whole batches: pass it a ContextParallel to cut them")
        self._check_name()
        with announced(cp._recipe.group):
            whole = _checked({name: x for name, x in batch.items() if x is not None})
            tokens = whole[next(name for name in TOKENS if name in whole)]
            length = tokens.shape[1]
            if cu_seqlens is not None and "cu_seq_lens_q" in whole:
                raise ValueError("cu_seq_lens_q in the batch and cu_seqlens: give one")
            if "cu_seq_lens_k" in whole and not _alike(whole["cu_seq_lens_k"], whole.get("cu_seq_lens_q", cu_seqlens)):
                raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q: tokens see their own documents; give one")
            mask, positions, items = (whole.get(name) for name in ("attention_mask", "position_ids", "num_items_in_batch"))
            cu = _boundaries(whole.get("cu_seq_lens_q", cu_seqlens), positions, length)
            table = torch.from_numpy(cu)
            documents = self._told(table)
            counts = cp._layout(length, documents).counts
            if not counts.all():
                raise ValueError(
                    f"a row of {length} tokens gives the ranks {counts.tolist()}: models take one or more each; pad it at its end"
                )
            following = None if "labels" not in whole else _next_labels(whole["labels"], cu, mask)
        if asked():
            facts: dict[str, object] = {f"{name} of the batch": _content(whole.get(name)) for name in (*TOKENS, *ROWS)}
            facts |= {"the boundaries of the documents": cu.tolist(), "num_items_in_batch": None if items is None else float(items)}
            check_alike(transport_of(cp._recipe.group), "what cuts a batch", facts, torch.device("cpu"))
        self._padded |= mask is not None and not bool(mask.all())
        out = {name: x for name, x in whole.items() if name not in PARTS}
        out |= {name: cp.shard(whole[name], 1, cu_seqlens=documents).to(device) for name in TOKENS if name in whole}
        own = (
            cp.position_ids(length, cu_seqlens=documents).unsqueeze(0)
            if positions is None
            else cp.shard(positions, 1, cu_seqlens=documents)
        )
        out["position_ids"] = _counted(own.to(tokens.device if device is None else device))
        self._remember(out["position_ids"], table, ours=True)
        out["cu_seq_lens_q"] = out["cu_seq_lens_k"] = _counted(table.to(torch.int32))
        self._remember(out["cu_seq_lens_q"], table, ours=True)
        if following is not None:
            out["shift_labels"] = cp.shard(following, 1, cu_seqlens=documents).to(device)
            if _takes_shift_labels():
                out["labels"] = out["shift_labels"]
            count = (following != IGNORED).sum() if items is None else items
            out["num_items_in_batch"] = max(float(count), 1.0) / cp.world_size  # no tensor: mixed precision would round it
        return out


TOKENS = ("input_ids", "inputs_embeds")
ROWS = ("labels", "attention_mask", "position_ids")
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PARTS = (*TOKENS, *ROWS, *BOUNDS, "num_items_in_batch")
"""What `Attention.shard_batch` knows of a batch."""


class _Told(NamedTuple):
    """What a tensor said of documents, and whether it is one that `Attention.shard_batch` made."""

    by: Tensor
    cu_seqlens: Tensor
    ours: bool


def _checked(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch; ValueError where a tensor does not fit, or would have to be cut in a way that is not known here."""
    if not batch.keys() & set(TOKENS):
        raise ValueError(f"no input_ids or inputs_embeds among {sorted(batch)}")
    if wrong := [name for name in (*TOKENS, *ROWS) if name in batch and not isinstance(batch[name], Tensor)]:
        raise ValueError(f"{', '.join(wrong)}: give tensors")
    tokens = batch[next(name for name in TOKENS if name in batch)]
    others = [name for name, x in batch.items() if name not in (*TOKENS, *PARTS) and isinstance(x, Tensor) and x.dim()]
    others += [name for name in ("logits_to_keep", "num_logits_to_keep") if name in batch]
    others += ["output_router_logits"] * bool(batch.get("output_router_logits"))
    if others:
        raise ValueError(
            f"{', '.join(others)}: not known here, and a model would take the whole for this rank's; leave it out, or cut it with "
            "ContextParallel.shard and put it into the result"
        )
    for name in ROWS:
        x = batch.get(name)
        if x is not None and (x.dim() != 2 or x.shape[1] != tokens.shape[1] or x.shape[0] not in (1, tokens.shape[0])):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give [B, S] for tokens {tuple(tokens.shape[:2])}")
    if batch.get("labels", tokens).shape[0] != tokens.shape[0]:
        raise ValueError(f"labels of {batch['labels'].shape[0]} rows for {tokens.shape[0]}")
    mask = batch.get("attention_mask")
    if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("attention_mask with padding before tokens: pad at the end, or pack the documents into one row")
    return batch


def _content(x: Tensor | None) -> str | None:
    """The same for tensors of one shape, dtype and content."""
    if x is None:
        return None
    data = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tuple(x.shape)} {x.dtype} {sha256(data).hexdigest()[:16]}"


def _alike(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.tolist() == other.tolist()


def _next_labels(labels: Tensor, cu: np.ndarray, mask: Tensor | None) -> Tensor:
    """For each token the next one of its document, none at its end; ValueError for one that is predicted from padding."""
    following = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].clone()
    following[:, cu[1:] - 1] = IGNORED
    if mask is not None and ((following != IGNORED) & (mask == 0)).any():
        raise ValueError(f"labels on padding, which sees other tokens here: set them to {IGNORED}")
    return following


def next_token_loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The loss of this rank's tokens, of a batch that `Attention.shard_batch` made: what a model returns as ``loss``.

    Args:
        logits: ``[B, L, vocabulary]``; taken to fp32.
        batch: with ``shift_labels`` ``[B, L]`` and ``num_items_in_batch``.

    Returns:
        a scalar, fp32; its mean over the ranks is the loss of one device.

    Example:
        >>> batch = {"shift_labels": torch.tensor([[1, 0, -100]]), "num_items_in_batch": 2.0}
        >>> round(next_token_loss(torch.zeros(1, 3, 2), batch).item(), 4)
        0.6931
    """
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["shift_labels"].flatten(), reduction="sum")
    return losses / batch["num_items_in_batch"]


def _takes_shift_labels() -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return "shift_labels" in inspect.signature(ForCausalLMLoss).parameters


def _identity(x: Tensor) -> tuple[Any, ...]:
    """The same for a tensor and a detached one, as recomputation makes it; another after it was written to."""
    return x.data_ptr(), tuple(x.shape), x.stride(), None if x.is_inference() else x._version


def _counted(x: Tensor) -> Tensor:
    """The tensor as one that counts what is written to it, which none does that was made in inference mode."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


_TOLD = "Pass what shard_batch gives, positions of ContextParallel.position_ids, or cu_seq_lens_q, the documents' boundaries"
_GENERATE = (
    "for generate() take another implementation, model.set_attn_implementation('sdpa'); a cache of a cut prompt has this rank's "
    "tokens alone: gather it first (docs/transformers.md, 'Prefill, then decode')"
)
_UNTOLD = f"position_ids are 0 .. {{}} on every rank, as a model counts where none are given. {_TOLD}; {_GENERATE}"
_NO_MASK = (
    "an attention_mask: whole rows and packed documents need none here; leave it out (shard_batch checks and drops it), pass "
    f"position_ids that begin anew in each document for packed rows; and call Attention.apply(model); {_GENERATE}"
)


def refuse_masks(*args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """In place of a mask, which no layer needs here: an error where one would say more than a layer's arguments do."""
    if attention_mask is not None:
        raise ValueError(_NO_MASK)
    if use_vmap:
        raise NotImplementedError("a mask function of the model's own, which its layers do not tell: take another implementation")


def _no_mask(*args: Any, **kwargs: Any) -> None:
    refuse_masks(attention_mask=args[0] if args else kwargs.get("attention_mask"))


def _boundaries(cu_seqlens: Tensor | None, positions: Tensor | None, length: int) -> np.ndarray:
    """Boundaries of the documents, int64 ``[0, ..., length]``."""
    table = host_table("cu_seqlens", cu_seqlens)
    if table is not None:
        cu = check_cu_seqlens("cu_seqlens", table.numpy(), length)
        if positions is not None and (begin := sorted(set(_starts(positions.cpu().numpy())) - set(cu.tolist()))):
            raise ValueError(f"position_ids begin anew at {[int(at) for at in begin]}, where cu_seqlens has no boundary")
        return cu
    if positions is None:
        return np.array([0, length])
    return _starts(positions.cpu().numpy())


def _check_order(positions: np.ndarray, cu_seqlens: np.ndarray) -> None:
    """ValueError where positions fall inside a document, but for padding at its end, where all are alike.

    These are then tokens in the order of another layout, or of documents that the boundaries miss.
    """
    inside = ~np.isin(np.arange(1, positions.shape[1]), cu_seqlens)
    for row, at in zip(*np.nonzero((np.diff(positions, axis=1) < 0) & inside), strict=True):
        rest = positions[row, at + 1 : cu_seqlens[np.searchsorted(cu_seqlens, at + 1, side="right")]]
        if (rest != rest[0]).any():
            raise ValueError(
                f"position_ids fall from {positions[row, at]} to {rest[0]} inside a document of cu_seq_lens_q, at token {at + 1}: "
                f"give tokens as the layout holds them, and all boundaries. {_TOLD}"
            )


def _starts(positions: np.ndarray) -> np.ndarray:
    """The boundaries of the documents whose tokens have these positions, ``[B or 1, S]``."""
    if positions.ndim != 2 or (positions != positions[:1]).any():
        raise ValueError("position_ids must be [B or 1, S] with equal rows: pack all documents into one row")
    row = positions[0]
    jumps = np.flatnonzero(np.diff(row) != 1) + 1
    if row[jumps].any():
        raise ValueError(f"position_ids neither go on by 1 nor begin anew at 0. {_TOLD}")
    return np.concatenate([[0], jumps, [len(row)]])


def register(name: str, function: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make a function the attention implementation called `name`, and `mask` what makes its masks, where transformers asks."""
    for table, given in zip(_tables(), (function, mask), strict=False):
        table[name] = given


def _let_nnscaler_trace() -> None:
    """Give nnscaler's tracer, which reads the source of each function, what it misses in transformers 5; behaviour stays.

    The table of implementations takes two methods from `collections.abc`, whose source Python does not know; and a class is
    imported for type checkers only.
    """
    try:
        from transformers.utils import output_capturing
        from transformers.utils.generic import GeneralInterface
    except ImportError:  # before 5
        return
    from transformers import PreTrainedModel

    table: Any = GeneralInterface
    table.get, table.__contains__ = _get, _contains
    vars(output_capturing).setdefault("PreTrainedModel", PreTrainedModel)


def _get(self: Any, key: str, default: Any = None) -> Any:
    return self[key] if key in self else default  # noqa: SIM401


def _contains(self: Any, key: object) -> bool:
    return key in self._local_mapping or key in self._global_mapping


def registered(name: str) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """What transformers calls by a name: the attention and what makes its masks."""
    attention, *masks = (table.get(name) for table in _tables())
    return attention, masks[0] if masks else None


def _tables() -> list[dict[str, Callable[..., Any]]]:
    """The tables that all models look into, of attention and, from 4.53 on, of masks; before 4.50 the dict itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: list[Any] = [ALL_ATTENTION_FUNCTIONS]
    with suppress(ImportError):
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        found.append(ALL_MASK_ATTENTION_FUNCTIONS)
    return [getattr(functions, "_global_mapping", functions) for functions in found]
