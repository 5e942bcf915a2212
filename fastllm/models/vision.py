"""`FastModel` and `FastVisionModel`: any model, text or vision-language, behind the same two calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import UnsupportedError
from .._notices import notice
from . import modes
from .language import DEFAULT_LENGTH, adapt_with, load_with
from .vision_layout import Parts

# Arguments of features that are not here: name -> (value that asks for nothing, what it would do).
_LATER = {
    "auto_model": (None, "another of transformers' Auto classes"),
    "whisper_language": (None, "speech recognition"),
    "whisper_task": (None, "speech recognition"),
}
# Switches of Unsloth's compiler, which has no counterpart here: name -> default.
_COMPILER_ONLY = {"fullgraph": True, "unsloth_force_compile": False}


class FastModel:
    """Loads any model for fine-tuning, with its processor where it sees images, and adds LoRA adapters to it."""

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit",
        max_seq_length: int | None = DEFAULT_LENGTH,
        dtype: Any = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        load_in_fp8: bool | str = False,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: Mapping[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        return_logits: bool = False,
        fullgraph: bool = True,
        use_exact_model_name: bool = False,
        auto_model: Any = None,
        whisper_language: str | None = None,
        whisper_task: str | None = None,
        unsloth_force_compile: bool = False,
        offload_embedding: bool = False,
        float32_mixed_precision: bool | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int = 3407,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        qat_scheme: str | None = None,
        target_parameters: Sequence[str] | None = None,
        unsloth_tiled_mlp: bool | str = False,
        text_only: bool = False,
        patch: bool = True,
        strict: bool = False,
        merge_micro_batches: bool = True,
        fp8_compute: bool = False,
        cuda_graphs: bool = True,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Load a checkpoint, or an adapter together with its base. Returns `(model, processor)` for a model that sees
        images, else `(model, tokenizer)`.

        Arguments, options and errors are those of `FastLanguageModel.from_pretrained`. In 4 and 8 bits the vision
        tower, its projector and the head stay in 16. `return_logits` is not needed: outputs always have logits.
        """
        where = "FastModel.from_pretrained"
        given = locals()
        for name, (off, what) in _LATER.items():
            if given[name] != off:
                raise UnsupportedError(
                    f"{name}={given[name]!r} asks for {what}, which is not part of this version", where=where
                )
        if target_parameters is not None:
            raise UnsupportedError(
                "target_parameters belongs to the adapter",
                where=where,
                fix="get_peft_model(..., target_parameters=...)",
            )
        changed = [name for name, default in _COMPILER_ONLY.items() if given[name] != default]
        if changed:
            notice(f"fastllm: {', '.join(changed)} has no effect: nothing is compiled", once="vision:compiler")
        return load_with(where, given)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        layers_to_transform: Sequence[int] | int | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        task_type: str = "CAUSAL_LM",
        temporary_location: str = "_unsloth_temporary_saved_buffers",
        qat_scheme: str | None = None,
        target_parameters: Sequence[str] | None = None,
        ensure_weight_tying: bool = False,
        use_dora: bool = False,
        finetune_last_n_layers: int | None = None,
        finetune_audio_layers: bool = False,
        **options: Any,
    ) -> Any:
        """Add LoRA adapters to the linear layers of the parts that are switched on. Returns a `peft.PeftModel`.

        Args:
            finetune_vision_layers, finetune_language_layers: adapters in the vision tower's blocks, in the language
                decoder's layers. finetune_attention_modules, finetune_mlp_modules: in which layers of those.
            target_modules: None takes all linear layers of those parts; a list keeps those of them that it names;
                `"all-linear"` switches everything on; a regular expression is taken as it is. In a list, `embed_tokens`
                and `lm_head` are trained in full.
            layers_to_transform, finetune_last_n_layers: decoder layers, with finetune_vision_layers=False.

        All other arguments are those of `FastLanguageModel.get_peft_model`.

        Raises:
            ArgumentError: an unknown argument, targets that match nothing in the model, all switches off.
            UnsupportedError: adapters in an audio tower, another task than CAUSAL_LM.
        """
        where = "FastModel.get_peft_model"
        given = locals()
        if finetune_audio_layers or task_type != "CAUSAL_LM":
            name = "finetune_audio_layers" if finetune_audio_layers else "task_type"
            raise UnsupportedError(f"{name}={given[name]!r} is not part of this version", where=where)
        parts = Parts(
            finetune_vision_layers, finetune_language_layers, finetune_attention_modules, finetune_mlp_modules
        )
        return adapt_with(where, given, parts, FastModel.get_peft_model)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode: dropout on, tokenizer pads right."""
        return modes.for_training(model, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode: dropout off, padding left, key-value cache on."""
        return modes.for_inference(model)


class FastVisionModel(FastModel):
    """`FastModel` under the name that vision scripts use."""
