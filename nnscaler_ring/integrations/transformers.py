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
from ..core.transport import transport_of
from . import families
from .batches import (
    IGNORED,
    PARTS,
    ROWS,
    TOKENS,
    TOLD,
    alike,
    boundaries,
    check_batch,
    check_numbers,
    check_order,
    content_of,
    labels_of,
    starts,
)

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


class _Told(NamedTuple):
    """What a tensor said of documents, and whether it is one that `Attention.shard_batch` made."""

    by: Tensor
    cu_seqlens: Tensor
    ours: bool


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
        self._head = ""  # the class of a model that was given this and whose labels are of their own tokens
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
        families.check_model(model, self.any_model, self._world_size)
        families.check_config(model.config, self._world_size)
        self._head = families.own_labels(model) or self._head
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
        if registered(self.name)[0] is None:
            raise ValueError(
                "an Attention that another process made: a loader's workers must be forked "
                "(multiprocessing_context='fork'), or num_workers=0"
            )
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
        if not (self.any_model or getattr(module, "layer_idx", None)):  # layers that have no number are all asked
            families.check_family(getattr(module, "config", None))
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
                raise ValueError(f"the model does not tell attention which tokens these are. {TOLD}")
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
            raise NotImplementedError(f"position_ids of shape {tuple(position_ids.shape)} for {tokens} tokens. {TOLD}")
        cp = self.target
        if not isinstance(cp, ContextParallel) or cp.world_size == 1:
            if cu_seqlens is not None:
                return cu_seqlens
            whole = position_ids.full_tensor() if isinstance(position_ids, DTensor) else position_ids
            return torch.from_numpy(starts(whole.cpu().numpy()))
        documents = None if cu_seqlens is None else self._told(cu_seqlens)
        length = None if cu_seqlens is None else int(cu_seqlens[-1])
        if length is None and tokens in cp._uneven:
            raise ValueError(
                f"ranks have had different numbers of tokens, so {tokens} here may be of several lengths: pass cu_seq_lens_q, "
                f"[0, S] for one sequence. {TOLD}"
            )
        row = cp.unshard(position_ids.contiguous(), 1, cu_seqlens=documents, seq_len=length).cpu().numpy()
        held = [cp._layout(row.shape[1], documents).positions(rank) for rank in range(cp.world_size)]
        begins = set() if cu_seqlens is None else set(cu_seqlens.tolist())
        if all((row[0][at] == np.arange(len(at))).all() for at in held) and not {int(at[0]) for at in held} <= begins:
            raise ValueError(_UNTOLD.format(tokens - 1))
        if cu_seqlens is None:
            return torch.from_numpy(starts(row))
        check_order(row, cu_seqlens.numpy())
        return cu_seqlens

    def shard_batch(
        self,
        batch: Mapping[str, Any],
        cu_seqlens: Tensor | None = None,
        device: torch.device | str | None = None,
        *,
        shift_labels: bool | None = None,
    ) -> dict[str, Any]:
        """This rank's part of a batch that every rank has whole.

        Args:
            batch: ``input_ids`` ``[B, S]`` or ``inputs_embeds`` ``[B, S, features]``, and where there are any ``position_ids``
                ``[B or 1, S]``, which begin at 0 in each document, or ``[kinds, B or 1, S]``, as of text, height and width, which
                do not tell of documents; ``cu_seq_lens_q``; ``attention_mask`` ``[B, S]`` of ones, or with padding at the end
                where attention is causal; ``labels`` ``[B, S]``, unshifted, -100 for none; ``num_items_in_batch``, tokens with a
                loss of all the batches that make a step. What is no tensor is passed on; ``seq_idx`` is not.
            cu_seqlens: int32 boundaries of documents packed in the row ``[0, ..., S]``; what the batch says where None.
            device: of the result; that of the batch where None.
            shift_labels: labels become those of the next token, also where None; False for a head whose labels are of the tokens
                themselves. The result then has no ``labels``: `next_token_loss` is the loss.

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
            whole = check_batch(batch)
            tokens = whole[next(name for name in TOKENS if name in whole)]
            length = tokens.shape[1]
            if cu_seqlens is not None and "cu_seq_lens_q" in whole:
                raise ValueError("cu_seq_lens_q in the batch and cu_seqlens: give one")
            if "cu_seq_lens_k" in whole and not alike(whole["cu_seq_lens_k"], whole.get("cu_seq_lens_q", cu_seqlens)):
                raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q: tokens see their own documents; give one")
            mask, positions, items = (whole.get(name) for name in ("attention_mask", "position_ids", "num_items_in_batch"))
            cu = boundaries(whole.get("cu_seq_lens_q", cu_seqlens), positions, length, mask)
            check_numbers(whole.get("seq_idx"), cu)
            table = torch.from_numpy(cu)
            documents = self._told(table)
            counts = cp._layout(length, documents).counts
            if not counts.all():
                raise ValueError(
                    f"a row of {length} tokens gives the ranks {counts.tolist()}: models take one or more each; pad it at its end"
                )
            wanted = whole.get("labels")
            if wanted is not None and shift_labels is None and self._head:
                raise ValueError(
                    f"labels of {self._head} are of the tokens themselves: pass shift_labels=False, and take "
                    "next_token_loss(logits, batch) for the loss; for another model that was given this, shift_labels=True"
                )
            if wanted is not None:
                wanted = labels_of(wanted, cu, mask, shift_labels is not False)
        if asked():
            facts: dict[str, object] = {f"{name} of the batch": content_of(whole.get(name)) for name in (*TOKENS, *ROWS)}
            facts |= {"the boundaries of the documents": cu.tolist(), "num_items_in_batch": None if items is None else float(items)}
            check_alike(transport_of(cp._recipe.group), "what cuts a batch", facts, torch.device("cpu"))
        self._padded |= mask is not None and not bool(mask.all())
        out = {name: x for name, x in whole.items() if name not in PARTS}
        out |= {name: cp.shard(whole[name], 1, cu_seqlens=documents).to(device) for name in TOKENS if name in whole}
        own = (
            cp.position_ids(length, cu_seqlens=documents).unsqueeze(0)
            if positions is None
            else cp.shard(positions, positions.dim() - 1, cu_seqlens=documents)
        )
        out["position_ids"] = _counted(own.to(tokens.device if device is None else device))
        self._remember(out["position_ids"], table, ours=True)
        out["cu_seq_lens_q"] = out["cu_seq_lens_k"] = _counted(table.to(torch.int32))
        self._remember(out["cu_seq_lens_q"], table, ours=True)
        if wanted is not None:
            out["shift_labels"] = cp.shard(wanted, 1, cu_seqlens=documents).to(device)
            if shift_labels is not False and _takes_shift_labels():
                out["labels"] = out["shift_labels"]
            count = (wanted != IGNORED).sum() if items is None else items
            out["num_items_in_batch"] = max(float(count), 1.0) / cp.world_size  # no tensor: mixed precision would round it
        return out


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
    """A key that a tensor shares with its detached self, as recomputation makes it, and loses when it is written to."""
    return x.data_ptr(), tuple(x.shape), x.stride(), None if x.is_inference() else x._version


def _counted(x: Tensor) -> Tensor:
    """The tensor as one that counts what is written to it, which none does that was made in inference mode."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


