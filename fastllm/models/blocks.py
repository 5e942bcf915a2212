"""The fast forwards, written once: RMSNorm, GLU MLP, attention, whole decoder layers, and the head with its loss.

Each factory returns a `forward` for a subclass of one Hugging Face class. `otherwise` is that class's own forward, run
whenever the fused path can't serve the call, so every case gives the result of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .._compat import attentions_are_collected, default_causal_lm_loss, has_foreign_hooks
from .._notices import notice
from ..kernels.attention import AttentionCase, attention
from ..kernels.decoder_layer import DecoderPass, decoder_layer
from ..kernels.dispatch import compute_dtype
from ..kernels.glu import glu
from ..kernels.layer_definition import DecoderLayer, LayerCall, qkv_widths
from ..kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    LabelCount,
    LogitTransform,
    TokenLosses,
    linear_cross_entropy,
    linear_token_losses,
)
from ..kernels.lora import ProjectionGroup, draws_masks, project_group
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope
from .arch import Arch
from .chains import Recordable
from .fused_parts import ACTIVATIONS, activation_name, attention_groups, eps_of, fused_layer, head_group, mlp_groups
from .image_layout import lay_out_images, needed_on_host, read_together
from .length_rounding import lengthen
from .logits import LazyLogits
from .lora_view import FP8_GRADIENT
from .memory import ActivationPlanner
from .mixed_precision import WIDENS, mixed_precision
from .model_methods import PLANNER, ModelMethods
from .packed_rows import keep_documents_apart, mask_of_documents, window_of

Forward = Callable[..., Any]

# What transformers passes down to attention functions and fastllm's own dispatch serves or may ignore.
_IGNORABLE = frozenset(
    {
        "use_cache", "cache_position", "output_attentions", "output_hidden_states", "documents",
        "cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask",
    }
)  # fmt: skip


def norm_forward(*, offset: float = 0.0) -> Forward:
    """RMSNorm. With `offset` 1 the weight is stored as its distance from one (Gemma)."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, eps_of(self), offset=offset)

    return forward


