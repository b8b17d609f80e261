"""Hugging Face transformers, 4.48 and newer: an attention implementation bound to a `ContextParallel`.

A model's layers call the implementation that their config names, with this rank's tokens. What a layer says (scale, window, soft
cap, sinks, dropout) goes to `ContextParallel.attention`; which tokens these are is said by the batch: `Attention.shard_batch` cuts
one, and gives boundaries of packed documents and positions along. Nothing is kept in module globals but the name.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..annotations import nnscaler
from ..context import ContextParallel
from ..core.call import host_table
from ..core.mask import check_cu_seqlens

IGNORED = -100
"""The label of a token without a loss."""

REMEMBERED = 8
"""Batches whose documents are remembered."""


class Attention:
    """An attention implementation of transformers, registered under a name when it is made.

    Args:
        target: a `ContextParallel` whose ranks each pass their shard of the tokens, or a ``wrap_*_attn_func`` op for a model that
            nnscaler cuts, or that runs on DTensors or whole.
        name: by which models find it; each target needs its own.

    Example:
        >>> attention = Attention(ContextParallel(None, layout="zigzag"))
        >>> # model = AutoModelForCausalLM.from_pretrained("...", attn_implementation=attention.name)
        >>> # loss = model(**attention.shard_batch({"input_ids": input_ids, "labels": labels})).loss
    """

    def __init__(self, target: ContextParallel | Callable[..., Any], name: str = "nnscaler_ring") -> None:
        self.target = target
        self.name = name
        self._padded = False
        self._known: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()
        register(name, self, refuse_masks)
        if not isinstance(target, ContextParallel) and "nnscaler" in sys.modules:
            _let_nnscaler_trace()

    def __repr__(self) -> str:
        return f"Attention({self.target!r}, name={self.name!r})"

    def apply(self, model: Any) -> Any:
        """Make a model that exists use this implementation; returns it. transformers before 4.53 need this call in any case."""
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(self.name)
        else:  # before 4.53
            for module in model.modules():
                if hasattr(module, "config"):
                    module.config._attn_implementation = self.name
        for module in model.modules():
            if hasattr(module, "_update_causal_mask"):  # before 4.53: it makes a mask of all pairs
                module._update_causal_mask = _no_mask
        return model

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
            kwargs: ``cu_seq_lens_q``, int32 boundaries of the documents packed in the whole row; or ``position_ids`` ``[B, L]``,
                which begin anew in each document.

        Returns:
            ``[B, L, Hq, Dv]`` and None.

        Raises:
            ValueError: a mask; keys other than the queries'; positions that do not say where documents begin.
            NotImplementedError: attention weights asked for, or a kind of attention that is not told by its arguments.
        """
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        _check(module, query, key, attention_mask, kwargs, causal, sliding_window)
        if self._padded and not causal:
            raise NotImplementedError("padding without a causal mask, where tokens see it: pack the documents into one row")
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        options: dict[str, Any] = {
            "softmax_scale": scaling,
            "dropout_p": dropout,
            "softcap": softcap or 0.0,
            "learnable_sink": s_aux,
        }
        if not isinstance(self.target, ContextParallel):
            cu_seqlens = None if nnscaler.tracing() else self._documents(kwargs, query.shape[2])[0]
            return self.target(q, k, v, causal=causal, window_size=window, cu_seqlens=cu_seqlens, **options), None
        cu_seqlens, seq_len = self._documents(kwargs, query.shape[2])
        mask = "causal" if causal else "full"
        out = self.target.attention(q, k, v, mask, cu_seqlens=cu_seqlens, seq_len=seq_len, window_size=window, **options)
        assert isinstance(out, Tensor)
        return out, None

    def _documents(self, kwargs: Mapping[str, Any], tokens: int) -> tuple[Tensor | None, int | None]:
        """Boundaries of the documents, None for one, and the tokens of the whole sequence, None where ranks hold as many each."""
        cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        if torch.compiler.is_compiling():
            if cu_seqlens is None:
                raise NotImplementedError("documents under torch.compile: pass cu_seq_lens_q, as shard_batch does")
            return cu_seqlens, None
        told = position_ids if cu_seqlens is None else cu_seqlens
        if told is None:
            return None, None
        key = _identity(told)
        if key not in self._known:
            found = self._read(told, tokens) if cu_seqlens is None else host_table("cu_seq_lens_q", cu_seqlens)
            assert found is not None
            self._remember(told, found)
        self._known.move_to_end(key)
        _, found = self._known[key]
        return (found if len(found) > 2 else None), int(found[-1])

    def _remember(self, told: Tensor, cu_seqlens: Tensor) -> None:
        """For the layers to come; the tensor that told is kept, so that no other is taken for it."""
        self._known[_identity(told)] = (told, cu_seqlens)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _read(self, position_ids: Tensor, tokens: int) -> Tensor:
        """Boundaries of the documents, from the positions of all ranks' tokens, which are exchanged."""
        if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
            raise NotImplementedError(f"position_ids of shape {tuple(position_ids.shape)} for {tokens} tokens. {_TOLD}")
        cp = self.target if isinstance(self.target, ContextParallel) else None
        whole = (position_ids if cp is None else cp.unshard(position_ids.contiguous(), dim=1)).cpu().numpy()
        cu_seqlens = _starts(whole)
        if cp is not None and cp.world_size > 1:
            at = np.concatenate([cp._layout(whole.shape[1], None).positions(rank) for rank in range(cp.world_size)])
            if (whole[0][at].reshape(cp.world_size, -1) == np.arange(tokens)).all():
                raise ValueError(_UNTOLD.format(tokens - 1))
        return torch.from_numpy(cu_seqlens)

    def shard_batch(self, batch: Mapping[str, Any], cu_seqlens: Tensor | None = None) -> dict[str, Any]:
        """This rank's part of a batch that every rank has whole.

        Args:
            batch: ``input_ids`` or ``inputs_embeds`` ``[B, S(, ...)]``, and where there are any ``position_ids`` ``[B or 1, S]``,
                which begin at 0 in each document; ``attention_mask`` ``[B, S]`` of ones, or with padding at the end where attention
                is causal; ``labels`` ``[B, S]``, unshifted, -100 for none. Everything else is passed on as it is.
            cu_seqlens: int32 boundaries of documents packed in the row ``[0, ..., S]``; what `position_ids` say where None.

        Returns:
            The batch for the model: shards, with ``position_ids`` and ``cu_seq_lens_q`` (of the whole row). With labels also
            ``shift_labels``, the next tokens of this rank's tokens, none across documents, and ``num_items_in_batch``, the tokens
            with a loss over the number of ranks: so the mean of the ranks' losses, and of their gradients as DDP and FSDP take it,
            is that of one device. Where the library's loss does not take ``shift_labels`` (4.48), no labels: see `next_token_loss`.

        Raises:
            ValueError: no tokens, tensors that do not fit, a mask with padding that is not at the end.
        """
        cp = self.target
        if not isinstance(cp, ContextParallel):
            raise ValueError(f"{self!r} takes whole batches: pass it a ContextParallel to cut them")
        batch = dict(batch)
        tokens = next((batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), None)
        if tokens is None:
            raise ValueError(f"no input_ids or inputs_embeds among {sorted(batch)}")
        length = tokens.shape[1]
        for name in ("labels", "position_ids", "attention_mask"):
            if batch.get(name) is not None and batch[name].shape[-1] != length:
                raise ValueError(f"{name} has shape {tuple(batch[name].shape)}, the batch {length} tokens")
        self._padded = _padded(batch.pop("attention_mask", None))
        positions = batch.pop("position_ids", None)
        cu = _boundaries(cu_seqlens, positions, length)
        table = torch.from_numpy(cu)
        at = {"cu_seqlens": None if len(cu) == 2 else table}
        out = {name: cp.shard(x, 1, **at) if name in ("input_ids", "inputs_embeds") else x for name, x in batch.items()}
        if positions is None:
            out["position_ids"] = cp.position_ids(length, at["cu_seqlens"], tokens.device).unsqueeze(0)
        else:
            out["position_ids"] = cp.shard(positions, 1, **at)
        self._remember(out["position_ids"], table)
        out["cu_seq_lens_q"] = out["cu_seq_lens_k"] = table.to(torch.int32)
        if batch.get("labels") is not None:
            following = nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].clone()
            following[:, cu[1:] - 1] = IGNORED
            out["shift_labels"] = cp.shard(following, 1, **at)
            del out["labels"]
            if _takes_shift_labels():
                out["labels"] = out["shift_labels"]
            out["num_items_in_batch"] = (following != IGNORED).sum().clamp(min=1) / cp.world_size
        return out


