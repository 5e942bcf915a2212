"""The methods that a model loaded by fastllm has beside those of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .patch import FastReport

# Attribute of the model and of each decoder layer that leads to the model's ActivationPlanner.
PLANNER = "_fastllm_planner"
TOKENIZER = "_fastllm_tokenizer"


class ModelMethods:
    """Mixed into the class of a loaded model. Also reached through a `PeftModel`, which passes unknown names on."""

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

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' generate, in evaluation mode whatever the present mode; also takes a tokenizer's output as
        its one argument."""
        if isinstance(inputs, Mapping):
            kwargs, inputs = {**inputs, **kwargs}, None
        was_training = self.training  # pyright: ignore[reportAttributeAccessIssue]
        self.eval()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return super().generate(inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self.train(was_training)  # pyright: ignore[reportAttributeAccessIssue]

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
        **options: Any,
    ) -> Path:
        """Save the model with its active adapters merged, ready for plain transformers and vLLM. Returns the folder.

        Each tensor without an adapter is the base checkpoint's, byte for byte; each one with an adapter is merged in
        fp32 and rounded once to the checkpoint's dtype. Where the base is not at hand in 16 bits, the loaded weights
        are merged, and the call says so. Everything is read back, checked, and run against the model in memory before
        it is put in place.

        Args:
            tokenizer: the one of `from_pretrained` where left out.
            save_method: "merged_16bit", "merged_4bit" (bitsandbytes NF4; less exact) or "lora" (a PEFT folder).
            push_to_hub, token, tags: also upload it, to the repository called like the folder; see
                `push_to_hub_merged`.
            is_main_process: False does nothing, for the other processes of a distributed run.
            max_shard_size: bytes or "5GB"; None keeps the base checkpoint's files.
            **options: Unsloth's further arguments are accepted, and told where they have no effect.

        Raises:
            ArgumentError: an unknown argument or method; a folder that holds the base checkpoint or an adapter.
            UnsupportedError: a quantization format that is not served, an adapter that can't be merged.
            ModelError: what was read back differs from the trained model.
            SaveError: the disk is too small, or the folder can't be written.
        """
        from .hub_upload import UploadRequest, upload
        from .merging import SaveRequest, save_merged
        from .save_options import settle_save_options

        settle_save_options("save_pretrained_merged", options)
        folder = Path(save_directory)
        if not is_main_process:
            return folder
        saved = save_merged(self, SaveRequest(folder, tokenizer, save_method, max_shard_size))
        if push_to_hub:
            request = UploadRequest(folder.resolve().name, token=token, tags=tuple(tags or ()))
            upload(self, folder, saved, save_method, request)
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
        from .hub_upload import UploadRequest, push_merged
        from .merging import SaveRequest
        from .save_options import settle_save_options

        settle_save_options("push_to_hub_merged", options)
        upload = UploadRequest(
            repo_id, token=token, private=private, commit_message=commit_message,
            commit_description=commit_description, revision=revision, create_pr=create_pr, tags=tuple(tags or ()),
        )  # fmt: skip
        folder = None if use_temp_dir in (None, True) else Path(repo_id.rsplit("/", 1)[-1])
        request = SaveRequest(folder or Path(), tokenizer, save_method, max_shard_size)
        return push_merged(self, request, upload, folder=folder, temporary_location=temporary_location)
