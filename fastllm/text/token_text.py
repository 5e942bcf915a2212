"""The text of single tokens, and markers found in token ids.

Tokens are compared as bytes, so it does not matter into which tokens a marker falls: `\\n` of a header and `\\n` of the
answer may share one. Control tokens stand between two bytes that no text contains, so text that only looks like a
control token is not taken for one.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from .rendering import tokenizer_of

_OPEN, _CLOSE = b"\xff", b"\xfe"


class TokenText:
    """Ids `[n]` of one tokenizer as bytes, with the way back from bytes to tokens."""

    def __init__(self, tokenizer: Any) -> None:
        core = tokenizer_of(tokenizer)
        self._controls = {
            number: token for number, token in core.added_tokens_decoder.items() if getattr(token, "special", False)
        }
        self._piece = _piece_reader(core)
        self._pieces: dict[int, bytes] = {}

    def piece(self, number: int) -> bytes:
        """The bytes of one token."""
        known = self._pieces.get(number)
        if known is None:
            control = self._controls.get(number)
            known = _OPEN + str(control).encode() + _CLOSE if control else self._piece(number)
            self._pieces[number] = known
        return known

    def visible(self, number: int) -> bytes:
        """The bytes of one token as a person reads them."""
        control = self._controls.get(number)
        return str(control).encode() if control else self.piece(number)

    def spell(self, ids: Sequence[int]) -> Spelled:
        """The bytes of `ids` and where each token ends in them."""
        pieces = [self.piece(number) for number in ids]
        return Spelled(b"".join(pieces), list(accumulate(map(len, pieces))))

    def pattern(self, text: str) -> re.Pattern[bytes]:
        """What `text` looks like among the bytes of token ids."""
        controls = sorted({str(token) for token in self._controls.values()}, key=len, reverse=True)
        by_text = {str(token): token for token in self._controls.values()}
        splitter = re.compile("(" + "|".join(map(re.escape, controls)) + ")") if controls else re.compile("(?!)()")
        parts: list[bytes] = []
        eats_space = False
        for part in splitter.split(text):
            control = by_text.get(part)
            if control is None:
                kept = part.lstrip() if eats_space else part
                parts.append(re.escape(kept.encode()))
                continue
            if getattr(control, "lstrip", False) and parts:
                parts[-1] = re.escape(re.sub(rb"\\(.)", rb"\1", parts[-1]).rstrip())
            parts.append(re.escape(_OPEN + part.encode() + _CLOSE))
            eats_space = bool(getattr(control, "rstrip", False))
        # some tokenizers put a space of their own between a control token and text
        return re.compile(b" ?".join(filter(None, parts)))


class Spelled(NamedTuple):
    """`text` of a row in bytes; token i covers `ends[i - 1]` to `ends[i]`."""

    text: bytes
    ends: list[int]

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that share a byte with `start` to `end`."""
        return bisect_right(self.ends, start), bisect_left(self.ends, end) + 1 if end > start else 0


def _piece_reader(core: Any) -> Callable[[int], bytes]:
    """How tokens of this vocabulary spell bytes: byte-level, SentencePiece, or as the tokenizer decodes them."""
    decoder = repr(getattr(getattr(core, "backend_tokenizer", None), "decoder", None))
    if "ByteLevel" in decoder:
        letters = _byte_level_letters()

        def byte_level(number: int) -> bytes:
            token = core.convert_ids_to_tokens(number) or ""
            return bytes(letters[letter] for letter in token) if set(token) <= letters.keys() else token.encode()

        return byte_level
    if "▁" in decoder or "ByteFallback" in decoder:

        def sentence_piece(number: int) -> bytes:
            token = core.convert_ids_to_tokens(number) or ""
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

        return sentence_piece
    return lambda number: core.decode([number]).encode()


def _byte_level_letters() -> dict[str, int]:
    """Letter -> byte of byte-level BPE: printable bytes are themselves, the others follow from U+0100 (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(256 + offset): byte for offset, byte in enumerate(others)}
