"""The modules of a decoder as the tensors and numbers that the kernels take, or why they can't be fused."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from torch import nn

from .._compat import has_foreign_hooks
from ..kernels.layer_definition import DecoderLayer, Norm
from ..kernels.lora import ProjectionGroup
from .lora_view import CACHE, group_of, watch_hooks
from .watch import Watch, same

TwoGroups: TypeAlias = tuple[ProjectionGroup, ProjectionGroup]


class Made(NamedTuple):
    """What was made of a layer, of which groups and tensors, and what that depends on."""

    fused: Any
    made_from: tuple
    watch: Watch


# config.hidden_act -> name in fastllm.kernels.activation
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def mlp_groups(mlp: Any, watch: Watch | None = None) -> TwoGroups | str:
    """(gate and up, down), or why they can't be fused; `watch` learns what that depends on."""
    if activation_of(mlp) is None:
        return f"its activation is {activation_name(mlp)!r}"
    names = ("gate_up_proj",) if "gate_up_proj" in mlp._modules else ("gate_proj", "up_proj")
    gate_up = group_of(mlp, "gate_up", [mlp._modules[name] for name in names], watch)
    if isinstance(gate_up, str):
        return f"{' or '.join(names)}: {gate_up}"
    down = group_of(mlp, "down", (mlp.down_proj,), watch)
    return f"down_proj: {down}" if isinstance(down, str) else (gate_up, down)


def attention_groups(
    attention_module: Any, watch: Watch | None = None
) -> tuple[ProjectionGroup, ProjectionGroup] | str:
    """(q, k and v; o), or why they can't be fused; `watch` learns what that depends on."""
    module = attention_module
    if not getattr(module, "is_causal", True):
        return "its attention sees later tokens"
    names = ("qkv_proj",) if "qkv_proj" in module._modules else ("q_proj", "k_proj", "v_proj")
    qkv = group_of(module, "qkv", [module._modules[name] for name in names], watch)
    if isinstance(qkv, str):
        return f"{' or '.join(names)}: {qkv}"
    output = group_of(module, "output", (module.o_proj,), watch)
    return f"o_proj: {output}" if isinstance(output, str) else (qkv, output)


def fused_layer(layer: Any) -> DecoderLayer | str:
    """The decoder layer as tensors and numbers, or why it can't run as one node."""
    cache = layer.__dict__.setdefault(CACHE, {})
    known = cache.get("layer")
    if known is not None and known.watch.holds():
        return known.fused
    if "self_attn" not in layer._modules:
        return "their attention is cross-attention"
    watch = Watch()
    attention_module, mlp = layer.self_attn, layer.mlp
    for name, module in layer._modules.items():
        if has_foreign_hooks(module):
            return f"a forward hook is registered on {name}"
        watch_hooks(watch, module)
        if isinstance(module, nn.Dropout):
            if module.training and module.p > 0:
                return f"{name} is {module.p}"
            watch.entries(module.__dict__, "training", "p")
    attention_part = attention_groups(attention_module, watch)
    if isinstance(attention_part, str):
        return attention_part
    mlp_part = mlp_groups(mlp, watch)
    if isinstance(mlp_part, str):
        return mlp_part
    activation = activation_of(mlp)
    assert activation is not None
    norms = _norms_of(layer)
    weights = []
    for module in norms.values():
        watch.tensors(module, "weight")
        weights += [module.weight, module.weight.data_ptr(), module.weight.requires_grad]
    watch.entries(layer._modules, *layer._modules)
    watch.entries(attention_module.__dict__, "is_causal", "head_dim")
    watch.entries(mlp.config.__dict__, "hidden_activation", "hidden_act")
    made_from = (activation, *attention_part, *mlp_part, *weights)
    if known is not None and same(known.made_from, made_from):
        cache["layer"] = known._replace(watch=watch)
        return known.fused
    fused = DecoderLayer(
        qkv=attention_part[0],
        output=attention_part[1],
        gate_up=mlp_part[0],
        down=mlp_part[1],
        activation=activation,
        head_dim=attention_module.head_dim,
        **{name: _norm(module) for name, module in norms.items()},
    )
    cache["layer"] = Made(fused, made_from, watch)
    return fused


def _norms_of(layer: Any) -> dict[str, Any]:
    """A decoder layer's norms, by their names in `DecoderLayer`."""
    own, heads = layer._modules, layer.self_attn._modules
    # Gemma 2 and 3 call the norm before the MLP so, and have one after each half besides.
    norms_outputs = "pre_feedforward_layernorm" in own
    found = {
        "input_norm": own["input_layernorm"],
        "post_norm": own["pre_feedforward_layernorm" if norms_outputs else "post_attention_layernorm"],
    }
    if "q_norm" in heads:
        found |= {"query_norm": heads["q_norm"], "key_norm": heads["k_norm"]}
    if norms_outputs:
        found |= {
            "attention_out_norm": own["post_attention_layernorm"], "mlp_out_norm": own["post_feedforward_layernorm"]
        }  # fmt: skip
    return found


def head_group(model: Any) -> ProjectionGroup | str:
    """The language-model head, or why it can't be fused. `modules_to_save` gives its trained copy."""
    head = model.lm_head
    saved = getattr(head, "modules_to_save", None)
    if saved is not None:
        active = [name for name in head.active_adapters if name in saved]
        head = saved[active[0]] if active and not head.disable_adapters else head.original_module
    group = group_of(model, "lm_head", (head,))
    if isinstance(group, ProjectionGroup) and group.has_dropout:
        return "lm_head: its adapter has dropout"
    return f"lm_head: {group}" if isinstance(group, str) else group


def _norm(module: Any) -> Norm:
    return Norm(module.weight, eps_of(module), getattr(type(module), "weight_offset", 0.0))


def eps_of(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def activation_of(mlp: Any) -> str | None:
    return ACTIVATIONS.get(activation_name(mlp))


def activation_name(mlp: Any) -> str:
    return getattr(mlp.config, "hidden_activation", None) or mlp.config.hidden_act
