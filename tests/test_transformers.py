"""transformers: models of random weights over ranks have the logits, loss and gradients of each document alone on one device."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

import nnscaler_ring
from nnscaler_ring import ContextParallel, substitute_hf_flash_attn, update_ring_flash_attn_params, use_ring_attn
from nnscaler_ring.core import layouts
from nnscaler_ring.core.call import group_name
from nnscaler_ring.integrations import families, substitute
from nnscaler_ring.integrations.transformers import Attention, next_token_loss, refuse_masks, register, registered
from tests.test_options import Watch

transformers = pytest.importorskip("transformers", "4.48", reason="needs transformers >= 4.48")

SMALL = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
WINDOW = {"sliding_window": 5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", WINDOW),
    "gemma2": ("Gemma2", {**WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**WINDOW, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("GptOss", {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}),
}
DOCUMENTS = (10, 1, 14)
"""25 tokens: not a multiple of any number of ranks."""


def has(family: str) -> bool:
    return hasattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")


def filled(model: Any) -> Any:
    """With weights of float64 that all say something, the same each time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def build(family: str, implementation: str = "eager", **changes: Any) -> Any:
    """A model in float64 whose every weight says something; the same on every rank and for every implementation."""
    name, more = FAMILIES[family]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**{**SMALL, **more, **changes})
    config._attn_implementation = implementation
    return filled(getattr(transformers, f"{name}ForCausalLM")(config).double())


def packed_row(documents: tuple[int, ...] = DOCUMENTS) -> dict[str, Tensor]:
    ids = torch.randint(1, 48, (1, sum(documents)), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 3] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in documents]).unsqueeze(0)}


def each_alone(model: Any, row: dict[str, Tensor], documents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits and loss of documents that go through the model one by one."""
    parts = [x.split(documents, 1) for x in (row["input_ids"], row["labels"])]
    logits = [model(input_ids=ids, use_cache=False).logits for ids in parts[0]]
    following = torch.cat([nn.functional.pad(x, (0, 1), value=-100)[:, 1:] for x in parts[1]], 1)
    whole = torch.cat(logits, 1)
    return whole, nn.functional.cross_entropy(whole.flatten(0, 1).float(), following.flatten())


def close(name: str, got: Tensor, want: Tensor) -> None:
    """Norms and rotary embeddings of transformers are in fp32."""
    difference = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-6)
    assert difference < 3e-5, f"{name}: {difference:.1e}"


def loss_of(result: Any, batch: dict[str, Any]) -> Tensor:
    return next_token_loss(result.logits, batch) if result.loss is None else result.loss


def compare(cp: ContextParallel, family: str, prepare: Callable[[Any], Any] = lambda model: model, **changes: Any) -> None:
    """Logits, loss and the mean of the ranks' gradients against each document alone."""
    model, row = build(family), packed_row()
    want, want_loss = each_alone(model, row, DOCUMENTS)
    want_loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters()}
    attention = Attention(cp)
    shared = prepare(attention.apply(build(family, **changes)))
    batch = attention.shard_batch(row)
    result = shared(**batch, use_cache=False)
    cu = batch["cu_seq_lens_q"]
    close("logits", cp.unshard(result.logits, 1, cu_seqlens=cu, seq_len=want.shape[1]), want)
    loss = loss_of(result, batch)
    loss.backward()
    total = loss.detach().clone()
    reduced = isinstance(shared, DistributedDataParallel) or any(isinstance(x, DTensor) for x in shared.parameters())
    if cp.world_size > 1:
        dist.all_reduce(total)
    close("loss", total / cp.world_size, want_loss.detach())
    for name, x in shared.named_parameters():
        grad = x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad.clone()
        if cp.world_size > 1 and not reduced:
            dist.all_reduce(grad)
            grad /= cp.world_size
        close(name, grad, gradients[name.removeprefix("module.")])


