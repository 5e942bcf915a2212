"""What a TRL trainer gets when it is given a model of fastllm: checked data, fp32 adapters, and the fused head."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .._errors import ArgumentError, DataError, UnsupportedError
from .._notices import notice
from ..packing import grouped
from ..vision_data import VisionDataCollator
from .blocks import head_reason, token_losses
from .micro_batches import merge_micro_batches
from .model_methods import CHECKPOINTING, PLANNER, ModelMethods
from .patch import unwrapped
from .row_list import PackedRows, is_rows, rows_dataset

_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
# Rows that are looked at for a trained label; a data set whose first rows have none is refused.
_ROWS_CHECKED = 256
# transformers' names of bitsandbytes' AdamW with 8-bit states in GPU memory.
_8BIT_ADAMW = ("adamw_8bit", "adamw_bnb_8bit")


def construct(config: type, original: Callable[..., None], trainer: Any, kwargs: dict[str, Any]) -> None:
    """Run a TRL trainer's own constructor; for a model of fastllm, prepare it before and finish it after."""
    model: Any = kwargs.get("model")
    base: Any = None if model is None or isinstance(model, str) else unwrapped(model)
    if not isinstance(base, ModelMethods):
        original(trainer, **kwargs)
        return
    _check_not_empty(kwargs.get("train_dataset"))
    if kwargs.get("args") is None:
        kwargs["args"] = config()
    _settle_config(kwargs["args"], base)
    collator = kwargs.get("data_collator")
    if isinstance(collator, VisionDataCollator):
        _leave_rows_to(collator, kwargs["args"])
        _pack_rows(collator, kwargs["args"], kwargs)
        for name in ("train_dataset", "eval_dataset"):
            if is_rows(kwargs.get(name)):
                kwargs[name] = rows_dataset(kwargs[name])
    else:
        kwargs["train_dataset"] = _as_dataset(kwargs.get("train_dataset"))
    if kwargs.get("formatting_func") is not None:
        kwargs["formatting_func"] = _per_row(kwargs["formatting_func"], kwargs["train_dataset"])
    assert model is not None and not isinstance(model, str)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    can_serve_head = hasattr(base, PLANNER) and head_reason(base) is None
    with _head_adapter_hidden(base, can_serve_head):
        original(trainer, **kwargs)
    _restore_dtypes(model, dtypes)
    _update_8bit_adamw_in_chunks(trainer)
    if config.__name__ == "SFTConfig":
        _check_labels(trainer)
        if can_serve_head:
            _bind_fused_head(base)
            merge_micro_batches(trainer, base)


