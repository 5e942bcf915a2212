"""Which of llama.cpp's text splitters does what the pre-tokenizer of a `tokenizer.json` does.

llama.cpp knows splitters by name (`tokenizer.ggml.pre`). Names are found by comparing the definition itself, the
regular expressions, so a tokenizer that was extended with new tokens is recognised like the one it came from.
"""

from __future__ import annotations

from typing import Any

from .._errors import TokenizerError
from .._notices import notice

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_OF_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN = rf"{_WORD_OF_CASE % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_WORD_OF_CASE % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DIGIT = r"\p{N}"

# splitting steps, whether a word that is a token is taken whole -> llama.cpp's name
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
}


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the splitter of a byte-level `tokenizer.json`.

    Raises `TokenizerError` where llama.cpp has no such splitter: text would be cut into other tokens than in training.
    """
    _require_known_normalizer(tokenizer.get("normalizer"))
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    takes_words = bool(tokenizer["model"].get("ignore_merges"))
    name = _NAMES.get((steps, takes_words))
    if name is not None:
        return name
    name = _NAMES.get((steps, not takes_words))
    if name is None:
        raise TokenizerError(
            f"llama.cpp has no splitter for this pre-tokenizer: {' then '.join(steps) or 'none'}",
            where="tokenizer.json",
            fix="save merged_16bit and serve that, or use a tokenizer of Llama 3, Qwen, GPT-2, Phi 4 or Mistral kind",
        )
    notice(
        f"fastllm: ignore_merges={takes_words} of the tokenizer can't be told to llama.cpp, which assumes "
        f"{not takes_words} for {name!r}; some rare words may be cut into other tokens"
    )
    return name


def _require_known_normalizer(normalizer: dict[str, Any] | None) -> None:
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for part in parts:
        # NFC changes only text that combines marks in an unusual order; llama.cpp leaves such text as it is.
        if part["type"] != "NFC":
            raise TokenizerError(f"llama.cpp has no {part['type']} normalizer", where="tokenizer.json")


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The regular expressions that split text, one after the other, in one spelling."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            raise TokenizerError("llama.cpp adds no space before byte-level text", where="tokenizer.json")
        return [_GPT2] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return [_DIGIT]
    if kind == "Split":
        pattern = pre_tokenizer["pattern"]
        return [str(pattern.get("Regex", pattern.get("String"))).replace(_SPELLED_CONTRACTIONS, _CONTRACTIONS)]
    return [kind]