def next_token_loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The loss of this rank's tokens, of a batch that `Attention.shard_batch` made: what a model returns as ``loss``.

    Args:
        logits: ``[B, L, vocabulary]``.
        batch: with ``shift_labels`` ``[B, L]`` and ``num_items_in_batch``.
    """
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["shift_labels"].flatten(), reduction="sum")
    return losses / batch["num_items_in_batch"]


def _takes_shift_labels() -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return "shift_labels" in inspect.signature(ForCausalLMLoss).parameters


def _identity(x: Tensor) -> tuple[Any, ...]:
    """The same for a tensor and a detached one, as recomputation makes it; another after it was written to."""
    return x.data_ptr(), tuple(x.shape), x.stride(), None if x.is_inference() else x._version


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
    causal: bool,
    sliding_window: int | None,
) -> None:
    """ValueError or NotImplementedError for what a layer asks and this attention does not do."""
    if attention_mask is not None:
        raise ValueError(_NO_MASK)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries and {key.shape[2]} keys: generation with a cache and cross attention are not cut; pass "
            "use_cache=False, or take another implementation for them"
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError("output_attentions: attention weights are never in memory here; take 'eager' to look at them")
    if sliding_window is not None and not causal:
        raise NotImplementedError("a sliding window without a causal mask: models differ in what they mean by it")
    layers, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if layers and layer is not None and layers[layer] not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(f"layer {layer} has {layers[layer]!r}: full_attention and sliding_attention are done here")


_TOLD = "Pass what shard_batch gives, positions of ContextParallel.position_ids, or cu_seq_lens_q, the documents' boundaries"
_UNTOLD = f"position_ids are 0 .. {{}} on every rank, as a model counts where none are given. {_TOLD}"
_NO_MASK = (
    "an attention_mask: whole rows and packed documents need none here; leave it out (shard_batch checks and drops it), pass "
    "position_ids that begin anew in each document for packed rows; before transformers 4.53 also call Attention.apply(model)"
)


def refuse_masks(*args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """In place of a mask, which no layer needs here: an error where one would say more than a layer's arguments do."""
    if attention_mask is not None:
        raise ValueError(_NO_MASK)
    if use_vmap:
        raise NotImplementedError("a mask function of the model's own, which its layers do not tell: take another implementation")


