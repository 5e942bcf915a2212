"""Loading a tokenizer, and settling its special tokens with the model it belongs to."""

from __future__ import annotations

from typing import Any

from .._errors import TokenizerError
from .._notices import notice
from ..text.token_policy import TokenPolicy, settled_policy


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
    """Settle the token policy of `tokenizer` and `model`, write it to both, and tell it.

    With `repair`, a missing padding token, or one that also ends answers, is replaced by a spare token of the
    vocabulary, or by a new one where there is none. Generation stops at every token that ends a turn.

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
    policy = settled_policy(tokenizer, model.generation_config, mend=repair, may_add=True)
    if policy.pad_id is not None:
        _make_room(model, policy.pad_id + 1)
        model.config.get_text_config().pad_token_id = policy.pad_id
        if model.generation_config is not None:
            model.generation_config.pad_token_id = policy.pad_id
    _stop_at(model, policy.stop_ids)
    notice(f"fastllm {policy}")
    return policy


def _make_room(model: Any, tokens: int) -> None:
    """Grow the embedding only where the vocabulary's padding has no row left."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        model.resize_token_embeddings(tokens, pad_to_multiple_of=64)
        grown = model.get_input_embeddings().weight.shape[0]
        notice(f"fastllm: the embedding grew from {rows} to {grown} rows for the padding token")


def _stop_at(model: Any, stop_ids: tuple[int, ...]) -> None:
    """Name every stop token in the generation config: a template may end turns with one that the base did not know."""
    config = model.generation_config
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    if not set(stop_ids) <= set(known):
        config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