_GENERATE = (
    "for generate() take another implementation, model.set_attn_implementation('sdpa'); a cache of a cut prompt has this rank's "
    "tokens alone: gather it first (docs/transformers.md, 'Prefill, then decode')"
)
_UNTOLD = f"position_ids are 0 .. {{}} on every rank, as a model counts where none are given. {TOLD}; {_GENERATE}"
_NO_MASK = (
    "an attention_mask: whole rows and packed documents need none here; leave it out (shard_batch checks and drops it), pass "
    f"position_ids that begin anew in each document for packed rows; and call Attention.apply(model); {_GENERATE}"
)


def refuse_masks(
    *args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, mask_function: Any = None, **kwargs: Any
) -> None:
    """In place of a mask, which no layer needs here: an error where one would say more than a layer's arguments do."""
    if attention_mask is not None:
        raise ValueError(_NO_MASK)
    if use_vmap or (not torch.compiler.is_compiling() and _widened(mask_function)):  # a graph does not see what closures hold
        raise NotImplementedError("a mask function of the model's own, which its layers do not tell: take another implementation")


def _widened(mask_function: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether a mask of transformers, functions in closures of functions, has an ``or_masks``: it shows more than layers tell."""
    if id(mask_function) in seen:
        return False
    if getattr(mask_function, "__qualname__", "").startswith("or_masks"):
        return True
    held, seen = [], seen | {id(mask_function)}
    for cell in getattr(mask_function, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty
            held.append(cell.cell_contents)
    return any(_widened(x, seen) for each in held for x in (each if isinstance(each, (tuple, list)) else (each,)) if callable(x))


def _no_mask(*args: Any, **kwargs: Any) -> None:
    refuse_masks(attention_mask=args[0] if args else kwargs.get("attention_mask"))


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
