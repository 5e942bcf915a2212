"""The token that opens a text, and the word that ends one."""

from __future__ import annotations

from typing import Any

from .._errors import TokenizerError
from .rendering import adds_bos, tokenizer_of


def remove_special_tokens(tokenizer: Any, prompt: str) -> str:
    """`prompt` without a leading BOS token where the tokenizer adds one itself, so that there is only one."""
    core = tokenizer_of(tokenizer)
    bos = core.bos_token
    if bos and prompt.startswith(bos) and adds_bos(core):
        return prompt.removeprefix(bos)
    return prompt


def create_stopping_criteria(tokenizer: Any, stop_word: str = "eos_token") -> Any:
    """A `StoppingCriteriaList` for `model.generate` that stops a row once it ends with `stop_word`.

    `"eos_token"` stands for the tokenizer's EOS. Errors: `TokenizerError` for a stop word without tokens.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    core = tokenizer_of(tokenizer)
    word = core.eos_token if stop_word == "eos_token" else stop_word
    ids = core(word, add_special_tokens=False)["input_ids"] if word else []
    if not ids:
        raise TokenizerError(f"the stop word {stop_word!r} has no tokens", where="create_stopping_criteria")

    class EndsWith(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            """Rows `[batch, length]` to `[batch]`, True where the row ends with the stop word, in whatever tokens."""
            tails = core.batch_decode(input_ids[:, -2 * len(ids) - 2 :])
            return torch.tensor([tail.endswith(word) for tail in tails], device=input_ids.device)

    return StoppingCriteriaList([EndsWith()])
