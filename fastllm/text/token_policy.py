"""Which tokens open, end and fill rows.

BOS comes from exactly one place, every token that ends a turn stops generation and is trained, and the token that fills
a batch is none of them: a model trained with PAD = EOS never learns to stop where trainers mask PAD by its id.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .._errors import TokenizerError
from .._notices import notice, warn
from .encoding import IGNORED, EncodedRow, RowEncoder
from .rendering import ChatRenderer, tokenizer_of
from .response_spans import ResponseFinder
from .sandbox import TemplateError

_PAD_NAMES = (
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<fim_pad>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<PAD>",
    "<|PAD|>",
    "<unk>",
)
_RESERVED = (
    "<|reserved_special_token_",
    "<|reserved",
    "<unused",
    "<|extra_",
    "[PAD",
    "<|dummy",
    "<|placeholder",
    "<SPECIAL_",
)


@dataclass(frozen=True)
class TokenPolicy:
    """The tokens of one tokenizer and its chat template.

    `bos_from` is `"template"`, `"tokenizer"` (which puts it before plain text only) or `"nowhere"`. `stop_ids` end a
    text: EOS, what the generation config names, and the end of turn of the template. `problems` says what is wrong.
    """

    bos_id: int | None
    bos_from: str
    stop_ids: tuple[int, ...]
    stop_tokens: tuple[str, ...]
    pad_id: int | None
    pad_token: str | None
    problems: tuple[str, ...]

    def __str__(self) -> str:
        bos = "no BOS" if self.bos_from == "nowhere" else f"BOS from the {self.bos_from}"
        lines = [bos, f"stop: {', '.join(self.stop_tokens)}", f"pad: {self.pad_token}"]
        return "tokens: " + "; ".join(lines + [f"problem: {problem}" for problem in self.problems])


def token_policy(tokenizer: Any, generation_config: Any = None, *, mend: bool = True) -> TokenPolicy:
    """The policy of `tokenizer`, read from it, its template and `generation_config`.

    With `mend`, a PAD token that is missing or stops generation is replaced by an unused token of the vocabulary, which
    is told. Errors: `TokenizerError` where there is no EOS token, or no token to pad with.
    """
    core = tokenizer_of(tokenizer)
    if core.eos_token_id is None:
        raise TokenizerError("there is no EOS token", where=core.name_or_path, fix='tokenizer.eos_token = "..."')
    problems: list[str] = []
    finder = _finder(tokenizer, problems)
    stops = _stop_ids(core, generation_config, finder)
    pad = _pad_id(core, stops, mend, problems)
    bos_from = _bos_source(core, finder, problems)
    if finder is not None:
        _check_turn_ends(tokenizer, stops, problems)
    names = tuple(core.convert_ids_to_tokens(list(stops)))
    pad_token = None if pad is None else core.convert_ids_to_tokens(pad)
    return TokenPolicy(core.bos_token_id, bos_from, stops, names, pad, pad_token, tuple(problems))


def _finder(tokenizer: Any, problems: list[str]) -> ResponseFinder | None:
    try:
        return ResponseFinder(ChatRenderer(tokenizer))
    except TokenizerError:
        return None
    except TemplateError as error:
        problems.append(error.cause)
        return None


def _stop_ids(core: Any, generation_config: Any, finder: ResponseFinder | None) -> tuple[int, ...]:
    configured = getattr(generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    ends = [core.eos_token_id, *configured]
    for text in (finder.ending.strip(), finder.last_ending.strip()) if finder else ():
        ids = core(text, add_special_tokens=False)["input_ids"] if text else []
        ends += ids if len(ids) == 1 else []
    return tuple(dict.fromkeys(number for number in ends if number is not None))


def _pad_id(core: Any, stops: tuple[int, ...], mend: bool, problems: list[str]) -> int | None:
    pad = core.pad_token_id
    if pad is not None and pad not in stops:
        return pad
    reason = "there is no PAD token" if pad is None else f"PAD {core.pad_token!r} also stops generation"
    if not mend:
        problems.append(reason)
        return pad
    spare = spare_token(core, stops)
    if spare is None:
        raise TokenizerError(
            f"{reason}, and the vocabulary has no unused token", where=core.name_or_path,
            fix='tokenizer.add_special_tokens({"pad_token": "<|pad|>"}); model.resize_token_embeddings(len(tokenizer))',
        )  # fmt: skip
    core.pad_token = spare
    notice(f"fastllm: {reason}; {spare!r} pads batches from now on")
    return core.pad_token_id


def spare_token(tokenizer: Any, used: tuple[int, ...]) -> str | None:
    """A token of the vocabulary that no text contains: one made for padding, else a reserved one."""
    added = {str(token): number for number, token in sorted(tokenizer.added_tokens_decoder.items())}
    if tokenizer.unk_token is not None:
        added.setdefault(tokenizer.unk_token, tokenizer.unk_token_id)
    free = [name for name, number in added.items() if number not in {tokenizer.bos_token_id, *used}]
    named = [name for name in _PAD_NAMES if name in free]
    reserved = [name for name in free if name.startswith(_RESERVED)]
    return next(iter(named + reserved), None)


def _bos_source(core: Any, finder: ResponseFinder | None, problems: list[str]) -> str:
    bos = core.bos_token
    adds = bos is not None and core("a")["input_ids"][:1] == [core.bos_token_id]
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
    row = RowEncoder(tokenizer).encode([{"messages": [*turn, *turn]}])[0]
    if not isinstance(row, EncodedRow):
        problems.append(row.cause)
        return
    labels = [*row.labels, IGNORED]
    ends = [one for one, after in pairwise(labels) if one != IGNORED and after == IGNORED]
    if not ends or any(end not in stops for end in ends):
        last = tokenizer_of(tokenizer).convert_ids_to_tokens(ends)
        problems.append(f"an answer ends with {last[-1] if last else 'nothing'!r}, which does not stop generation")
        warn(f"{problems[-1]}: the model will not learn to stop")
