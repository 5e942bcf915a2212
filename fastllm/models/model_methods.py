"""The methods that a model loaded by fastllm has beside those of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..gguf import ExportPlan
    from .patch import FastReport

# Attribute of the model and of each decoder layer that leads to the model's ActivationPlanner.
PLANNER = "_fastllm_planner"
TOKENIZER = "_fastllm_tokenizer"
# On a model without a planner: its `use_gradient_checkpointing`, which transformers' own checkpointing carries out.
CHECKPOINTING = "_fastllm_checkpointing"
TRAINED_IN_FULL = "_fastllm_trained_in_full"
MERGES_MICRO_BATCHES = "_fastllm_merges_micro_batches"


class ModelMethods:
    """Mixed into the class of a loaded model. Also reached through a `PeftModel`, which passes unknown names on."""

    @property
    def device(self) -> Any:
        """Where the model computes; an embedding in host memory does not count."""
        from .embedding_offload import device_of

        return device_of(self)  # pyright: ignore[reportArgumentType]

    def fast_report(self) -> FastReport:
        """Which layers run fused, which do not, and why."""
        from .patch import report

        return report(self)

    def for_training(self, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode: dropout on, tokenizer pads right. Returns the model."""
        from .modes import for_training

        return for_training(self, use_gradient_checkpointing)

    def for_inference(self) -> Any:
        """Evaluation mode: dropout off, key-value cache on, tokenizer pads left. Returns the model."""
        from .modes import for_inference

        return for_inference(self)

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`, in a tenth of its time: trainers call it for every batch."""
        if not isinstance(mode, bool) or getattr(self, "use_kernels", False):
            return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue]
        from .module_walks import set_training

        set_training(self, mode)  # pyright: ignore[reportArgumentType]
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers' method, in less time: trainers call it for every batch, too."""
        from .module_walks import count_parameters

        return count_parameters(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' generate, in evaluation mode whatever the present mode. Also takes a tokenizer's output,
        as its one argument or as `input_ids`, which is how `apply_chat_template` returns it since transformers 5."""
        from .mixed_precision import mixed_precision
        from .modes import release_weights

        release_weights(self, "text is generated")
        if isinstance(kwargs.get("input_ids"), Mapping):
            inputs = kwargs.pop("input_ids")
        if isinstance(inputs, Mapping):
            kwargs, inputs = {**inputs, **kwargs}, None
        was_training = self.training  # pyright: ignore[reportAttributeAccessIssue]
        self.eval()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            with mixed_precision(self):
                return super().generate(inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self.train(was_training)  # pyright: ignore[reportAttributeAccessIssue]

    def fast_generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`. Raises `UnsupportedError` for what only vLLM takes: prompts as text, `sampling_params`,
        `lora_request`."""
        from .._errors import UnsupportedError

        prompts = [*args[:1], *(kwargs[name] for name in ("prompts", "inputs", "input_ids") if name in kwargs)]
        texts = any(isinstance(p, str) or (isinstance(p, list) and p and isinstance(p[0], str)) for p in prompts)
        only_vllm = [name for name in ("sampling_params", "lora_request") if kwargs.get(name) is not None]
        if texts or only_vllm:
            raise UnsupportedError(
                f"{', '.join(only_vllm) or 'a prompt as text'} is for generation through vLLM, which is not part of "
                "this version", where="fast_generate",
                fix='model.generate(**tokenizer(text, return_tensors="pt").to(model.device), max_new_tokens=64)',
            )  # fmt: skip
        return self.generate(*args, **kwargs)

    def save_lora(self, save_directory: str | os.PathLike[str]) -> Any:
        """The active adapter as a PEFT folder: `save_pretrained_merged(..., save_method="lora")`."""
        return self.save_pretrained_merged(save_directory, save_method="lora")

    def save_pretrained_merged(
        self,
        save_directory: str | os.PathLike[str],
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        push_to_hub: bool = False,
        token: str | bool | None = None,
        is_main_process: bool = True,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        calibration_dataset: Any = None,
        num_calibration_samples: int = 512,
        max_seq_length: int = 512,
        target_bpw: float | None = None,
        max_size: int | str | None = None,
        **options: Any,
    ) -> Path:
        """Save the model with its active adapters merged, ready for plain transformers and vLLM. Returns the folder.

        Each tensor without an adapter is the base checkpoint's, byte for byte; each one with an adapter is merged in
        fp32 and rounded once to the checkpoint's dtype. Where the base is not at hand in 16 bits, the loaded weights
        are merged, and the call says so. Everything is read back, checked, and run against the model in memory before
        it is put in place.

        Args:
            tokenizer: the one of `from_pretrained` where left out.
            save_method: "merged_16bit", "merged_4bit" (bitsandbytes NF4; less exact), "dynamic_4bit" (the same with the
                linear layers in 16 bits that 4 bits would hurt most, by measurement) or "lora" (a PEFT folder). Also
                the path of the `dynamic_4bit.recipe.json` that such a run leaves beside the model, to make the same
                choice without data.
            push_to_hub, token, tags: also upload it, to the repository called like the folder; see
                `push_to_hub_merged`.
            is_main_process: False does nothing, for the other processes of a distributed run.
            max_shard_size: bytes or "5GB"; None keeps the base checkpoint's files.
            calibration_dataset: for "dynamic_4bit", rows that tell what matters: texts, or chats in any known format.
                `num_calibration_samples` rows are run in chunks of `max_seq_length` tokens.
            target_bpw, max_size: bits per weight of the whole "dynamic_4bit" model, its embedding included, or bytes
                (a number, or a text such as "6GB") of its files; a tenth more than "merged_4bit" where left out.
            **options: Unsloth's further arguments are accepted, and told where they have no effect.

        Raises:
            ArgumentError: an unknown argument or method; a folder that holds the base checkpoint or an adapter.
            UnsupportedError: a quantization format that is not served, an adapter that can't be merged.
            ModelError: what was read back differs from the trained model.
            SaveError: the disk is too small, or the folder can't be written.
        """
        from .calibration import calibration_data
        from .hub_upload import UploadRequest, upload_merged
        from .merging import SaveRequest, save_merged
        from .save_options import settle_save_options

        settle_save_options("save_pretrained_merged", options)
        folder = Path(save_directory)
        if not is_main_process:
            return folder
        data = calibration_data(calibration_dataset, num_calibration_samples, max_seq_length)
        save_request = SaveRequest(folder, tokenizer, save_method, max_shard_size, data, target_bpw, max_size)
        saved = save_merged(self, save_request)
        if push_to_hub:
            request = UploadRequest(folder.resolve().name, token=token, tags=tuple(tags or ()))
            upload_merged(self, folder, saved, save_method, request)
        return folder

    def push_to_hub_merged(
        self,
        repo_id: str,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        use_temp_dir: bool | None = None,
        commit_message: str = "Trained with fastllm",
        private: bool | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
        tags: Sequence[str] | None = None,
        temporary_location: str | os.PathLike[str] | None = None,
        calibration_dataset: Any = None,
        num_calibration_samples: int = 512,
        max_seq_length: int = 512,
        target_bpw: float | None = None,
        max_size: int | str | None = None,
        **options: Any,
    ) -> str:
        """Save as `save_pretrained_merged` does and upload the folder in one commit. Returns the commit's address.

        The repository is as it was until that commit, and complete after it. If the upload fails, the saved folder
        stays, and the error's notice says where.

        Args:
            use_temp_dir: False keeps the folder, called like the repository, in the working directory.
            temporary_location: where the temporary folder is made; the system's place for them where left out.
            private, create_pr, revision, commit_message, commit_description: as in `huggingface_hub`. `token` is
                used for the upload and nowhere else.
            tags: for the model card, which is written where the repository has none.
        """
        from .calibration import calibration_data
        from .hub_upload import UploadRequest, push_merged
        from .merging import SaveRequest
        from .save_options import settle_save_options

        settle_save_options("push_to_hub_merged", options)
        upload = UploadRequest(
            repo_id, token=token, private=private, commit_message=commit_message,
            commit_description=commit_description, revision=revision, create_pr=create_pr, tags=tuple(tags or ()),
        )  # fmt: skip
        folder = None if use_temp_dir in (None, True) else Path(repo_id.rsplit("/", 1)[-1])
        data = calibration_data(calibration_dataset, num_calibration_samples, max_seq_length)
        request = SaveRequest(folder or Path(), tokenizer, save_method, max_shard_size, data, target_bpw, max_size)
        return push_merged(self, request, upload, folder=folder, temporary_location=temporary_location)

    def save_pretrained_gguf(
        self,
        save_directory: str | os.PathLike[str],
        tokenizer: Any = None,
        quantization_method: Any = "fast_quantized",
        first_conversion: str | None = None,
        push_to_hub: bool = False,
        token: str | bool | None = None,
        private: bool | None = None,
        is_main_process: bool = True,
        tags: Sequence[str] | None = None,
        save_method: str | None = None,
        mmproj_type: str = "f16",
        imatrix_file: str | os.PathLike[str] | None = None,
        calibration_dataset: Any = None,
        num_calibration_samples: int = 512,
        max_seq_length: int = 512,
        target_bpw: float | None = None,
        max_size: int | str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Save the model with its active adapters merged as GGUF files for llama.cpp, Ollama and LM Studio.

            model.save_pretrained_gguf("assistant", tokenizer, quantization_method=["q4_k_m", "q8_0"])

        writes `assistant_gguf/<base model>.Q4_K_M.gguf`, the same with `.Q8_0`, and a `Modelfile`. Tensors go from the
        base checkpoint's files (the loaded weights where those are not at hand) straight into the files, merged in fp32
        and quantized in one pass. Of a vision-language model (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Gemma 3), the vision
        tower and its projector become `mmproj-<base model>-F16.gguf` beside them:

            llama-server -m assistant_gguf/<base model>.Q4_K_M.gguf --mmproj assistant_gguf/mmproj-<base model>-F16.gguf

        Args:
            tokenizer: the tokenizer or processor; the one of `from_pretrained` where left out.
            quantization_method: one or a list of f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m,
                q4_k_s, q4_1, q4_0, iq4_nl, iq4_xs, q3_k_l, q3_k_m, q3_k_s, q2_k, not_quantized (f16 or bf16, as the
                model), fast_quantized (q8_0), quantized (q4_k_m); `dynamic_` before one of them gives each tensor the
                type that its measured sensitivity asks for, in a file of the same size; or a recipe file of such a run.
            mmproj_type: f16, bf16, f32 or q8_0, of the mmproj file. `quantization_method` and the sizes below are about
                the language model.
            save_method: "lora" writes the adapter alone, `<base model>-lora-f16.gguf`; it can't hold changes of a
                vision tower.
            imatrix_file: an importance matrix of llama.cpp's.
            calibration_dataset: rows that tell what matters: texts, or chats in any known format. Needed for dynamic
                quantization; an importance matrix for the static one. `num_calibration_samples` rows are run in
                chunks of `max_seq_length` tokens.
            target_bpw, max_size: bits per weight, or bytes (a number, or a text such as "5GB") of the dynamic file.
            push_to_hub, token, private, tags: also upload the files, to the repository called like the folder.
            is_main_process: False does nothing, for the other processes of a distributed run.
            **options: Unsloth's further arguments are accepted, and told where they have no effect.

        Returns: `gguf_files`, `gguf_directory`, `modelfile_location` and the rest of Unsloth's table.
        Raises: as `fastllm.models.gguf_saving.save_gguf`.
        """
        from .calibration import calibration_data
        from .gguf_saving import GgufRequest, save_gguf
        from .save_options import settle_save_options

        settle_save_options("save_pretrained_gguf", {**options, "first_conversion": first_conversion})
        folder = Path(f"{os.fspath(save_directory).rstrip('/')}_gguf")
        if not is_main_process:
            return {}
        data = calibration_data(calibration_dataset, num_calibration_samples, max_seq_length)
        request = GgufRequest(
            folder, tokenizer, quantization_method, mmproj_type, save_method, imatrix_file, data, target_bpw, max_size
        )
        written = {**save_gguf(self, request), "save_directory": os.fspath(save_directory)}
        if push_to_hub:
            from .hub_upload import UploadRequest, upload_gguf

            name = Path(save_directory).resolve().name
            upload_gguf(self, written, UploadRequest(name, token=token, private=private, tags=tuple(tags or ())))
        return written

    def push_to_hub_gguf(
        self,
        repo_id: str,
        tokenizer: Any = None,
        quantization_method: Any = "fast_quantized",
        first_conversion: str | None = None,
        commit_message: str = "Trained with fastllm",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
        tags: Sequence[str] | None = None,
        temporary_location: str | os.PathLike[str] | None = None,
        save_method: str | None = None,
        mmproj_type: str = "f16",
        imatrix_file: str | os.PathLike[str] | None = None,
        calibration_dataset: Any = None,
        num_calibration_samples: int = 512,
        max_seq_length: int = 512,
        target_bpw: float | None = None,
        max_size: int | str | None = None,
        **options: Any,
    ) -> str:
        """Save as `save_pretrained_gguf` does and upload the files in one commit. Returns the repository's id.

        Arguments are those of `save_pretrained_gguf` and `push_to_hub_merged`.
        """
        from .calibration import calibration_data
        from .gguf_saving import GgufRequest
        from .hub_upload import UploadRequest, push_gguf
        from .save_options import settle_save_options

        settle_save_options("push_to_hub_gguf", {**options, "first_conversion": first_conversion})
        data = calibration_data(calibration_dataset, num_calibration_samples, max_seq_length)
        upload = UploadRequest(
            repo_id, token=token, private=private, commit_message=commit_message,
            commit_description=commit_description, revision=revision, create_pr=create_pr, tags=tuple(tags or ()),
        )  # fmt: skip
        request = GgufRequest(
            Path(), tokenizer, quantization_method, mmproj_type, save_method, imatrix_file, data, target_bpw, max_size
        )
        return push_gguf(self, request, upload, temporary_location=temporary_location)

    def export_plan(
        self,
        format: str = "gguf",
        tokenizer: Any = None,
        quantization_method: Any = "fast_quantized",
        mmproj_type: str = "f16",
    ) -> ExportPlan:
        """What an export would write, known before any training: `print(model.export_plan("gguf").describe())`.

        Raises `UnsupportedError` or `TokenizerError` with the reason why the model can't be exported.
        """
        from .._errors import ArgumentError, nearest
        from .gguf_saving import plan_gguf

        if format != "gguf":
            hint = nearest(format, ["gguf"])
            raise ArgumentError(
                f"no plan for {format!r} {hint}".rstrip(), where="export_plan", fix='model.export_plan("gguf")'
            )
        return plan_gguf(self, tokenizer, quantization_method, mmproj_type)
