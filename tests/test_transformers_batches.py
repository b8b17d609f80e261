"""transformers: batches that are cut, or come cut, and what tells which documents their tokens are of."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from nnscaler_ring import ContextParallel
from nnscaler_ring.core import agree, layouts
from nnscaler_ring.integrations.batches import check_order
from nnscaler_ring.integrations.transformers import Attention
from tests.test_transformers import DOCUMENTS, alone, build, close, each_alone, packed_row, transformers


def from_positions(rank: int, world_size: int) -> None:
    """Documents are found from positions alone, once a forward pass."""
    cp = ContextParallel(dist.group.WORLD, layout="zigzag")
    documents = (9, 11, 4)
    model, row = build("llama"), packed_row(documents)
    want, _ = each_alone(model, row, documents)
    attention = Attention(cp, "by_positions")
    attention.apply(model)
    mine = {name: cp.shard(row[name], 1) for name in ("input_ids", "position_ids")}
    with mock.patch.object(ContextParallel, "unshard", autospec=True, side_effect=ContextParallel.unshard) as exchanged:
        logits = model(**mine, use_cache=False).logits
    assert exchanged.call_count == 1, "layers share what was found"
    close("logits", cp.unshard(logits, 1), want)
    told = torch.tensor([0, 9, 20, 24], dtype=torch.int32)
    close("logits of what is told twice", model(**mine, cu_seq_lens_q=told, use_cache=False).logits, logits)
    halves = {name: x.chunk(2, 1)[rank] for name, x in row.items() if name in mine}  # of another layout
    for cu, given, message in (
        (told, halves, "fall from 5 to 3 inside"),
        (told[[0, 3]], mine, "fall from 8 to 0 inside a document"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**given, cu_seq_lens_q=cu, use_cache=False)
    for layout in ("zigzag", "contiguous", "stripe"):  # without positions a model counts each rank's tokens from 0
        attention = Attention(ContextParallel(dist.group.WORLD, layout=layout), "untold")
        attention.apply(model)
        with pytest.raises(ValueError, match="Pass what shard_batch gives"):
            model(input_ids=mine["input_ids"], use_cache=False)


def test_documents_from_positions(ranks: Any) -> None:
    ranks(2).run(from_positions)


def test_positions_beside_boundaries() -> None:
    """They may begin anywhere, jump, and differ by row; what falls inside a document is of another order, but for padding."""
    cu = np.array([0, 3, 8])
    check_order(np.array([[2, 3, 4, 0, 2, 4, 7, 8], [0, 1, 2, 5, 6, 0, 0, 0]]), cu)
    for wrong in ([0, 1, 2, 0, 3, 1, 2, 4], [0, 1, 2, 0, 1, 0, 1, 2]):
        with pytest.raises(ValueError, match="inside a document of cu_seq_lens_q, at token"):
            check_order(np.array([[0, 1, 2, 0, 1, 2, 3, 4], wrong]), cu)


def other_rows(rank: int, world_size: int) -> list[str]:
    """What ranks are told with the check where they cut other batches, or one cannot cut its own."""
    attention = Attention(ContextParallel(dist.group.WORLD, layout="zigzag"), "others")
    row, said = packed_row((24,)), []
    own, none = row["input_ids"] + rank, row["input_ids"][:, : 24 * rank]
    others = {"input_ids": own}, {"input_ids": none}, {**row, "labels": own}, {"inputs_embeds": own[..., None].bfloat16()}
    for batch in (row, *others):
        with mock.patch.dict("os.environ", {agree.VARIABLE: "1"}):
            try:
                attention.shard_batch(batch)
                said.append("")
            except ValueError as why:
                said.append(str(why))
    count: Any = 3 if rank else torch.tensor(3, dtype=torch.int32)
    with mock.patch.dict("os.environ", {agree.VARIABLE: "1"}):
        assert attention.shard_batch({**row, "num_items_in_batch": count})["num_items_in_batch"] == 1.5
        with mock.patch.object(agree, "get_worker_info", return_value=1):  # which talks to nobody
            attention.shard_batch({"input_ids": own})
    return said


def test_batches_that_differ_are_told_by_the_check(ranks: Any) -> None:
    first, second = ranks(2).run(other_rows)
    assert first[0] == second[0] == ""
    named = ("", "input_ids", "", "labels", "inputs_embeds")
    for name, *messages in zip(named[1:], first[1:], second[1:], strict=True):
        assert not name or all(f"differ in {name} of the batch" in message for message in messages), messages
    assert "gives the ranks [0, 0]" in first[2] and "rank 0 refused the arguments" in second[2]


def whole_rows(rank: int, world_size: int) -> None:
    """Batches of several rows, and padding at the end."""
    cp = ContextParallel(dist.group.WORLD, layout="zigzag")
    model, ids = build("mistral"), torch.randint(1, 48, (3, 23), generator=torch.Generator().manual_seed(2))
    want = model(input_ids=ids, use_cache=False).logits
    attention = Attention(cp, "rows")
    attention.apply(model)
    mask = torch.ones(3, 23, dtype=torch.int64)
    mask[1, 20:] = 0
    batch = attention.shard_batch({"input_ids": ids, "attention_mask": mask})
    assert "attention_mask" not in batch and "labels" not in batch
    got = cp.unshard(model(**batch, use_cache=False).logits, 1, seq_len=23)
    close("logits", got[mask.bool()], want[mask.bool()])


def test_batches_and_padding(ranks: Any) -> None:
    ranks(2).run(whole_rows)


def test_bad_batches_are_refused() -> None:
    attention, _ = alone()
    ids = torch.ones(2, 6, dtype=torch.int64)
    left = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    cases: list[tuple[str, dict[str, Any]]] = [
        ("no input_ids or inputs_embeds", {"labels": ids}),
        ("labels has shape", {"input_ids": ids, "labels": ids[:, 1:]}),
        ("padding before tokens", {"input_ids": ids, "attention_mask": left}),
        (r"give \[B, S\]", {"input_ids": ids, "attention_mask": left[:, None, None]}),
        (r"give \[B, S\]", {"input_ids": ids, "position_ids": positions.expand(3, 2, 6)[..., 1:]}),
        (r"several kinds begin anew at tokens \[0, 3\]", {"input_ids": ids, "position_ids": positions.expand(3, 2, 6)}),
        (r"give input_ids \[B, S\]", {"input_ids": ids[0]}),
        (r"give input_ids \[B, S\]", {"inputs_embeds": ids.float()}),
        (r"give input_ids \[B, S\]", {"input_ids": ids, "inputs_embeds": torch.ones(2, 5, 4)}),
        ("labels of torch.float32", {"input_ids": ids, "labels": ids.float()}),
        ("other numbers than 0 and 1", {"input_ids": ids, "attention_mask": torch.zeros(2, 6).masked_fill(left == 0, -torch.inf)}),
        ("pixel_values: not known here", {"input_ids": ids, "pixel_values": [torch.ones(3, 4, 4)]}),
        ("audio: not known here", {"input_ids": ids, "audio": {"features": ids}}),
        ("seq_idx has shape", {"input_ids": ids, "seq_idx": ids[:, 1:]}),
        ("seq_idx: give tensors", {"input_ids": ids, "seq_idx": [[0] * 6]}),
        (r"seq_idx changes at \[3\]", {"input_ids": ids, "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])}),
        ("labels of 1 rows for 2", {"input_ids": ids, "labels": ids[:1]}),
        ("labels on padding", {"input_ids": ids, "labels": ids, "attention_mask": left.flip(1)}),
        ("give tensors", {"input_ids": ids.tolist()}),
        ("pixel_values: not known here", {"input_ids": ids, "pixel_values": torch.ones(1, 3, 4, 4)}),
        ("token_type_ids: not known here", {"input_ids": ids, "token_type_ids": ids}),
        ("logits_to_keep: not known here", {"input_ids": ids, "logits_to_keep": 1}),
        ("equal rows", {"input_ids": ids, "position_ids": positions}),
        ("neither go on by 1", {"input_ids": ids, "position_ids": positions[:1] * 2}),
    ]
    for message, batch in cases:
        with pytest.raises(ValueError, match=message):
            attention.shard_batch(batch)
    with pytest.raises(ValueError, match="a mapping of names to tensors, not tuple"):
        attention.shard_batch((ids, ids))  # type: ignore[arg-type]
    cu = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention.shard_batch({"input_ids": ids}, cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"begin anew at \[3\]"):
        cut = torch.tensor([0, 2, 6], dtype=torch.int32)
        attention.shard_batch({"input_ids": ids, "position_ids": positions[1:]}, cu_seqlens=cut)
    with pytest.raises(ValueError, match="give a ContextParallel"):
        Attention("zigzag", "wrong")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give one"):
        attention.shard_batch({"input_ids": ids, "cu_seq_lens_q": cu}, cu_seqlens=cu)
    short = Attention(ContextParallel(), "short")
    short.target = mock.Mock(spec=ContextParallel, world_size=2)  # type: ignore[assignment]
    short.target._recipe = mock.Mock(layout="zigzag")
    short.target._layout.return_value = layouts.build("zigzag", 1, 2)
    with pytest.raises(ValueError, match=r"a row of 1 tokens gives the ranks \[1, 0\]"):
        short.shard_batch({"input_ids": ids[:, :1]})


def test_boundaries_and_counts_of_a_batch_are_kept() -> None:
    """Boundaries that a collator gives; the tokens of all batches that make a step."""
    attention, model = alone()
    row = packed_row()
    cu = torch.tensor([0, 10, 11, 25], dtype=torch.int32)
    told = {"input_ids": row["input_ids"], "cu_seq_lens_q": cu, "max_length_q": 14}
    batch = attention.shard_batch(told)
    assert batch["cu_seq_lens_q"].tolist() == cu.tolist() and batch["position_ids"].tolist() == row["position_ids"].tolist()
    assert "max_length_q" not in batch
    want, _ = each_alone(build("llama"), row, DOCUMENTS)
    close("logits", model(**batch, use_cache=False).logits, want)
    for beside in (batch["cu_seq_lens_q"].clone(), batch["cu_seq_lens_q"]):
        close("logits", model(**{**batch, "cu_seq_lens_q": beside}, use_cache=False).logits, want)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is \[0, 12, 25\], these tokens were cut with \[0, 10, 11, 25\]"):
        model(**{**batch, "cu_seq_lens_q": torch.tensor([0, 12, 25], dtype=torch.int32)}, use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_k differs"):
        attention.shard_batch({**told, "cu_seq_lens_k": cu + (cu == 10)})
    assert attention.shard_batch({**told, "cu_seq_lens_k": cu})["cu_seq_lens_k"].tolist() == cu.tolist()
    with pytest.raises(ValueError, match="output_router_logits: not known here"):
        attention.shard_batch({**row, "output_router_logits": True})
    counted = attention.shard_batch({**row, "num_items_in_batch": torch.tensor(100)})
    assert counted["num_items_in_batch"] == 100.0 and attention.shard_batch(row)["num_items_in_batch"] == 21.0


def test_a_buffer_that_is_used_again() -> None:
    """Documents of a batch that the user made are read anew in each forward pass."""
    _, model = alone()
    row = packed_row()
    buffer = row["position_ids"].numpy().copy()
    positions = torch.from_numpy(buffer)
    with torch.inference_mode():
        model(input_ids=row["input_ids"], position_ids=positions, use_cache=False)
        buffer[0, :] = np.arange(25)
        got = model(input_ids=row["input_ids"], position_ids=positions, use_cache=False).logits
        close("logits", got, build("llama")(input_ids=row["input_ids"], use_cache=False).logits)


def test_a_batch_that_is_written_over() -> None:
    """As a server does with buffers of a CUDA graph, in inference mode too, whose own tensors have no versions."""
    attention, model = alone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            static, other = (attention.shard_batch(packed_row(documents)) for documents in ((10, 1, 14), (4, 12, 9)))
            model(**static, use_cache=False)
            want = model(**other, use_cache=False).logits
            for name, x in static.items():
                if isinstance(x, torch.Tensor):
                    x.copy_(other[name])
            close(str(mode), model(**static, use_cache=False).logits, want)


OLD_NAME = "`past_key_values` is deprecated"
"""Of transformers 5.24: it is called cache there."""


def decoded(rank: int, world_size: int) -> None:
    """From a cache that the ranks of a prompt gathered, as the page says."""
    cp = ContextParallel(dist.group.WORLD, layout="zigzag")
    for family in ("llama", "mistral"):
        model, row = build(family).eval(), packed_row((41,))["input_ids"]
        prompt, following = row[:, :40], row[:, 40:]
        want = model(input_ids=row, use_cache=False).logits[:, 40:]
        attention = Attention(cp, f"decoded_{family}")
        attention.apply(model)
        warnings.filterwarnings("ignore", OLD_NAME, FutureWarning)
        own = transformers.DynamicCache()
        batch = attention.shard_batch({"input_ids": prompt})
        with torch.inference_mode():
            model(**batch, past_key_values=own, use_cache=True)
            with pytest.raises(ValueError, match=r"generation with a cache.*sdpa.*gather it first"):
                model(input_ids=following, past_key_values=own, use_cache=True)
            for layer in own.layers:
                layer.keys, layer.values = (x[:, :, : batch["input_ids"].shape[1]] for x in (layer.keys, layer.values))
            whole = transformers.DynamicCache(config=model.config)
            for n, layer in enumerate(own.layers):
                whole.update(cp.unshard(layer.keys, 2, seq_len=40), cp.unshard(layer.values, 2, seq_len=40), n)
            model.set_attn_implementation("sdpa")
            close(family, model(input_ids=following, past_key_values=whole).logits, want)


def test_decoding_from_a_gathered_cache(ranks: Any) -> None:
    if TorchVersion(transformers.__version__) < "5":
        pytest.skip("as the page says, of transformers 5")
    ranks(2).run(decoded)


def test_what_was_said_is_kept_for_a_few_batches() -> None:
    attention, model = alone()
    batches = [attention.shard_batch(packed_row()) for _ in range(20)]
    said = [told.by for told in attention._known.values()]
    assert {id(x) for x in said} == {id(batch[name]) for batch in batches[-8:] for name in ("position_ids", "cu_seq_lens_q")}
    with torch.inference_mode():  # whose tensors have no versions
        batch = attention.shard_batch(packed_row())
        batch = {name: batch[name] for name in ("input_ids", "position_ids")}
        assert model(**batch, use_cache=False).logits.shape[1] == sum(DOCUMENTS)
