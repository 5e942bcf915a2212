"""The steps of a case as `trl.SFTTrainer` takes them, unmodified and with the same settings for every library."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from .cases import CHECKPOINTING, Case
from .profiling import profiled
from .training import Trained


def train_with_trainer(
    case: Case, peer: str, way: str, model: Any, processing_class: Any, wait: Callable[[], None]
) -> Trained:
    """Train a case with SFTTrainer. `wait` returns when the GPU has nothing left to do.

    A step is timed from its first forward to the end of the optimizer's step; the loss is logged after each.
    """
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stopwatch(TrainerCallback):
        """Seconds of each step, or the profile of one."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.profiled_step = -1
            self.profile: dict[str, Any] = {}
            self.recording = ExitStack()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait()
            if state.global_step == self.profiled_step:
                self.recording.enter_context(profiled(self.profile))
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait()
            self.times.append(time.perf_counter() - self.started)
            self.recording.close()

    stopwatch = Stopwatch()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model, processing_class=processing_class, train_dataset=rows(case, vocabulary),
            callbacks=[stopwatch],
            args=SFTConfig(
                output_dir=folder, max_steps=case.warmup + case.steps, per_device_train_batch_size=case.batch,
                gradient_accumulation_steps=case.accumulate, max_length=case.sequence, optim="adamw_8bit",
                learning_rate=2e-4, weight_decay=0.01, lr_scheduler_type="constant", bf16=True, logging_steps=1,
                packing=bool(case.document), save_strategy="no", report_to="none", disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                **_checkpointing(peer, way),
            ),
        )  # fmt: skip
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]

    def profile() -> dict[str, Any]:
        trainer.args.max_steps, stopwatch.profiled_step = 2, 1
        try:
            trainer.train()
        except RuntimeError as error:
            return {"error": str(error).splitlines()[0]}
        return stopwatch.profile

    return Trained(
        times=list(stopwatch.times), losses=[entry["loss"] for entry in logs],
        first_gradient_norm=float(logs[0]["grad_norm"]),
        tokens=case.batch * case.accumulate * statistics.mean(lengths), profile=profile,
    )  # fmt: skip


def rows(case: Case, vocabulary: int) -> Any:
    """A data set of random tokens, tokenized already: a row for each sample of each step, or enough documents, of half
    to one and a half times their mean length, to be packed into that many."""
    import torch
    from datasets import Dataset

    count = (case.warmup + case.steps) * case.batch * case.accumulate
    generator = torch.Generator().manual_seed(1)
    lengths = [case.sequence] * count
    if case.document:
        half, documents = case.document // 2, (count + 1) * case.sequence // case.document
        lengths = torch.randint(half, 3 * half + 1, (documents,), generator=generator).tolist()
    ids = [torch.randint(8, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _checkpointing(peer: str, way: str) -> dict[str, Any]:
    """What a way of holding activations is to a trainer. Libraries with a setting of their own have it in the model."""
    value = CHECKPOINTING[peer][way]
    if isinstance(value, str):
        return {}
    return {"gradient_checkpointing": value, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
