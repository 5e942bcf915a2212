"""The `tokenizer.*` keys of a GGUF file, from the folder that a tokenizer was saved to.

Two kinds of tokenizer are known, as llama.cpp knows them:
- byte-level BPE (GPT-2, Llama 3, Qwen, Phi 4): tokens in the byte alphabet, merges, and the name of the text splitter;
- SentencePiece BPE (Llama 2, Mistral, Gemma, Phi 3): tokens with scores. `tokenizer.json` has merges in their place;
  llama.cpp only compares scores, so the rank of a token's first merge says the same.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._errors import TokenizerError
from .container import Value
from .pre_tokenizers import pre_tokenizer_name

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_NEVER_MERGED = -1e6  # below every rank; added tokens are found before merging
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(slots=True)
class _Tokens:
    """The rows of the embedding as tokens: text, type and score of each."""

    texts: list[str]
    types: list[int]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class SavedTokenizer:
    """The files of a tokenizer: `tokenizer.json`, and its configuration with the older special-token map."""

    folder: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> SavedTokenizer:
        """Raises `TokenizerError` where `tokenizer.json` is missing or no JSON."""
        path = Path(folder)
        config = _read_json(path / "special_tokens_map.json", {}) | _read_json(path / "tokenizer_config.json", {})
        return cls(path, _read_json(path / "tokenizer.json"), config)

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        return self.tokenizer.get("added_tokens") or []

    def strips_behind_special(self) -> bool:
        """Whether special tokens swallow the spaces behind them as those of Phi 3 do, which llama.cpp knows of."""
        stripping = any(token.get("special") and token.get("rstrip") for token in self.added_tokens)
        contents = {token.get("content") for token in self.added_tokens}
        return stripping and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= contents


def vocabulary_metadata(saved: SavedTokenizer, num_rows: int, chat_template: str | None = None) -> dict[str, Value]:
    """The keys for a tokenizer and an embedding of `num_rows` rows.

    `chat_template` takes the place of the saved one. Rows without a token are filled with unused ones.
    Raises `TokenizerError` for a tokenizer that llama.cpp can't reproduce or that has more tokens than rows.
    """
    try:
        metadata = _model_metadata(saved.tokenizer, num_rows)
        ids = saved.tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in saved.added_tokens}
        special = _special_ids(saved.config, ids)
        metadata |= {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in special.items()}
        metadata |= _added_ends(saved.tokenizer, saved.config, special)
        return metadata | _template_metadata(saved, chat_template)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"the tokenizer has an unknown form: {error!r}", where=str(saved.folder)) from error


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if not path.is_file():
        if default is not None:
            return default
        raise TokenizerError(
            f"there is no {path.name}",
            where=str(path.parent),
            fix=f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained({str(path.parent)!r})",
        )
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"not JSON: {error}", where=str(path)) from error


def _model_metadata(tokenizer: dict[str, Any], num_rows: int) -> dict[str, Value]:
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(
            f"a {model['type']} tokenizer can't be exported, only byte-level and SentencePiece BPE",
            where="tokenizer.json",
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if _is_byte_level(tokenizer):
        tokens = _tokens(tokenizer, num_rows)
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre_tokenizer_name(tokenizer),
            "tokenizer.ggml.tokens": tokens.texts,
            "tokenizer.ggml.token_type": tokens.types,
            # llama.cpp wants the key even where nothing is merged
            "tokenizer.ggml.merges": merges or [""],
        }
    if not model.get("byte_fallback"):
        raise TokenizerError(
            "neither byte-level nor with byte tokens: not a tokenizer of llama.cpp's", where="tokenizer.json"
        )
    adds_space = _adds_space(tokenizer)
    tokens = _tokens(tokenizer, num_rows, _scores(merges))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens.texts,
        "tokenizer.ggml.scores": tokens.scores,
        "tokenizer.ggml.token_type": tokens.types,
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    return any(part["type"] == "ByteLevel" for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if part)


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before text. Raises for a normalizer that does more than mark spaces."""
    normalizer, pre_tokenizer = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    adds_space = False
    for part in [] if normalizer is None else normalizer.get("normalizers", [normalizer]):
        if part["type"] == "Prepend" and part["prepend"] == _SPACE:
            adds_space = True
        elif not (part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == _SPACE):
            raise TokenizerError(f"llama.cpp has no {part['type']} normalizer", where="tokenizer.json")
    if pre_tokenizer is not None:
        if pre_tokenizer["type"] == "Metaspace":
            adds_space = adds_space or pre_tokenizer.get("prepend_scheme", "always") != "never"
        elif not (pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "}):
            raise TokenizerError(f"llama.cpp has no {pre_tokenizer['type']} pre-tokenizer", where="tokenizer.json")
    return adds_space


def _scores(merges: list[str]) -> dict[str, float]:
    """Minus the rank of the first merge that makes each token."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge.split(" ")), -float(rank))
    return scores


def _tokens(tokenizer: dict[str, Any], num_rows: int, scores: dict[str, float] | None = None) -> _Tokens:
    """One token per row of the embedding; `scores` is given for SentencePiece."""
    vocab, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens") or []
    ids = [*vocab.values(), *(token["id"] for token in added)]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise TokenizerError("a token's id is not a number from 0 on", where="tokenizer.json")
    largest = max(ids)
    if largest >= num_rows:
        raise TokenizerError(
            f"the tokenizer has a token {largest}, the embedding {num_rows} rows",
            where="tokenizer.json",
            fix="model.resize_token_embeddings(len(tokenizer)), and train the new rows",
        )
    tokens = _Tokens([f"[PAD{i}]" for i in range(num_rows)], [_UNUSED] * num_rows, [_NEVER_MERGED] * num_rows)
    unknown = tokenizer["model"].get("unk_token")
    is_sentencepiece = scores is not None
    for text, i in vocab.items():
        tokens.texts[i], tokens.types[i] = text, _NORMAL
        if is_sentencepiece:
            tokens.scores[i] = scores.get(text, _NEVER_MERGED)
            if _is_byte_token(text):
                tokens.types[i] = _BYTE
    for token in added:
        text, i = token["content"], token["id"]
        is_control = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        tokens.types[i] = _CONTROL if is_control else _USER_DEFINED
        # llama.cpp looks for these in the text itself, before spaces are marked
        tokens.texts[i] = text if is_control else text.replace(_SPACE, " ")
        tokens.scores[i] = _NEVER_MERGED
    if is_sentencepiece and unknown in vocab:
        tokens.types[vocab[unknown]] = _UNKNOWN
    return tokens


def _is_byte_token(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _special_ids(config: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    special = {}
    for name, key in _SPECIAL.items():
        token = config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            special[name] = ids[text]
    return special


def _added_ends(tokenizer: dict[str, Any], config: dict[str, Any], special: dict[str, int]) -> dict[str, Value]:
    """Whether encoding puts a BOS before and an EOS behind the text: as the post-processor does, where there is one."""
    post_processor = tokenizer.get("post_processor") or {}
    for part in post_processor.get("processors", [post_processor]):
        if part and part["type"] == "TemplateProcessing":
            places = [next(iter(item.items())) for item in part["single"]]
            ids = {text: entry["ids"][0] for text, entry in part["special_tokens"].items()}
            ends = [ids.get(place["id"]) if kind == "SpecialToken" else None for kind, place in places]
            adds_bos = ends[0] is not None and ends[0] == special.get("bos")
            adds_eos = ends[-1] is not None and ends[-1] == special.get("eos")
            break
    else:
        adds_bos, adds_eos = bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
    return {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}


def _template_metadata(saved: SavedTokenizer, chat_template: str | None) -> dict[str, Value]:
    """The chat template under its key; further named ones, as tool use, under theirs."""
    template = chat_template
    if template is None and (saved.folder / "chat_template.jinja").is_file():
        template = (saved.folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template is None:
        template = saved.config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        metadata: dict[str, Value] = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
        metadata.pop("tokenizer.chat_template.default", None)
        if metadata:
            metadata["tokenizer.chat_templates"] = [name for name in named if name != "default"]
        return metadata | ({"tokenizer.chat_template": named["default"]} if "default" in named else {})
    return {"tokenizer.chat_template": template} if template else {}
