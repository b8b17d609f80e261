"""Which models of transformers are one device's in all but their attention, and which are refused.

An attention implementation is asked about attention alone. A model that looks at other tokens elsewhere (recurrence, convolution,
routing losses), that does not ask by name, or that tells of its mask only by the mask, would be wrong without an error. So families
are named here after they were compared with one device; the rest is for who knows what they do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

FAMILIES = frozenset(
    {
        *("afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "bitnet", "cohere", "cohere2"),
        *("cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "ernie4_5", "ernie4_5_moe", "exaone"),
        *("exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm"),
        *("glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite"),
        *("granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hy_v3"),
        *("hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "laguna", "llama", "mellum", "mimo_v2_flash"),
        *("minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "nanochat"),
        *("nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3"),
        *("qwen3_moe", "sarvam_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu"),
    }
)
"""``config.model_type`` of the families that were compared, logits and gradients, on 2 ranks (transformers 5.24)."""

HEADS = ("ForCausalLM", "LMHeadModel")
"""How classes end whose loss is that of the next token; a model without a head has none."""

OWN_LABELS = ("ForTokenClassification", "ForMaskedLM")
"""How classes end whose labels are those of the tokens themselves."""

POOLED = ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
"""How classes end whose head looks at one token of a row, or compares all."""

SCORED = ("position_bias", "indices", "block_indices", "sinks", "head_mask")
"""What some layers pass that changes scores, and that has no meaning here."""

ATTENTION = {"full_attention", "sliding_attention"}


def check_model(model: Any, any_model: bool, world_size: int) -> None:
    """NotImplementedError for a model that does not ask for attention by name, or that nobody has compared."""
    import transformers

    model = getattr(model, "_orig_mod", model)  # of a compiled one
    name = type(model).__name__
    if world_size > 1 and getattr(model.config, "get_text_config", lambda: model.config)() is not model.config:
        raise NotImplementedError(f"{name} has parts with attentions of their own: {_PARTS}")
    if world_size > 1 and name.endswith(POOLED):
        raise NotImplementedError(f"{name} looks at one token of all, which one rank has: {_POOLED}")
    if not any_model:
        check_family(model.config)
        if not name.endswith(HEADS) and getattr(model, "base_model", None) is not model:
            raise NotImplementedError(f"{name}: its loss may look at other tokens than the next; {_OPEN}")
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            source = sys.modules[type(part).__module__]
            own = [x for x in part.modules() if "ttention" in type(x).__name__ and type(x).__module__ == source.__name__]
            if own and not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
                raise NotImplementedError(
                    f"{type(part).__name__} of transformers {transformers.__version__} does not ask for its attention by name"
                )


def own_labels(model: Any) -> str:
    """The class of a model with a head whose labels are of the tokens themselves, else nothing."""
    made = type(getattr(model, "_orig_mod", model))
    return made.__name__ if any(each.__name__.endswith(OWN_LABELS) for each in made.__mro__) else ""


def check_family(config: Any) -> None:
    """NotImplementedError unless models of a config were compared."""
    if (family := getattr(config, "model_type", None)) not in FAMILIES:
        raise NotImplementedError(f"models of {family!r} have not been compared with one device; {_OPEN}")


_WEIGHTS = "output_attentions: attention weights are never in memory here; take 'eager' to look at them"
_ROUTERS = "output_router_logits: the routers' loss is of all tokens together; switch it off"
_PARTS = (
    "apply it to the part whose tokens are cut, model.model.language_model in most, and cut inputs_embeds (docs/transformers.md, "
    "'Images beside text')"
)
_POOLED = "take the model under it, and the loss at the token that counts (docs/transformers.md, 'Other heads')"
_OPEN = "where only attention looks at other tokens, pass any_model=True, and compare"


def check_config(config: Any, world_size: int) -> None:
    """NotImplementedError for settings by which a model looks at other tokens outside of its attention."""
    if others := set(getattr(config, "layer_types", None) or ()) - ATTENTION:
        raise NotImplementedError(f"layer_types {sorted(others)}: {' and '.join(sorted(ATTENTION))} are done here")
    if getattr(config, "output_attentions", False):
        raise NotImplementedError(_WEIGHTS)
    if getattr(config, "output_router_logits", False):
        raise NotImplementedError(_ROUTERS)
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError("encoders with decoders: their tokens are cut apart")
    if world_size > 1 and getattr(config, "use_bidirectional_attention", None) is True:
        raise NotImplementedError(
            "use_bidirectional_attention: the model's mask says who sees whom, not its layers; say it by a function for target "
            "(docs/transformers.md, 'Answers that share a prompt')"
        )
    if world_size > 1 and (kinds := _rope_types(config) & {"dynamic", "longrope"}):
        raise NotImplementedError(f"RoPE of {sorted(kinds)}: each rank would take its frequencies by its own last position")


def _rope_types(config: Any) -> set[str]:
    """The kinds of RoPE that a config has, for all layers or for some."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {str(each.get("rope_type", each.get("type"))) for each in (rope, *rope.values()) if isinstance(each, Mapping)}


def check_layer(module: nn.Module, kwargs: Mapping[str, Any], causal: bool, sliding_window: int | None) -> None:
    """ValueError or NotImplementedError for what a layer asks and this attention does not do."""
    if kwargs.get("output_attentions"):
        raise NotImplementedError(_WEIGHTS)
    if kwargs.get("output_router_logits"):
        raise NotImplementedError(_ROUTERS)
    if asked := [name for name in SCORED if kwargs.get(name) is not None]:
        raise NotImplementedError(f"{type(module).__name__} asks for {', '.join(asked)}, which is not done here")
    if getattr(module, "attn_temperature_tuning", False):
        raise NotImplementedError(f"{type(module).__name__} scales queries by positions that it counts itself")
    if sliding_window is not None and not causal:
        raise NotImplementedError("a sliding window without a causal mask: models differ in what they mean by it")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: a token sees itself at least")
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and kinds[layer] == "sliding_attention" and sliding_window is None:
        raise NotImplementedError(f"{type(module).__name__} has a sliding window that it does not tell")
