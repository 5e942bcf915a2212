"""Loading a tokenizer, and one policy for its special tokens, settled once and told.

A padding token must never be one that ends an answer: masked as padding, the end would not be trained, and the model
would not stop. The policy picks a token that exists and is otherwise unused before it adds one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .._errors import TokenizerError
from .._notices import notice

_ADDED_PAD = "<|pad|>"
# Tokens that vocabularies set aside, best first.
_SPARE_TOKENS = (
    r"<\|finetune_right_pad_id\|>",
    r"<pad>|\[PAD\]|<\|pad\|>|<\|PAD\|>|<\|endofpad\|>",
    r"<\|.*pad.*\|>",
    r"<\|reserved_special_token_\d+\|>|<unused\d+>|\[control_\d+\]|<SPECIAL_\d+>|<extra_id_\d+>",
    r"<\|endoftext\|>",
    r"<unk>|\[UNK\]|<\|unk\|>",
)


@dataclass(frozen=True)
class TokenPolicy:
    """Special tokens of a tokenizer and model as training and generation use them."""

    bos: str | None
    adds_bos: bool
    stop_tokens: tuple[str, ...]
    pad: str | None
    pad_origin: str

    def __str__(self) -> str:
        bos = (
            "none"
            if self.bos is None
            else f"{self.bos!r} ({'added' if self.adds_bos else 'not added'} by the tokenizer)"
        )
        stops = ", ".join(repr(token) for token in self.stop_tokens)
        return f"tokens: bos {bos}; stops at {stops}; pad {self.pad!r} ({self.pad_origin})"


def load_tokenizer(name: str, *, max_length: int | None, **options: Any) -> Any:
    """`AutoTokenizer` of a folder or repository, with `max_length` as its `model_max_length`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"no tokenizer could be loaded ({error})".splitlines()[0],
            where=name,
            fix="save one there with tokenizer.save_pretrained, or name another with tokenizer_name=...",
        ) from error
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer


def settle_tokens(tokenizer: Any, model: Any, *, repair: bool) -> TokenPolicy:
    """Choose a padding token where there is none or it also ends answers, and write the choice to tokenizer and model.

    Raises:
        TokenizerError: the tokenizer has ids that the embedding has no row for, or no end-of-text token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise TokenizerError(
            f"its largest id is {largest}, but the model's embedding has {rows} rows",
            where=type(tokenizer).__name__,
            fix=f"load with resize_model_vocab={largest + 1}, or use the tokenizer that belongs to the model",
        )
    stops = _stop_ids(tokenizer, model)
    if not stops:
        raise TokenizerError(
            "neither the tokenizer nor the model's generation config names an end-of-text token",
            where=type(tokenizer).__name__,
            fix='set tokenizer.eos_token = "..." and save the tokenizer again',
        )
    origin = "the tokenizer's own"
    if repair and (tokenizer.pad_token_id is None or tokenizer.pad_token_id in stops):
        had = tokenizer.pad_token
        tokenizer.pad_token, origin = _spare_token(tokenizer, stops)
        origin += f", since {had!r} ends answers" if had is not None else ", since there was none"
        if origin.startswith("added"):
            _make_room(model, len(tokenizer))
    if tokenizer.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if model.generation_config is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    policy = TokenPolicy(
        bos=tokenizer.bos_token,
        adds_bos=_adds_bos(tokenizer),
        stop_tokens=tuple(tokenizer.convert_ids_to_tokens(sorted(stops))),
        pad=tokenizer.pad_token,
        pad_origin=origin,
    )
    notice(f"fastllm {policy}")
    return policy


def _stop_ids(tokenizer: Any, model: Any) -> set[int]:
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is not None:
        stops.update(configured if isinstance(configured, (list, tuple)) else [configured])
    return stops


def _spare_token(tokenizer: Any, stops: set[int]) -> tuple[str, str]:
    """(token, where it comes from): an unused token of the vocabulary, else a new one."""
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    special = {**dict.fromkeys(tokenizer.all_special_tokens), **added}
    taken = stops | {tokenizer.bos_token_id}
    for pattern in _SPARE_TOKENS:
        for token in special:
            if re.fullmatch(pattern, token, re.IGNORECASE) and tokenizer.convert_tokens_to_ids(token) not in taken:
                return token, "a spare token of its vocabulary"
    tokenizer.add_special_tokens({"additional_special_tokens": [_ADDED_PAD]}, replace_extra_special_tokens=False)
    return _ADDED_PAD, "added to its vocabulary"


def _make_room(model: Any, tokens: int) -> None:
    """Grow the embedding only where the vocabulary's padding has no row left."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        model.resize_token_embeddings(tokens, pad_to_multiple_of=64)
        grown = model.get_input_embeddings().weight.shape[0]
        notice(f"fastllm: the embedding grew from {rows} to {grown} rows for the padding token")


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