def _no_mask(*args: Any, **kwargs: Any) -> None:
    refuse_masks(attention_mask=args[0] if args else kwargs.get("attention_mask"))


def _padded(attention_mask: Tensor | None) -> bool:
    """Whether there is padding; ValueError unless it is behind a row's tokens, which see none of it under a causal mask."""
    if attention_mask is None:
        return False
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: give [B, S], or none")
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("attention_mask with padding before tokens: pad at the end, or pack the documents into one row")
    return not attention_mask.all()


def _boundaries(cu_seqlens: Tensor | None, positions: Tensor | None, length: int) -> np.ndarray:
    """Boundaries of the documents, int64 ``[0, ..., length]``."""
    table = host_table("cu_seqlens", cu_seqlens)
    if table is not None:
        return check_cu_seqlens("cu_seqlens", table.numpy(), length)
    if positions is None:
        return np.array([0, length])
    return _starts(positions.cpu().numpy())


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
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _table(ALL_ATTENTION_FUNCTIONS)[name] = function
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError:  # before 4.53
        return
    _table(ALL_MASK_ATTENTION_FUNCTIONS)[name] = mask


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
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError:
        return _table(ALL_ATTENTION_FUNCTIONS).get(name), None
    return _table(ALL_ATTENTION_FUNCTIONS).get(name), _table(ALL_MASK_ATTENTION_FUNCTIONS).get(name)


def _table(functions: Any) -> dict[str, Callable[..., Any]]:
    """The table that all models look into: before 4.50 the dict itself."""
    return getattr(functions, "_global_mapping", functions)
