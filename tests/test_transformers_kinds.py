"""transformers: heads whose labels are not of the next token, images beside text, masks that layers do not tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from nnscaler_ring import ContextParallel
from nnscaler_ring.integrations.transformers import Attention, next_token_loss, refuse_masks
from tests.test_transformers import SMALL, close, filled, packed_row, transformers

pytestmark = pytest.mark.skipif(TorchVersion(transformers.__version__) < "5", reason="needs transformers >= 5")


def classifier(kind: str) -> Any:
    config = transformers.LlamaConfig(**SMALL, num_labels=5)
    return filled(getattr(transformers, f"LlamaFor{kind}Classification")(config).double().eval())


def same(loss: Tensor, want: Tensor, shared: Any, model: Any, world_size: int) -> None:
    """The means of the ranks' losses and gradients are one device's."""
    loss.backward()
    want.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    close("loss", total / world_size, want.detach())
    for (name, x), other in zip(shared.named_parameters(), model.parameters(), strict=True):
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        dist.all_reduce(grad)
        close(name, grad / world_size, torch.zeros_like(x) if other.grad is None else other.grad)


def of_tokens(rank: int, world_size: int) -> None:
    """A label a token, its own."""
    ids = packed_row((25,))["input_ids"]
    labels = ids % 5
    labels[:, 3:9] = -100
    model = classifier("Token")
    want = nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0].float(), labels[0])
    attention = Attention(ContextParallel(layout="zigzag"), "tokens", any_model=True)
    shared = attention.apply(classifier("Token"))
    batch = {"input_ids": ids, "labels": labels}
    with pytest.raises(ValueError, match="LlamaForTokenClassification are of the tokens themselves: pass shift_labels=False"):
        attention.shard_batch(batch)
    batch = attention.shard_batch(batch, shift_labels=False)
    assert "labels" not in batch
    loss = next_token_loss(shared(**batch, use_cache=False).logits, batch)
    same(loss, want, shared, model, world_size)


def test_labels_of_their_own_tokens(ranks: Any) -> None:
    ranks(2).run(of_tokens)


class Chat(transformers.LlamaForCausalLM):
    pass


class Tagger(transformers.LlamaForTokenClassification):
    pass


def test_whose_labels_are_shifted() -> None:
    """Those of any model but of one that is known to have others; of two models under one name the batch says it."""
    config, ids = transformers.LlamaConfig(**SMALL), torch.tensor([[1, 2, 3, 0, 0]])
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100), "attention_mask": (ids != 0).long()}
    attention = Attention(ContextParallel(), "chat", any_model=True)
    attention.apply(Chat(config))
    assert attention.shard_batch(batch)["labels"].tolist() == [[2, 3, -100, -100, -100]]
    attention.apply(Tagger(config))
    attention.apply(Chat(config))
    with pytest.raises(ValueError, match="labels of Tagger are of the tokens themselves"):
        attention.shard_batch(batch)
    assert attention.shard_batch(batch, shift_labels=True)["labels"].tolist() == [[2, 3, -100, -100, -100]]
    assert attention.shard_batch(batch, shift_labels=False)["shift_labels"].tolist() == [[1, 2, 3, -100, -100]]
    for shift in (True, False):
        with pytest.raises(ValueError, match="labels on padding"):
            attention.shard_batch({**batch, "labels": ids}, shift_labels=shift)


def pooled(rank: int, world_size: int) -> None:
    """A label a row, of its last token, which one rank has."""
    ids = packed_row((25,))["input_ids"]
    model, shared = classifier("Sequence"), classifier("Sequence")
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    want = nn.functional.cross_entropy(model.score(hidden[:, -1]).float(), torch.tensor([3]))
    attention = Attention(ContextParallel(layout="zigzag"), "rows")
    attention.apply(shared.model)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 3
    batch = attention.shard_batch({"input_ids": ids, "labels": labels}, shift_labels=False)
    told = {name: x for name, x in batch.items() if name not in ("shift_labels", "num_items_in_batch")}
    loss = next_token_loss(shared.score(shared.model(**told, use_cache=False).last_hidden_state), batch)
    same(loss, want, shared, model, world_size)


def test_a_label_a_row(ranks: Any) -> None:
    ranks(2).run(pooled)


def llava() -> Any:
    text = {**SMALL, "model_type": "llama"}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=47)
    return filled(transformers.LlavaForConditionalGeneration(config).double().eval())


def embedded(model: Any, ids: Tensor, pixels: Tensor) -> Tensor:
    """Text and image as the model embeds them, whole."""
    image = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
    text = model.get_input_embeddings()(ids)
    return text.masked_scatter((ids == 47).unsqueeze(-1).expand_as(text), image)


def with_an_image(rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 47, (1, 25), generator=generator)
    ids[:, 5:9] = 47  # the four patches of an image
    pixels = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)
    model, shared = llava(), llava()
    labels = ids.masked_fill(ids == 47, -100)
    result = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False)
    cp = ContextParallel(layout="zigzag")
    attention = Attention(cp, "images")
    for any_model in (False, True):
        with pytest.raises(NotImplementedError, match=r"apply it to the part .* model.model.language_model"):
            Attention(cp, "whole", any_model=any_model).apply(shared)
    attention.apply(shared.model.language_model)
    batch = attention.shard_batch({"inputs_embeds": embedded(shared, ids, pixels), "labels": labels})
    got = shared(**batch, use_cache=False)
    close("logits", cp.unshard(got.logits, 1, seq_len=25), result.logits)
    same(got.loss, result.loss, shared, model, world_size)


def test_images_beside_text(ranks: Any) -> None:
    """Embedded on every rank, vision tower and all: its gradients are those of each rank's tokens, as all others'."""
    ranks(2).run(with_an_image)


def test_masks_that_layers_do_not_tell_are_refused() -> None:
    from transformers import masking_utils as masks

    at = torch.arange(4).unsqueeze(0)
    packed, causal = masks.packed_sequence_mask_function(at), masks.causal_mask_function
    blocks = masks.or_masks(causal, masks.blockwise_overlay(at))
    for wrong in (blocks, masks.and_masks(blocks, packed), masks.remap_positions_for_packed_sequence(blocks, at)):
        with pytest.raises(NotImplementedError, match="a mask function of the model"):
            refuse_masks(mask_function=wrong)

    def own(*at: Any) -> Any:
        return own(*at) and late  # closures of itself, and of what is not there yet

    for told in (causal, masks.and_masks(causal, packed), masks.sliding_window_causal_mask_function(3), own):
        refuse_masks(mask_function=told)
    late = True


def test_layers_without_a_number_are_of_a_family_too() -> None:
    """As those of a vision tower, whose tokens are not the text's."""
    attention, x = Attention(ContextParallel(), "tower"), torch.randn(1, 2, 4, 8)
    layer = nn.Module()
    for config in (transformers.CLIPVisionConfig(), None):
        layer.config = config  # type: ignore[assignment]
        with pytest.raises(NotImplementedError, match="have not been compared"):
            attention(layer, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 4], dtype=torch.int32))


