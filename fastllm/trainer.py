"""Trainer for continued pretraining: `trl.SFTTrainer` with a learning rate of its own for embeddings and head.

Every other training uses TRL's and transformers' trainers as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from ._errors import UnsupportedError
from ._notices import notice
from .models.patch import unwrapped
from .vision_data import UnslothVisionDataCollator, VisionDataCollator


class FastTrainingArguments(SFTConfig):
    """`trl.SFTConfig` with `embedding_learning_rate`, the rate of embeddings and head where they are trained in full.

    A tenth to a half of `learning_rate` is usual: the rows of a vocabulary move far on few examples.
    """

    def __init__(
        self,
        *args: Any,
        embedding_learning_rate: float | None = None,
        q_galore_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if q_galore_config is not None:
            raise UnsupportedError("Q-GaLore is not part of this version", where="q_galore_config", fix="leave it out")
        super().__init__(*args, **kwargs)
        self.embedding_learning_rate = embedding_learning_rate


class FastTrainer(SFTTrainer):
    """`trl.SFTTrainer` that honours `embedding_learning_rate`, under LoRA and in full fine-tuning."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "embedding_learning_rate", None)
        if rate is not None:
            count = _give_own_rate(optimizer, _vocabulary_parameters(self.model), rate)
            notice(
                f"fastllm: {count} embedding and head tensors are trained at {rate:g}"
                if count
                else "fastllm: embedding_learning_rate has no effect: neither the embedding nor the head is trained"
            )
        return optimizer


def _vocabulary_parameters(model: Any) -> set[int]:
    """Ids of the trained weights of embedding and head, adapters on them excepted."""
    base = unwrapped(model)
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    return {
        id(parameter)
        for module in modules
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


def _give_own_rate(optimizer: torch.optim.Optimizer, wanted: set[int], rate: float) -> int:
    """Move the wanted parameters of each group to a group like it at `rate`. Returns how many there are."""
    count = 0
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
            optimizer.add_param_group({**group, "params": moved, "lr": rate})
            count += len(moved)
    return count


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`trainer.train()`: gradient accumulation is right in every present trainer."""
    return trainer.train(*args, **kwargs)


__all__ = [
    "FastTrainer",
    "FastTrainingArguments",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "UnslothVisionDataCollator",
    "VisionDataCollator",
    "unsloth_train",
]

UnslothTrainer = FastTrainer
UnslothTrainingArguments = FastTrainingArguments