def fused_head(trl_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that answers TRL's fused-head contract, `model(..., fused_lm_head=True)`, with fastllm's head.

    TRL's own computes the logits twice, in the forward and in the backward; this one computes them once, and a LoRA
    adapter on the head takes part. `trl_forward` serves whatever the fused head can't.
    """

    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Any = None,
        shift_labels: Any = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        given = {name: value for name, value in given.items() if value is not None}
        if not fused_lm_head:
            return type(self).forward(self, *args, **given, **kwargs)
        if head_reason(self) is not None:
            return trl_forward(*args, fused_lm_head=True, **given, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        inputs = {**dict(zip(_INPUTS, args, strict=False)), **kwargs, "use_cache": False}
        if shift_labels is not None:
            inputs["shift_labels"] = shift_labels
        losses, mask, _ = token_losses(self, labels, statistics=("entropy", "is_top1"), **inputs)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=losses.nll.sum() / count,
            log_probs=-losses.nll,
            entropy=losses.entropy,
            is_top1=losses.is_top1,
            label_mask=mask,
        )

    return forward


def _bind_fused_head(base: Any) -> None:
    bound_by_trl = base.__dict__.get("forward")
    if bound_by_trl is None:
        return
    forward = functools.wraps(type(base).forward)(fused_head(bound_by_trl))
    base.forward = types.MethodType(forward, base)
    # TRL replaced what an earlier trainer had put around the forward, autocast: accelerate shall do so again.
    base.__dict__.pop("_is_accelerate_prepared", None)


@contextmanager
def _head_adapter_hidden(base: Any, can_serve: bool) -> Iterator[None]:
    """TRL refuses an adapter on the head, since its own head would ignore it. Ours trains it, so while the trainer is
    built it sees the layer under the adapter."""
    head = base.get_output_embeddings()
    if not can_serve or getattr(head, "base_layer", None) is None:
        yield
        return
    base.get_output_embeddings = lambda: head.base_layer
    try:
        yield
    finally:
        del base.get_output_embeddings
    notice("fastllm: the LoRA adapter on lm_head is trained through fastllm's fused head")


def _restore_dtypes(model: Any, dtypes: dict[str, Any]) -> None:
    """TRL casts the trainable parameters of a quantized model to bf16. fp32 adapters lose no small update to rounding,
    and fp16 training needs them; 16-bit copies are made where they are multiplied."""
    changed = 0
    for name, parameter in model.named_parameters():
        if name in dtypes and parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])
            changed += 1
    if changed:
        notice(
            f"fastllm: {changed} trainable tensors stay in the dtype get_peft_model gave them (TRL casts them to bf16)"
        )


def _update_8bit_adamw_in_chunks(trainer: Any) -> None:
    """Turn the 8-bit AdamW that this trainer will make into fastllm's. One that the user made stays what it is, and so
    does one of sharded parameters."""
    create = trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        is_given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
        optimizer = create(*args, **kwargs)
        is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        if trainer.args.optim in _8BIT_ADAMW and not is_given and not is_sharded:
            from .optimizers import update_in_chunks

            if update_in_chunks(optimizer):
                notice(
                    "fastllm: 8-bit AdamW updates small tensors together, since bitsandbytes launches for each of them "
                    "and waits: the same bits, and checkpoints of either class serve both",
                    once="trl:8bit_adamw",
                )
        return optimizer

    trainer.create_optimizer = create_optimizer


def _settle_config(args: Any, base: Any) -> None:
    """The length that the model was loaded for, and the model's own checkpointing."""
    given = getattr(args, "_fastllm_given", frozenset())
    loaded = getattr(base, "max_seq_length", None)
    if loaded and hasattr(args, "max_length") and not {"max_length", "max_seq_length"} & set(given):
        if args.max_length != loaded:
            notice(
                f"fastllm: max_length is {loaded:,}, as the model was loaded (the trainer's default: {args.max_length})"
            )
        args.max_length = loaded
    if base.device.type == "cpu" and getattr(args, "fp16", False):
        args.fp16, args.mixed_precision = False, "no"
        notice("fastllm: fp16=True is left out: the model is on a CPU and trains in its own dtype", once="trl:cpu-fp16")
    setting = getattr(base, CHECKPOINTING, None)
    if setting is not None and getattr(args, "gradient_checkpointing", False):
        args.gradient_checkpointing = False
        notice(
            "fastllm: the trainer's gradient_checkpointing=True is left to the model: "
            f"use_gradient_checkpointing={setting!r}",
            once="trl:checkpointing",
        )


def _leave_rows_to(collator: VisionDataCollator, args: Any) -> None:
    """Rows reach a vision collator as they are, so that images are opened when they are needed."""
    args.remove_unused_columns = False
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    if getattr(args, "padding_free", False):
        collator.drop_padding()
        args.padding_free = False  # TRL's own is for its own collator, and refuses images
        notice(
            "fastllm: padding_free=True: the vision collator lays the rows of a batch end to end "
            "(num_tokens in the log of TRL counts one a batch: it does not know their positions)",
            once="trl:padding_free",
        )
    if {"max_length", "max_seq_length"} & set(getattr(args, "_fastllm_given", ())) and args.max_length is not None:
        collator.limit_length(args.max_length)


def _pack_rows(collator: VisionDataCollator, args: Any, data: dict[str, Any]) -> None:
    """`packing=True` of a vision collator: its rows in groups of `max_length` tokens, in `data`'s place."""
    packing = bool(getattr(args, "packing", False))
    eval_packing = getattr(args, "eval_packing", None)
    wanted = {"train_dataset": packing, "eval_dataset": packing if eval_packing is None else bool(eval_packing)}
    for name, is_wanted in wanted.items():
        rows = data.get(name) if is_wanted else None
        if isinstance(rows, dict):
            data[name] = {part: _packed(collator, each, f"{name}[{part!r}]") for part, each in rows.items()}
        elif rows is not None:
            data[name] = _packed(collator, rows, name)
    if any(wanted.values()):
        args.packing = args.eval_packing = False  # TRL's own, which refuses images


def _packed(collator: VisionDataCollator, rows: Any, name: str) -> Any:
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise UnsupportedError(
            "rows are packed before training, and this data set is streamed", where=f"{name}, packing=True",
            fix="padding_free=True, which lays the rows of each batch end to end",
        )  # fmt: skip
    if collator.max_seq_length is None:
        raise ArgumentError("it needs a length", where="packing=True", fix="SFTConfig(max_length=2048, ...)")
    collator.drop_padding()
    counts = {number: collator.count_tokens(rows[number], number) for number in range(len(rows))}
    lengths = {number: count for number, count in counts.items() if count is not None}
    if not lengths:
        raise DataError("no row fits into max_length", where=name, fix="raise max_length, or make the images smaller")
    groups = grouped(lengths, collator.max_seq_length)
    filled = sum(lengths.values()) / (len(groups) * collator.max_seq_length)
    notice(
        f"fastllm: packing=True: {len(lengths):,} rows of {name} make {len(groups):,} of up to "
        f"{collator.max_seq_length:,} tokens, {filled:.0%} full; each row was opened once to know its length"
    )
    return rows_dataset(PackedRows(rows, groups))


def _check_not_empty(dataset: Any) -> None:
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError("it has 0 rows", where="train_dataset", fix="look at the filters that made it")


def _as_dataset(rows: Any) -> Any:
    """A plain list of rows as a `datasets.Dataset`, which is what present TRL takes."""
    if not isinstance(rows, (list, tuple)):
        return rows
    from datasets import Dataset

    notice("fastllm: train_dataset was a list of rows and is now a datasets.Dataset", once="trl:list")
    return Dataset.from_list(list(rows))


def _per_row(formatting_func: Callable[..., Any], dataset: Any) -> Callable[[Any], Any]:
    """A formatting function as TRL calls it, with one row, also if it is of the old kind that takes a batch."""
    first = next(iter(dataset))
    result = formatting_func(first)
    if isinstance(result, str):
        return formatting_func
    batched = formatting_func({name: [value] for name, value in first.items()})
    if not (isinstance(batched, list) and len(batched) == 1):
        raise DataError(
            f"it returned a {type(result).__name__}", where="formatting_func", fix="return one string a row"
        )
    notice("fastllm: formatting_func takes a batch; it is called with one row at a time", once="trl:formatting_func")
    return lambda row: formatting_func({name: [value] for name, value in row.items()})[0]


def _check_labels(trainer: Any) -> None:
    """Refuse a prepared data set in which nothing would be trained."""
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise DataError(
            "no row is left after preparation: each was empty, or had no trained token within max_length",
            where="train_dataset",
            fix="print a row with tokenizer.decode(trainer.train_dataset[0]['input_ids']), or raise max_length",
        )
    columns = getattr(dataset, "column_names", None) or []
    if "labels" not in columns:
        return
    for index in range(min(len(dataset), _ROWS_CHECKED)):
        if any(label != -100 for label in dataset[index]["labels"]):
            return
    raise DataError(
        f"all labels of its first {min(len(dataset), _ROWS_CHECKED)} rows are masked (-100): nothing would be trained",
        where="train_dataset",
        fix="check the chat template and the response markers, or raise max_length if it cuts the answers off",
    )