def test_what_goes_with_a_batch() -> None:
    """Positions of several kinds are cut along the tokens; numbers of documents say nothing that boundaries do not."""
    attention = Attention(ContextParallel(layout="zigzag"), "kinds")
    ids = torch.arange(1, 7).unsqueeze(0)
    kinds = torch.stack([torch.arange(6)] * 3).unsqueeze(1)
    assert attention.shard_batch({"input_ids": ids, "position_ids": kinds})["position_ids"].equal(kinds)
    image = torch.tensor([[0, 0, 0, 0, 2, 3], [0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 2, 3]]).unsqueeze(1)  # an image first
    padded = {"input_ids": ids, "position_ids": image * (ids < 6), "attention_mask": (ids < 6).long()}
    assert attention.shard_batch(padded)["cu_seq_lens_q"].tolist() == [0, 6]
    cu, numbers = torch.tensor([0, 4, 6], dtype=torch.int32), torch.tensor([[0, 0, 0, 0, 1, 1]])
    kinds = kinds.where(kinds < 4, kinds - 4)
    batch = attention.shard_batch({"input_ids": ids, "position_ids": kinds, "seq_idx": numbers}, cu_seqlens=cu)
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 6] and "seq_idx" not in batch


def cut_by_a_copy(rank: int, world_size: int, attention: Attention) -> None:
    with pytest.raises(ValueError, match="workers must be forked"):
        attention.shard_batch(packed_row())


def test_a_worker_that_was_not_forked_is_told(ranks: Any) -> None:
    ranks(2).run(cut_by_a_copy, Attention(ContextParallel(), "elsewhere"))
