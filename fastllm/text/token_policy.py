"""Which tokens open, end and fill rows: one policy for loading, data and generation.

BOS comes from exactly one place, every token that ends a turn stops generation and is trained, and the token that fills
a batch is none of them: a model trained with PAD = EOS never learns to stop where trainers mask PAD by its id.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .._errors import DataError, TokenizerError
from .._notices import notice, warn
from .encoding import IGNORED, EncodedRow, RowEncoder
from .rendering import ChatRenderer, adds_bos, tokenizer_of
from .response_spans import ResponseFinder

ADDED_PAD = "<|pad|>"
OWN = "the tokenizer's own"
# tokens that vocabularies set aside, best first
_SPARE_TOKENS = (
    r"<\|finetune_right_pad_id\|>",
    r"<pad>|\[PAD\]|<\|pad\|>|<\|endofpad\|>",
    r"<\|vision_pad\|>|<\|fim_pad\|>|<fim_pad>",  # of text models; image and video pads stand for pixels
    r"<\|reserved_(special_)?token_\d+\|>|<\|reserved_\d+\|>|<unused_?\d+>|\[control_\d+\]|<SPECIAL_\d+>"
    r"|<extra_id_\d+>|<\|extra_\d+\|>|\[PAD\d+\]|<\|dummy_\d+\|>|<\|placeholder\d*\|>",
    r"<\|endoftext\|>",
    r"<unk>|\[UNK\]|<\|unk\|>",
)


@dataclass(frozen=True)
class TokenPolicy:
    """The tokens of one tokenizer and its chat template.

    `bos_from` is `"template"`, `"tokenizer"` (which puts it before plain text only) or `"nowhere"`. `stop_ids` end a
    text: EOS, what the generation config names, and the end of turn of the template. `pad_origin` says where PAD comes
    from, and why where it was replaced. `problems` says what is wrong.
    """

    bos_id: int | None
    bos_token: str | None
    bos_from: str
    stop_ids: tuple[int, ...]
    stop_tokens: tuple[str, ...]
    pad_id: int | None
    pad_token: str | None
    pad_origin: str
    problems: tuple[str, ...]

    def __str__(self) -> str:
        source = "not added" if self.bos_from == "nowhere" else f"from the {self.bos_from}"
        bos = "none" if self.bos_token is None else f"{self.bos_token!r} ({source})"
        pad = "none" if self.pad_token is None else f"{self.pad_token!r} ({self.pad_origin})"
        facts = [f"bos {bos}", f"stops at {', '.join(map(repr, self.stop_tokens))}", f"pad {pad}"]
        return "tokens: " + "; ".join(facts + [f"problem: {problem}" for problem in self.problems])


def token_policy(tokenizer: Any, generation_config: Any = None, *, mend: bool = True) -> TokenPolicy:
    """The policy of `tokenizer`, read from it, its template and `generation_config`.

    With `mend`, a PAD token that is missing or stops generation is replaced by an unused token of the vocabulary, which
    is told. Errors: `TokenizerError` where there is no EOS token, or no token to pad with.
    """
    policy = settled_policy(tokenizer, generation_config, mend=mend)
    if policy.pad_token is not None and policy.pad_origin != OWN:
        notice(f"fastllm: {policy.pad_token!r} pads batches from now on: {policy.pad_origin}")
    for problem in policy.problems:
        warn(problem)
    return policy


def settled_policy(tokenizer: Any, generation_config: Any = None, *, mend: bool, may_add: bool = False) -> TokenPolicy:
    """`token_policy` without a word. With `may_add`, a vocabulary that has no token to pad with gets a new one, for
    which the caller makes room in the model."""
    core = tokenizer_of(tokenizer)
    problems: list[str] = []
    finder = _finder(tokenizer, problems)
    stops = _stop_ids(core, generation_config, finder)
    pad_origin = OWN
    if core.pad_token_id is None or core.pad_token_id in stops:
        reason = "there was none" if core.pad_token_id is None else f"{core.pad_token!r} ends answers"
        if mend:
            pad_origin = f"{_give_pad(core, stops, may_add)}, since {reason}"
        else:
            problems.append(
                "there is no PAD token" if core.pad_token_id is None else f"PAD {reason}, so is not trained"
            )
    bos_from = _bos_source(core, finder, problems)
    if finder is not None:
        _check_turn_ends(tokenizer, stops, problems)
    names = tuple(core.convert_ids_to_tokens(list(stops)))
    return TokenPolicy(
        bos_id=core.bos_token_id, bos_token=core.bos_token, bos_from=bos_from, stop_ids=stops, stop_tokens=names,
        pad_id=core.pad_token_id, pad_token=core.pad_token, pad_origin=pad_origin, problems=tuple(problems),
    )  # fmt: skip


def _finder(tokenizer: Any, problems: list[str]) -> ResponseFinder | None:
    try:
        return ResponseFinder(ChatRenderer(tokenizer))
    except TokenizerError:
        return None
    except DataError as error:
        problems.append(error.cause)
        return None


def _stop_ids(core: Any, generation_config: Any, finder: ResponseFinder | None) -> tuple[int, ...]:
    configured = getattr(generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    ends = [core.eos_token_id, *configured]
    if ends == [None] * len(ends):
        raise TokenizerError(
            "there is no EOS token: neither the tokenizer nor the model's generation config names one",
            where=core.name_or_path or type(core).__name__,
            fix='set tokenizer.eos_token = "..." and save the tokenizer again',
        )
    for text in (finder.ending.strip(), finder.last_ending.strip()) if finder else ():
        ids = core(text, add_special_tokens=False)["input_ids"] if text else []
        ends += ids if len(ids) == 1 else []
    return tuple(dict.fromkeys(number for number in ends if number is not None))


def _give_pad(core: Any, stops: tuple[int, ...], may_add: bool) -> str:
    """Make an unused token the PAD; says where it comes from."""
    spare = spare_token(core, stops)
    if spare is not None:
        core.pad_token = spare
        return "a spare token of its vocabulary"
    if not may_add:
        raise TokenizerError(
            "no token can pad batches: each one of the vocabulary ends answers or stands in texts",
            where=core.name_or_path or type(core).__name__,
            fix=f'tokenizer.add_special_tokens({{"pad_token": "{ADDED_PAD}"}}); '
            "model.resize_token_embeddings(len(tokenizer))",
        )
    core.add_special_tokens({"pad_token": ADDED_PAD})
    return "added to its vocabulary"


def spare_token(tokenizer: Any, used: Collection[int]) -> str | None:
    """A token of the vocabulary that no text contains: one made for padding, else a reserved one."""
    added = {str(token): number for number, token in sorted(tokenizer.added_tokens_decoder.items())}
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    taken = {tokenizer.bos_token_id, *used}
    free = [token for token, number in {**added, **special}.items() if number not in taken]
    matching = (token for names in _SPARE_TOKENS for token in free if re.fullmatch(names, token, re.IGNORECASE))
    return next(matching, None)


def _bos_source(core: Any, finder: ResponseFinder | None, problems: list[str]) -> str:
    bos = core.bos_token
    adds = adds_bos(core)
    if finder is None or bos is None:
        return "tokenizer" if adds else "nowhere"
    text = finder.renderer.render([{"role": "user", "content": "a"}])
    if text.startswith(bos + bos):
        problems.append(f"the chat template writes {bos!r} twice")
    if text.startswith(bos):
        return "template"
    if adds:
        problems.append(f"the tokenizer puts {bos!r} before plain text, the chat template not before a conversation")
    return "nowhere"


def _check_turn_ends(tokenizer: Any, stops: tuple[int, ...], problems: list[str]) -> None:
    """The last trained token of each turn must be one that stops generation."""
    turn = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    try:
        row = RowEncoder(tokenizer).encode([{"messages": [*turn, *turn]}])[0]
    except TokenizerError as error:
        row = error
    if not isinstance(row, EncodedRow):
        problems.append(row.cause)
        return
    labels = [*row.labels, IGNORED]
    ends = [one for one, after in pairwise(labels) if one != IGNORED and after == IGNORED]
    if not ends or any(end not in stops for end in ends):
        last = tokenizer_of(tokenizer).convert_ids_to_tokens(ends)
        problems.append(
            f"an answer ends with {last[-1] if last else 'nothing'!r}, which does not stop generation: the model will "
            "not learn to stop"
        )