def mlp_forward(otherwise: Forward) -> Forward:
    """down(act(gate(x)) * up(x)) with fused LoRA, for calls that are differentiated."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        groups = mlp_groups(self) if torch.is_grad_enabled() else "no gradient is wanted"
        if isinstance(groups, str):
            return otherwise(self, x)
        gate_up, down = groups
        gate, up = project_group(x, gate_up).chunk(2, dim=-1)
        return project_group(glu(gate, up, ACTIVATIONS[activation_name(self)]), down)

    return forward


def embedding_forward(otherwise: Forward) -> Forward:
    """Embeddings in fp32 where the weights are fp16: the residual stream takes its dtype from them."""

    def forward(self: Any, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = otherwise(self, input_ids)
        return embedded.float() if embedded.dtype == torch.float16 else embedded

    return forward


def attention_forward(otherwise: Forward) -> Forward:
    """Attention with fused LoRA projections and RoPE, for calls that are differentiated and use no cache."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        groups: Any = "no gradient is wanted"
        if past_key_values is None and position_embeddings is not None and torch.is_grad_enabled():
            groups = attention_groups(self)
        if isinstance(groups, str) or attentions_are_collected():
            documents = kwargs.pop("documents", None)
            if documents is not None:
                attention_mask = mask_of_documents(documents, self, hidden_states)
            return otherwise(
                self, hidden_states=hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        qkv, output = groups
        assert position_embeddings is not None
        parts = project_group(hidden_states, qkv).split(qkv_widths(qkv, output), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        q, k = (getattr(self, name)(x) if hasattr(self, name) else x for name, x in (("q_norm", q), ("k_norm", k)))
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        attended = attention(q, k, v.transpose(1, 2), attention_case(self, hidden_states, attention_mask, kwargs))
        return project_group(attended.transpose(1, 2).flatten(2), output), None

    return forward


def decoder_layer_forward(otherwise: Forward) -> Forward:
    """A whole decoder layer as one autograd node, where all its parts can be fused."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        planner: ActivationPlanner = getattr(self, PLANNER)
        attention_module = self._modules.get("self_attn")
        index = -1 if attention_module is None else attention_module.layer_idx
        layer: DecoderLayer | str = "a key-value cache is in use"
        if past_key_values is None and position_embeddings is not None and not attentions_are_collected():
            ran = planner.recordings.layer_in_chain("decoder", index)
            layer = fused_layer(self) if ran is None else ran
        if isinstance(layer, str):
            call = _bind(
                otherwise, self, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
            wants_recompute = planner.setting is not False and past_key_values is None and self.training
            if wants_recompute and torch.is_grad_enabled():
                return torch.utils.checkpoint.checkpoint(call, hidden_states, use_reentrant=False)  # pyright: ignore
            return call(hidden_states)
        assert position_embeddings is not None
        cos, sin = position_embeddings
        kwargs["position_ids"] = position_ids  # flash-attn keeps documents apart by them
        case = attention_case(attention_module, hidden_states, attention_mask, kwargs)
        if not torch.is_grad_enabled():
            return decoder_layer(hidden_states, layer, LayerCall(cos, sin, case))
        keep = planner.keep(index, hidden_states, layer)
        kept_weights = planner.kept_weights(index, hidden_states)
        call = LayerCall(
            cos, sin, case, keep, planner.offload, planner.attention_backend, kept_weights, planner.frees_weights,
            planner.gradient_room, planner.rows_away(index, hidden_states.shape[:-1].numel()),
        )  # fmt: skip
        recorded = None
        if not keep.is_offloaded and not draws_masks(layer) and not has_foreign_hooks(self):
            dtype = compute_dtype(hidden_states, layer.qkv.dtype)
            how = Recordable(self, fused_layer, lambda layer: DecoderPass(layer, dtype), decoder_layer, self.hands_on)
            recorded = planner.recordings.find(
                "decoder", index, hidden_states, call, layer, how, conditions=(dtype, keep, kept_weights)
            )
        return decoder_layer(hidden_states, layer, call) if recorded is None else recorded()

    return forward


def causal_lm_forward(otherwise: Forward) -> Forward:
    """A causal language model whose loss never materialises the logits. Without labels: transformers' own forward."""

    @can_return_tuple
    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        targets = labels if labels is not None else kwargs.get("shift_labels")
        reason = "there are no labels" if targets is None else head_reason(self)
        is_step = self.training and torch.is_grad_enabled()
        if use_cache is None and targets is not None and (is_step or position_ids is not None):
            # Nobody reads this cache; with one no layer runs fused, and transformers lets packed rows see each other.
            use_cache = False
        if reason is None and isinstance(logits_to_keep, int) and logits_to_keep == 0:
            loss, outputs = _fused_loss(
                self, labels, use_cache=use_cache, input_ids=input_ids, attention_mask=attention_mask,
                position_ids=position_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs,
            )  # fmt: skip
            return CausalLMOutputWithPast(
                loss=loss,
                logits=LazyLogits(outputs.last_hidden_state, self.lm_head, logit_transform(self.config)),  # pyright: ignore[reportArgumentType]
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )
        with mixed_precision(self):
            return otherwise(
                self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
                logits_to_keep=logits_to_keep, **kwargs,
            )  # fmt: skip

    return forward


def token_losses(
    model: Any, labels: torch.Tensor | None, *, statistics: tuple[str, ...] = (), **inputs: Any
) -> tuple[TokenLosses, torch.Tensor, Any]:
    """Losses of each position, for trainers that reduce them themselves.

    Returns: (losses, each [B, S - 1], or [B, S] with `shift_labels` among the inputs; mask of trained positions; the
    decoder's outputs).
    """
    shift_labels = inputs.pop("shift_labels", None)
    targets, outputs, count = _run_decoder(model, labels, shift_labels, **inputs)
    hidden = outputs.last_hidden_state
    head = head_group(model)
    assert isinstance(head, ProjectionGroup)
    losses = linear_token_losses(
        hidden.flatten(0, 1), head, targets.flatten(), transform=logit_transform(model.config), valid_rows=count.get(),
        statistics=statistics, fp8_gradient=hasattr(model, FP8_GRADIENT),
    )  # fmt: skip
    keep = slice(None) if shift_labels is not None else slice(None, -1)
    nll, entropy, is_top1 = (None if part is None else part.view(targets.shape)[:, keep] for part in losses)
    assert nll is not None
    return TokenLosses(nll, entropy, is_top1), targets[:, keep] != IGNORE_INDEX, outputs


def decoder_classes(
    module: Any,
    prefix: str,
    *,
    norm_offset: float = 0.0,
    caps_scores: bool = False,
    hands_on: bool = True,
    names: Mapping[str, str] = {},
) -> dict[type, type]:
    """Fast subclasses of a transformers modeling module whose decoder is Llama's: pre-norm, rotary attention, GLU MLP.

    Each keeps the name of the class it stands for, e.g. `LlamaMLP`. `names` gives those that are not called by prefix
    and suffix. `caps_scores`: attention heeds `attn_logit_softcapping`, which some configs have without a use for it.
    `hands_on`: what a layer gives goes to the next one as it is, and nowhere else, as long as transformers does not
    collect it.
    """

    def class_of(suffix: str) -> Any:
        return getattr(module, names.get(suffix, prefix + suffix))

    norm, mlp, attention_class, layer = map(class_of, ("RMSNorm", "MLP", "Attention", "DecoderLayer"))
    return {
        **_subclass(norm, forward=norm_forward(offset=norm_offset), weight_offset=norm_offset),
        **_subclass(mlp, forward=mlp_forward(mlp.forward)),
        **_subclass(attention_class, forward=attention_forward(attention_class.forward), caps_scores=caps_scores),
        **_subclass(
            layer,
            forward=decoder_layer_forward(layer.forward),
            gradient_checkpointing=property(lambda self: False, checkpointing_requested),
            hands_on=hands_on,
        ),
    }


def model_class(original: Any) -> dict[type, type]:
    """The fast subclass of a model with a language-model head, e.g. `LlamaForCausalLM`."""
    return _subclass(original, ModelMethods, forward=causal_lm_forward(original.forward))


def embedding_class(original: Any) -> dict[type, type]:
    """The fast subclass of the embedding of a family whose residual stream passes the range of fp16."""
    return _subclass(original, forward=embedding_forward(original.forward), **{WIDENS: True})


def causal_lm_arch(
    model_type: str, module: Any, prefix: str, *, more: Mapping[type, type] = {}, **options: Any
) -> Arch:
    """The record of a text family whose classes are all called by prefix and suffix; options of `decoder_classes`.
    `more`: fast classes of further modules of the decoder."""
    decoder = {**decoder_classes(module, prefix, **options), **more}
    return Arch(model_type, model_class(getattr(module, f"{prefix}ForCausalLM")), decoder)


def head_reason(model: Any) -> str | None:
    """Why the fused loss can't serve the model, or None. Told once."""
    reason = None
    if model.loss_function is not default_causal_lm_loss():
        reason = "model.loss_function is not the causal language-model loss"
    elif getattr(model.config.get_text_config(), "use_bidirectional_attention", None):
        reason = "attention sees later tokens"
    else:
        group = head_group(model)
        reason = group if isinstance(group, str) else None
    if reason is not None:
        notice(f"fastllm: the loss is computed from full logits, since {reason}", once=f"head:{reason}")
    return reason


def logit_transform(config: Any) -> LogitTransform:
    """What the family does to its logits, from the config's own field names."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    divisor = getattr(text, "logits_scaling", None)
    return LogitTransform(
        scale=float(scale if divisor is None else 1.0 / divisor),
        softcap=float(getattr(text, "final_logit_softcapping", None) or 0.0),
    )


def attention_case(
    module: Any, hidden_states: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> AttentionCase:
    """The attention of one call. Other implementations than SDPA are called as transformers calls them."""
    # Llama 3.2 Vision calls its attention's dropout plainly so.
    rate = module.attention_dropout if hasattr(module, "attention_dropout") else module.dropout
    dropout = rate if module.training else 0.0
    implementation = module.config._attn_implementation
    documents, window = kwargs.get("documents"), window_of(module)
    softcap = (module.attn_logit_softcapping or 0.0) if module.caps_scores else 0.0
    if implementation in ("sdpa", "eager") and not kwargs.get("output_attentions"):
        if documents is None:
            return AttentionCase(module.scaling, mask, dropout, softcap=softcap)
        packed = documents.on(hidden_states.device) if documents.is_packed else None
        window = window if window < documents.length else 0
        return AttentionCase(module.scaling, None, dropout, documents=packed, sliding_window=window, softcap=softcap)
    if documents is not None:
        mask = mask_of_documents(documents, module, hidden_states)
    passed = {name: value for name, value in kwargs.items() if name not in _IGNORABLE}
    options = {"sliding_window": window} if window else {}
    options |= {"softcap": softcap} if softcap else {}
    interface = ALL_ATTENTION_FUNCTIONS[implementation]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = interface(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **options, **passed)
        return out.transpose(1, 2)

    return AttentionCase(module.scaling, mask, dropout, run)


def _fused_loss(model: Any, labels: torch.Tensor | None, **inputs: Any) -> tuple[torch.Tensor, Any]:
    num_items = inputs.pop("num_items_in_batch", None)
    targets, outputs, count = _run_decoder(model, labels, inputs.pop("shift_labels", None), **inputs)
    head = head_group(model)
    assert isinstance(head, ProjectionGroup)
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(targets.device)
    loss = linear_cross_entropy(
        outputs.last_hidden_state.flatten(0, 1), head, targets.flatten(), num_items=num_items,
        transform=logit_transform(model.config), valid_rows=count.get(),
        spares_memory=getattr(model, PLANNER).frees_weights, fp8_gradient=hasattr(model, FP8_GRADIENT),
    )  # fmt: skip
    return loss, outputs


def _run_decoder(
    model: Any, labels: torch.Tensor | None, shift_labels: torch.Tensor | None, **inputs: Any
) -> tuple[torch.Tensor, Any, LabelCount]:
    """(labels aligned with the hidden states [B, S], outputs of the decoder, number of trained labels)."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    device = model.lm_head.weight.device
    count = LabelCount(shift_labels)
    asked = needed_on_host(model, inputs)
    is_right_padding = _is_right_padding(inputs.get("attention_mask"), shift_labels)
    if is_right_padding is not None:
        asked["is_right_padding"] = is_right_padding
    on_host = read_together(asked)  # the host waits here once
    if on_host.pop("is_right_padding", False) and inputs.get("past_key_values") is None:
        # Causal attention never lets a token see padding to its right.
        inputs["attention_mask"] = None
    lengthen(inputs, model.config, getattr(model, PLANNER).recordings)
    keep_documents_apart(model.config, inputs)
    lay_out_images(model, inputs, on_host)
    with mixed_precision(model):
        outputs = model.model(**inputs)
    outputs.last_hidden_state = outputs.last_hidden_state[:, : shift_labels.shape[1]].to(device)
    return shift_labels.to(device), outputs, count


def _is_right_padding(mask: torch.Tensor | None, aligned_labels: torch.Tensor) -> torch.Tensor | None:
    """Whether a 2-D mask only hides positions at the end of each row, none of which is trained, as a bool on the
    device; None without such a mask."""
    if mask is None or mask.dim() != 2 or mask.shape != aligned_labels.shape:
        return None
    visible = mask != 0
    ordered = (visible[:, 1:] <= visible[:, :-1]).all()
    return ordered & ~(~visible & (aligned_labels != IGNORE_INDEX)).any()


def checkpointing_requested(layer: Any, value: bool) -> None:
    """A trainer switches transformers' checkpointing: fused layers follow the model's own setting instead."""
    planner = layer.__dict__.get(PLANNER)
    if planner is not None and bool(value) != (planner.setting is not False):
        notice(
            f"fastllm: gradient_checkpointing={value} from the trainer is left to the model's own setting, "
            f"use_gradient_checkpointing={planner.setting!r}",
            once=f"checkpointing:{value}",
        )


def _subclass(original: Any, *mixins: type, **attributes: Any) -> dict[type, type]:
    return {original: type(original.__name__, (*mixins, original), {**attributes, "__module__": __name__})}


def _bind(function: Forward, module: Any, **kwargs: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden_states: function(module, hidden_states, **kwargs)