LAYOUTS = {"llama": "zigzag", "qwen3": "stripe", "mistral": "contiguous", "gemma2": "zigzag", "gemma3": "balanced"}
LAYOUTS |= {"gpt_oss": "zigzag-per-document"}


def on_ranks(rank: int, world_size: int, family: str) -> None:
    compare(ContextParallel(dist.group.WORLD, layout=LAYOUTS[family]), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_models_over_ranks(ranks: Any, world_size: int, family: str) -> None:
    if not has(family):
        pytest.skip(f"needs a transformers with {family}, this is {transformers.__version__}")
    ranks(world_size).run(on_ranks, family)


SIZES = {
    **{
        **SMALL,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 40,
        "ffn_dim": 40,
        "word_embed_proj_dim": 32,
    },
    **{"moe_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "experts_implementation": "eager", "sliding_window": 5},
    **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "rotary_dim": 4},
    **{"query_pre_attn_scalar": 8, "bos_token_id": 1, "eos_token_id": 2, "shared_intermediate_size": 24},
    **{"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4},
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def of_family(family: str) -> Any:
    """A small model in float64."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = set(vars(kind())) | {"experts_implementation"}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = kind(**sizes | ({"num_key_value_heads": 4} if "kv_lora_rank" in known else {}))  # MLA
    return filled(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval())


def compared(rank: int, world_size: int, family: str) -> None:
    cp, row = ContextParallel(dist.group.WORLD, layout="zigzag"), packed_row()
    model = of_family(family)
    want, want_loss = each_alone(model, row, DOCUMENTS)
    want_loss.backward()
    attention = Attention(cp, "swept")
    shared = attention.apply(of_family(family))
    batch = attention.shard_batch(row)
    result = shared(**batch, use_cache=False)
    close("logits", cp.unshard(result.logits, 1, cu_seqlens=batch["cu_seq_lens_q"], seq_len=want.shape[1]), want)
    loss_of(result, batch).backward()
    for (name, x), other in zip(shared.named_parameters(), model.parameters(), strict=True):
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        dist.all_reduce(grad)
        if other.grad is not None and other.grad.abs().max() > 1e-8:
            close(name, grad / world_size, other.grad)


@pytest.mark.skipif(transformers.__version__ < "5", reason="needs transformers >= 5, with which families were compared")
@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family(ranks: Any, family: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        pytest.skip(f"needs a transformers with {family}, this is {transformers.__version__}")
    ranks(2).run(compared, family)


def test_what_the_models_ask_for_matters() -> None:
    """The window, soft cap and sinks change these logits by far more than what the tests allow."""
    row = packed_row((25,))
    changes: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 6}, "gemma2": {"attn_logit_softcapping": None}}
    for family, change in changes.items():
        a, b = (build(family, **how)(input_ids=row["input_ids"]).logits for how in ({}, change))
        assert (a - b).abs().max() > 1e-2 * a.abs().max(), family


def checkpointed(model: Any, reentrant: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its name, since 5
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def in_ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def in_fsdp(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPED: dict[str, Callable[[Any], Any]] = {"DDP": in_ddp, "FSDP2": in_fsdp}
FSDP_ON_CPU = TorchVersion(torch.__version__) >= "2.7"
"""Before, FSDP2 asks the device for events."""


def wrapped(rank: int, world_size: int, how: str, layout: str) -> None:
    cp = ContextParallel(dist.group.WORLD, layout=layout)
    if how.startswith("checkpoint"):
        compare(cp, "mistral", lambda model: checkpointed(model, how.endswith("reentrant")))
    else:
        compare(cp, "llama", WRAPPED[how])


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint, reentrant", *WRAPPED])
def test_training_wrappers(ranks: Any, how: str) -> None:
    if how == "FSDP2" and not FSDP_ON_CPU:
        pytest.skip("needs torch 2.7, whose FSDP2 runs on CPUs")
    ranks(2).run(wrapped, how, "zigzag")


def alone(**how: Any) -> tuple[Attention, Any]:
    attention = Attention(ContextParallel(**how))
    return attention, attention.apply(build("llama"))


def test_a_model_made_with_the_name() -> None:
    attention, _ = alone()
    config = transformers.LlamaConfig(**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.name)
    assert model.config._attn_implementation == attention.name
    if registered(attention.name)[1] is None:  # a transformers that makes masks in the model
        model = attention.apply(model)
    batch = attention.shard_batch(packed_row())
    assert torch.isfinite(loss_of(model(**batch), batch))


@pytest.mark.parametrize("op", ["wrap_zigzag_attn_func", "wrap_ring_attn_func"])
def test_ops_of_a_compiler(op: str) -> None:
    """A model that is cut by a compiler calls an op as for one device."""
    model, row = build("mistral"), packed_row()
    want, _ = each_alone(model, row, DOCUMENTS)
    attention = Attention(getattr(nnscaler_ring, op), "op")
    attention.apply(model)
    close("logits", model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits, want)
    with pytest.raises(ValueError, match="takes whole batches"):
        attention.shard_batch(row)


def test_compiled_without_a_break() -> None:
    attention, model = alone(layout="zigzag")
    batch = {name: x for name, x in attention.shard_batch(packed_row()).items() if "label" not in name and "num" not in name}
    want = model(**batch, use_cache=False).logits
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, use_cache=False).logits
    close("logits", got, want)


def test_models_that_would_be_wrong_are_refused() -> None:
    attention = Attention(ContextParallel())
    small = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 48}
    with pytest.raises(NotImplementedError, match="models of 'bloom' have not been compared"):
        attention.apply(transformers.BloomForCausalLM(transformers.BloomConfig(**small)))
    with pytest.raises(NotImplementedError, match="does not ask for its attention by name"):
        Attention(ContextParallel(), any_model=True).apply(transformers.BloomForCausalLM(transformers.BloomConfig(**small)))
    with pytest.raises(NotImplementedError, match="its loss may look at other tokens"):
        Attention(ContextParallel()).apply(
            transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2))
        )
    pooled = (transformers.LlamaForQuestionAnswering, transformers.LlamaForSequenceClassification)
    for wrong in (*pooled, transformers.LlamaForTokenClassification):
        for model in (made := wrong(transformers.LlamaConfig(**SMALL)), torch.compile(made)):
            with pytest.raises(NotImplementedError, match="its loss may look at other tokens"):
                Attention(ContextParallel()).apply(model)
            Attention(ContextParallel(), any_model=True).apply(model)  # of one rank, which has all tokens
            if wrong in pooled:
                with pytest.raises(NotImplementedError, match="looks at one token of all"):
                    families.check_model(model, any_model=True, world_size=2)
    Attention(ContextParallel()).apply(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))
    settings: list[tuple[str, dict[str, Any]]] = [
        ("conv", {"layer_types": ["conv", "full_attention"]}),
        ("output_router_logits", {"output_router_logits": True}),
        ("attention weights", {"output_attentions": True}),
        ("encoders with decoders", {"is_encoder_decoder": True}),
        ("mask says who sees whom", {"use_bidirectional_attention": True}),
        ("RoPE of", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("RoPE of", {"rope_scaling": {"type": "longrope"}}),
    ]
    for message, settled in settings:
        with pytest.raises(NotImplementedError, match=message):
            families.check_config(SimpleNamespace(**settled), world_size=2)
    families.check_config(SimpleNamespace(rope_scaling={"type": "dynamic"}), world_size=1)
    with pytest.raises(NotImplementedError, match="does not tell"):
        layer = nn.Module()
        layer.config, layer.layer_idx = SimpleNamespace(layer_types=["sliding_attention"]), 0  # type: ignore[assignment]
        families.check_layer(layer, {}, True, None)


def test_names() -> None:
    with pytest.raises(ValueError, match="of its own"):
        Attention(ContextParallel(), "my_flash")
    first, model = alone()
    Attention(ContextParallel())
    with pytest.raises(ValueError, match="another Attention was made under the name"):
        first.shard_batch(packed_row())
    with pytest.raises(ValueError, match="another Attention was made under the name"):
        first.apply(model)


def test_a_model_keeps_the_attention_that_was_applied() -> None:
    """One made later under its name, with another target, is not taken for it."""
    first, model = alone()
    batch = first.shard_batch(packed_row())
    Attention(first.target)
    model(**batch)
    for layout in ("zigzag", layouts.build("contiguous", 8, 1)):
        Attention(ContextParallel(None, layout=layout))
        with pytest.raises(ValueError, match="another Attention was made under the name"):
            model(**batch)
    saved = io.BytesIO()
    torch.save(model, saved)  # as for another process
    torch.load(io.BytesIO(saved.getvalue()), weights_only=False)(**Attention(ContextParallel()).shard_batch(packed_row()))


def test_a_model_takes_another_name() -> None:
    """By transformers' own switch."""
    _, model = alone()
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip("needs a transformers with set_attn_implementation")
    second = Attention(ContextParallel(None, layout="zigzag"), name="second")
    model.set_attn_implementation("second")
    model(**second.shard_batch(packed_row()))


def test_what_layers_ask_in_vain() -> None:
    attention, model = alone()
    ids, layer = packed_row()["input_ids"], model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="an attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    q = torch.randn(1, 4, 6, 8)
    with pytest.raises(ValueError, match="generation with a cache"):
        attention(layer, q[:, :, -1:], q, q, None)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        attention(layer, q, q, q, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="the routers' loss"):
        attention(layer, q, q, q, None, output_router_logits=True)
    with pytest.raises(NotImplementedError, match="without a causal mask"):
        attention(layer, q, q, q, None, is_causal=False, sliding_window=3)
    with pytest.raises(NotImplementedError, match="position_ids of shape"):
        attention(layer, q, q, q, None, position_ids=torch.zeros(3, 1, 6, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="position_bias"):
        attention(layer, q, q, q, None, position_bias=q)
    with pytest.raises(ValueError, match="sliding_window=0"):
        attention(layer, q, q, q, None, sliding_window=0)
    with pytest.raises(NotImplementedError, match="a mask function"):
        refuse_masks(use_vmap=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    attention.shard_batch({"input_ids": torch.ones(1, 6, dtype=torch.int64), "attention_mask": mask})
    with pytest.raises(NotImplementedError, match="padding without a causal mask"):
        attention(layer, q, q, q, None, is_causal=False)


def last_loss(world_size: int, *options: str) -> float:
    """Of the example."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command += [str(root / "examples/finetune_transformers.py"), "--steps", "3", "--seq-len", "501", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_the_example() -> None:
    want = last_loss(1)
    assert abs(last_loss(2) - want) < 1e-4
    if not FSDP_ON_CPU:
        pytest.skip("--fsdp needs torch 2.7, whose FSDP2 runs on CPUs")
    assert abs(last_loss(2, "--layout", "balanced", "--fsdp") - want) < 1e-4


# -- ring-flash-attention's names ----------------------------------------------------------------------------------------------


def substituted(rank: int, world_size: int, family: str, stride: int) -> None:
    """A model with flash attention shares packed rows over a group; contiguous parts, as its users cut them."""
    name = "flash_attention_2"
    before = registered(name)
    documents = (10, 1, 13)
    model, row = build(family), packed_row(documents)
    want, _ = each_alone(model, row, documents)
    try:
        substitute_hf_flash_attn(dist.group.WORLD, stride)
        own = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        assert own[name] is not before[0] and "ring_attn" in own
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = name
        half = slice(rank * 24 // world_size, (rank + 1) * 24 // world_size)
        mine = {key: row[key][:, half] for key in ("input_ids", "position_ids")}
        with pytest.raises(ValueError, match="update_ring_flash_attn_params"):
            model(**mine, use_cache=False)
        cu = torch.tensor([0, 10, 11, 24], dtype=torch.int32)
        update_ring_flash_attn_params(cu, dist.group.WORLD)
        with Watch() as seen:
            logits = model(**mine, use_cache=False).logits
        close("logits", ContextParallel(dist.group.WORLD).unshard(logits, 1), want)
        assert seen.calls and all(call.recipe.heads_stride == stride for call in seen.calls)
        use_ring_attn(False)
        called = []
        with mock.patch.dict(substitute._BEFORE, {name: (lambda *a, **k: called.append(1), None)}):
            substitute_hf_flash_attn(dist.group.WORLD, stride)
            with pytest.raises(TypeError):
                model(**mine, use_cache=False)
        assert called == [1], "what was there before is called"
    finally:
        use_ring_attn(True)
        substitute._BOUNDARIES.clear()
        register(name, *before)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [0, 1])
def test_substitute(ranks: Any, stride: int) -> None:
    ranks(2).run(substituted, "mistral", stride)


def test_substitute_refuses_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        update_ring_flash_attn_params(torch.tensor([0, 9, 4], dtype=torch.int32), None)
    with pytest.raises(ValueError, match="cu_seqlens"):
        update_ring_flash_attn_params(torch.tensor([0], dtype=torch.int32), None)
    with pytest.raises(ValueError, match="heads_k_stride"):
        substitute_hf_flash_attn(None, -1)


def test_a_layer_passes_its_dropout_and_its_dtype() -> None:
    attention, model = alone()
    layer, q = model.model.layers[0].self_attn, torch.randn(1, 4, 6, 8)
    dropped, whole = (attention(layer, q, q, q, None, dropout=p)[0] for p in (0.5, 0.0))
    assert not torch.equal(dropped, whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(layer, q, q, q.to(torch.bfloat16), None)[0].dtype == torch.bfloat16


def test_a_layer_looks_at_its_model() -> None:
    """Also of a model that was made with the name, without `apply`."""
    attention, model = alone()
    layer, q = model.model.layers[0].self_attn, torch.randn(1, 4, 6, 8)
    layer.config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="output_router_logits"):
        attention(layer, q, q, q, None)
    tuned = nn.Module()
    tuned.attn_temperature_tuning = True
    with pytest.raises(NotImplementedError, match="scales queries by positions"):
        families.check_layer(tuned, {}, True, None)
    rope = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(NotImplementedError, match="RoPE of"):
        families.check_config(SimpleNamespace(rope_parameters=rope), 2)


def test_positions_that_are_written_over_say_other_documents() -> None:
    attention, model = alone()
    ids = packed_row()["input_ids"]
    cu = torch.tensor([0, 5, ids.shape[1]], dtype=torch.int32)
    two, one = attention.shard_batch({"input_ids": ids}, cu_seqlens=cu), attention.shard_batch({"input_ids": ids})
    two["position_ids"].copy_(one["position_ids"])
    got, want = (model(input_ids=ids, position_ids=each["position_ids"], use_cache=False).logits for each in (two, one))
    torch.testing.assert_close(got, want)


def test_substitutes_refuse_masks_made_by_functions() -> None:
    substitute_hf_flash_attn(None)
    mask = registered("ring_attn")[1]
    if mask is None:
        pytest.skip("needs a transformers that asks for masks by the name of an implementation")
    with pytest.raises(NotImplementedError, match="a mask function"):
        mask(use_vmap=True)


def boundaries_of_groups(rank: int, world_size: int) -> None:
    groups = [dist.new_group([n]) for n in range(world_size)]
    with mock.patch.dict(substitute._BOUNDARIES, clear=True):
        update_ring_flash_attn_params(torch.tensor([0, 3, 8], dtype=torch.int32), groups[rank])
        assert [*substitute._BOUNDARIES] == [group_name(groups[rank])]


def test_boundaries_are_of_a_group(ranks) -> None:
    ranks(2).run(boundaries_of_groups)
