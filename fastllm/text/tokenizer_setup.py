"""Giving a tokenizer one of the chat templates, and its end-of-turn token a place in the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import ArgumentError, TokenizerError, nearest
from .._notices import notice, warn
from .ollama import modelfile
from .rendering import tokenizer_of
from .templates import CHAT_TEMPLATES, SHIPPED, SYSTEM_MESSAGE, TOKENIZERS_EOS, with_system_message

DEFAULT_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


class UnknownTemplateError(ArgumentError, KeyError):
    """A name that no chat template has."""

    __str__ = Exception.__str__


def get_chat_template(
    tokenizer: Any,
    chat_template: str | Sequence[str] = "chatml",
    mapping: Mapping[str, str] = DEFAULT_MAPPING,
    map_eos_token: bool = True,
    system_message: str | None = None,
    patch_saving: bool = True,
    use_zoo_tokenizer_patch: bool | None = None,
) -> Any:
    """Give `tokenizer` (or the tokenizer in a processor) a chat template, and return it.

    `chat_template` is a name of `CHAT_TEMPLATES` or `(jinja, stop_word)`; the stop word `"eos_token"` stands for the
    tokenizer's own EOS. `mapping` names the keys and roles of your data, for instance `{"role": "from", "content":
    "value", "user": "human", "assistant": "gpt"}`; data with the usual names keeps working. `system_message` replaces
    the template's default one.

    With `map_eos_token`, templates made for it turn their stop word into the EOS: one that is a token already becomes
    the EOS as it is; otherwise the EOS is renamed in place (`</s>` to `<|im_end|>`), so the vocabulary keeps its size.
    The tokenizer then saves and loads with its template as usual; `patch_saving` and `use_zoo_tokenizer_patch` are
    accepted and have nothing to do. `tokenizer._ollama_modelfile` holds the Modelfile of the template.

        tokenizer = get_chat_template(tokenizer, "llama-3.1")

    Errors: `UnknownTemplateError` (a `KeyError`), `ArgumentError` (a `TypeError`, `ValueError`) for a template of
    another type and for a `{system_message}` that is not given, `TokenizerError` for a tokenizer without a fast backend
    whose EOS would have to be renamed.
    """
    del patch_saving, use_zoo_tokenizer_patch
    core = tokenizer_of(tokenizer)
    jinja, stop_word, maps_eos, renames = _chosen(core, chat_template)
    jinja, message = _with_message(jinja, chat_template, system_message)
    jinja = _with_mapping(jinja, mapping)
    _rename_tokens(core, renames)
    if stop_word != TOKENIZERS_EOS and maps_eos and map_eos_token:
        _make_eos(core, stop_word)
    elif stop_word != TOKENIZERS_EOS:
        _check_stop_word(core, stop_word)
    core.chat_template = jinja
    if tokenizer is not core:
        tokenizer.chat_template = jinja
    core._system_message = message
    core._ollama_modelfile = modelfile(
        jinja, stop_word, eos_token=core.eos_token or "", bos_token=core.bos_token or "", system_message=message
    )
    tokenizer._ollama_modelfile = core._ollama_modelfile
    return tokenizer


def _chosen(core: Any, chat_template: str | Sequence[str]) -> tuple[str, str, bool, Mapping[str, str]]:
    """Template, stop word, whether it may become the EOS, and tokens to rename."""
    if isinstance(chat_template, (list, tuple)):
        if len(chat_template) != 2 or not all(isinstance(part, str) for part in chat_template):
            raise ArgumentError("expected (jinja, stop_word), two strings", where="chat_template")
        return chat_template[0], chat_template[1], True, {}
    if not isinstance(chat_template, str):
        raise ArgumentError(
            f"chat_template is {type(chat_template).__name__}", where="get_chat_template",
            fix='pass a name such as "chatml", or (jinja, stop_word)',
        )  # fmt: skip
    name = chat_template
    if name not in CHAT_TEMPLATES:
        raise UnknownTemplateError(
            f"no chat template is called {name!r} {nearest(name, CHAT_TEMPLATES)}".rstrip(),
            where="chat_template", fix=f"one of {', '.join(CHAT_TEMPLATES)}",
        )  # fmt: skip
    if name == "chatml" and {"<start_of_turn>", "<eos>"} <= set(core.get_vocab()):
        notice("fastllm: a Gemma tokenizer takes 'chatml' as 'gemma_chatml', with its own turn tokens renamed")
        name = "gemma_chatml"
    jinja, stop_word, maps_eos, _ = CHAT_TEMPLATES[name]
    return jinja, stop_word, maps_eos, SHIPPED[name].renames if name in SHIPPED else {}


def _with_message(jinja: str, name: str | Sequence[str], message: str | None) -> tuple[str, str | None]:
    """The template with its system message, and that message."""
    if SYSTEM_MESSAGE not in jinja:
        if message is not None:
            warn(f"this chat template has no default system message, so system_message is not used: {message[:60]!r}")
        return jinja, None
    if message is None:
        if not isinstance(name, str):
            raise ArgumentError(
                f"the template has {SYSTEM_MESSAGE} and no system message was given", where="system_message",
                fix='get_chat_template(tokenizer, (jinja, stop_word), system_message="...")',
            )  # fmt: skip
        shipped = SHIPPED.get(name)
        message = (shipped.system_message if shipped else None) or ""
    return with_system_message(jinja, message), message


def _with_mapping(jinja: str, mapping: Mapping[str, str]) -> str:
    """The template led by a few lines that bring messages with the names of `mapping` to the usual ones."""
    missing = set(DEFAULT_MAPPING) - set(mapping)
    if missing:
        raise ArgumentError(f"mapping lacks {sorted(missing)}", where="mapping", fix=f"mapping={DEFAULT_MAPPING}")
    if dict(mapping) == DEFAULT_MAPPING:
        return jinja
    role, content = json.dumps(mapping["role"]), json.dumps(mapping["content"])
    roles = json.dumps({mapping["user"]: "user", mapping["assistant"]: "assistant"})
    return (
        "{%- set mapped = namespace(messages=[]) %}\n"
        "{%- for message in messages %}\n"
        f"    {{%- set role = message[{role}] if {role} in message else message['role'] %}}\n"
        f"    {{%- set content = message[{content}] if {content} in message else message['content'] %}}\n"
        f"    {{%- set renamed = dict(message, role={roles}.get(role, role), content=content) %}}\n"
        "    {%- set mapped.messages = mapped.messages + [renamed] %}\n"
        "{%- endfor %}\n"
        "{%- set messages = mapped.messages %}\n"
    ) + jinja


def _make_eos(core: Any, stop_word: str) -> None:
    if core.eos_token == stop_word:
        return
    if stop_word not in core.get_vocab():
        if core.eos_token is None:
            raise TokenizerError(
                f"the tokenizer has no EOS token that {stop_word!r} could take the place of",
                where=core.name_or_path, fix="tokenizer.eos_token = ...",
            )  # fmt: skip
        notice(f"fastllm: the token {core.eos_token!r} is called {stop_word!r} from now on; it ends turns")
        _rename_tokens(core, {core.eos_token: stop_word})
    else:
        notice(f"fastllm: the EOS token is {stop_word!r} instead of {core.eos_token!r}; it ends turns")
    core.eos_token = stop_word


def _check_stop_word(core: Any, stop_word: str) -> None:
    if stop_word in core.get_vocab():
        return
    pieces = core.tokenize(stop_word)
    warn(
        f"the end of turn {stop_word!r} is no token of this vocabulary but {len(pieces)} of them; the model learns it "
        'as text. get_chat_template(tokenizer, "chatml") ends turns with a single token'
    )


def _rename_tokens(core: Any, names: Mapping[str, str]) -> None:
    """Rename tokens of the vocabulary in place. Ids, and with them the embedding rows, stay."""
    names = {old: new for old, new in names.items() if old in core.get_vocab()}
    if not names:
        return
    backend = getattr(core, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"tokens of {type(core).__name__} can't be renamed", where=core.name_or_path,
            fix="load the fast tokenizer, or pass map_eos_token=False",
        )  # fmt: skip
    special = {key: names[value] for key, value in core.special_tokens_map.items() if value in names}
    core._tokenizer = type(backend).from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
    for key, value in special.items():
        setattr(core, key, value)


def _renamed(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The state of a `tokenizers.Tokenizer` with some tokens renamed."""
    state["added_tokens"] = [
        {**token, "content": names.get(token["content"], token["content"])} for token in state["added_tokens"]
    ]
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if state.get("post_processor"):
        state["post_processor"] = _renamed_processor(state["post_processor"], names)
    return state


def _renamed_processor(part: Any, names: Mapping[str, str]) -> Any:
    if isinstance(part, str):
        return names.get(part, part)
    if isinstance(part, list):
        return [_renamed_processor(item, names) for item in part]
    if isinstance(part, dict):
        return {names.get(key, key): _renamed_processor(item, names) for key, item in part.items()}
    return part
