"""The table of chat templates: which file, stop word and default system message stand behind each name.

The text of a template is in `fastllm/templates/<file>.jinja`. Words in braces there are filled in here or, for
`{system_message}`, by `get_chat_template`. The renderings of the first 31 names are those of Unsloth, byte for byte;
the later ones are those of the models' publishers.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "templates"
SYSTEM_MESSAGE = "{system_message}"
TOKENIZERS_EOS = "eos_token"  # as a stop word: whatever the tokenizer calls its end-of-sequence token

Entry = tuple[str, str, bool, str]


@dataclass(frozen=True)
class Shipped:
    """One template. `maps_eos`: the stop word may take the place of the tokenizer's EOS. `renames`: tokens of the
    vocabulary that carry another name in this template."""

    file: str
    stop_word: str = TOKENIZERS_EOS
    system_message: str | None = None
    maps_eos: bool = False
    renames: Mapping[str, str] = field(default_factory=dict)
    fills: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def jinja(self) -> str:
        text = (FOLDER / f"{self.file}.jinja").read_text(encoding="utf-8")
        for word, value in self.fills.items():
            text = text.replace(f"{{{word}}}", value)
        return text


_CHAT_BETWEEN = "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, "
_VICUNA = (_CHAT_BETWEEN + "detailed, and polite answers to the {0}'s questions.").format
_ALPACA = (
    "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
)
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_GEMMA_AS_CHATML = {"<start_of_turn>": "<|im_start|>", "<eos>": "<|im_end|>"}

_unsloth = Shipped("unsloth", system_message="You are a helpful assistant to the user")
_mistral = Shipped("mistral")
_vicuna_old = Shipped("vicuna_old", system_message=_VICUNA("human"))
_gemma = Shipped("gemma", "<end_of_turn>", maps_eos=True)
_gemma_chatml = Shipped("gemma_chatml", "<|im_end|>", maps_eos=True, renames=_GEMMA_AS_CHATML)
_llama_3 = Shipped("llama-3")
_phi_3 = Shipped("phi-3", "<|end|>")
_llama_31 = Shipped("llama-3.1", system_message="")
_qwen_25 = Shipped("qwen-2.5", system_message=_QWEN)
_gemma_3 = Shipped("gemma-3", "<end_of_turn>", fills={"image_token": "<start_of_image>"})
_gemma_3n = Shipped("gemma-3", "<end_of_turn>", fills={"image_token": "<image_soft_token>"})
_qwen_3 = Shipped("qwen-3", "<|im_end|>", fills={"thinking": "switch"})
_gemma_4 = Shipped("gemma-4", "<turn|>", fills={"empty_thought": "no"})
_gemma_4_thinking = Shipped("gemma-4", "<turn|>", fills={"empty_thought": "yes"})
_gpt_oss = Shipped("gpt-oss", "<|return|>")
_lfm_2 = Shipped("lfm-2", "<|im_end|>")

SHIPPED: dict[str, Shipped] = {
    "unsloth": _unsloth,
    "zephyr": Shipped("zephyr"),
    "chatml": Shipped("chatml", "<|im_end|>", maps_eos=True),
    "mistral": _mistral,
    "llama": Shipped("llama"),
    "vicuna": Shipped("vicuna", system_message=_VICUNA("user")),
    "vicuna_old": _vicuna_old,
    "vicuna old": _vicuna_old,
    "alpaca": Shipped("alpaca", system_message=_ALPACA),
    "gemma": _gemma,
    "gemma_chatml": _gemma_chatml,
    "gemma2": _gemma,
    "gemma2_chatml": _gemma_chatml,
    "llama-3": _llama_3,
    "llama3": _llama_3,
    "phi-3": _phi_3,
    "phi-35": _phi_3,
    "phi-3.5": _phi_3,
    "llama-3.1": _llama_31,
    "llama-31": _llama_31,
    "llama-3.2": _llama_31,
    "llama-3.3": _llama_31,
    "llama-32": _llama_31,
    "llama-33": _llama_31,
    "qwen-2.5": _qwen_25,
    "qwen-25": _qwen_25,
    "qwen25": _qwen_25,
    "qwen2.5": _qwen_25,
    "phi-4": Shipped("phi-4", "<|im_end|>"),
    "gemma-3": _gemma_3,
    "gemma3": _gemma_3,
    "qwen-3": _qwen_3,
    "qwen3": _qwen_3,
    "gemma-3n": _gemma_3n,
    "gemma3n": _gemma_3n,
    "gemma-4": _gemma_4,
    "gemma4": _gemma_4,
    "gemma-4-thinking": _gemma_4_thinking,
    "gemma4-thinking": _gemma_4_thinking,
    "gpt-oss": _gpt_oss,
    "gptoss": _gpt_oss,
    "qwen3-instruct": Shipped("qwen-3", "<|im_end|>", fills={"thinking": "never"}),
    "qwen3-thinking": Shipped("qwen-3", "<|im_end|>", fills={"thinking": "always"}),
    "lfm-2": _lfm_2,
    "lfm-2.5": _lfm_2,
    "starling": Shipped("starling", "<|end_of_turn|>"),
    "yi-chat": Shipped("yi-chat", "<|endoftext|>"),
    "qwen-2.5-coder": _qwen_25,
    "qwen-25-coder": _qwen_25,
    "qwen2.5-coder": _qwen_25,
    "qwen25-coder": _qwen_25,
    "mixtral": _mistral,
}


class TemplateTable(MutableMapping[str, Entry]):
    """Name -> `(jinja, stop_word, may_map_eos, ollama_modelfile)`, read and derived when first asked for.

    A template of your own joins by assignment: `CHAT_TEMPLATES["mine"] = (jinja, "<|end|>", False, "")`.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry | None] = dict.fromkeys(SHIPPED)

    def __getitem__(self, name: str) -> Entry:
        entry = self._entries[name]
        if entry is None:
            from .ollama import modelfile

            shipped = SHIPPED[name]
            jinja = with_system_message(shipped.jinja, shipped.system_message)
            entry = (shipped.jinja, shipped.stop_word, shipped.maps_eos, modelfile(jinja, shipped.stop_word))
            self._entries[name] = entry
        return entry

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} chat templates: {', '.join(self)}>"


class Modelfiles(Mapping[str, str]):
    """Name -> Ollama Modelfile of the template, with `{__FILE_LOCATION__}` and `{__EOS_TOKEN__}` to fill in."""

    def __init__(self, table: Mapping[str, Entry]) -> None:
        self._table = table

    def __getitem__(self, name: str) -> str:
        return self._table[name][3]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


CHAT_TEMPLATES = TemplateTable()
OLLAMA_TEMPLATES = Modelfiles(CHAT_TEMPLATES)
DEFAULT_SYSTEM_MESSAGE: dict[str, str | None] = {name: shipped.system_message for name, shipped in SHIPPED.items()}


def quoted(text: str) -> str:
    """`text` as it stands between the single quotes of a Jinja string."""
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")


def with_system_message(jinja: str, message: str | None) -> str:
    """The template with its default system message filled in."""
    return jinja.replace(SYSTEM_MESSAGE, quoted(message or ""))


@functools.lru_cache(maxsize=64)
def is_known(jinja: str) -> bool:
    """Whether `jinja` needs no guard: a template of this package, or one of a publisher, known by its hash."""
    return hashlib.sha256(jinja.encode("utf-8", "surrogatepass")).hexdigest() in _released() or is_shipped(jinja)


@functools.cache
def _released() -> frozenset[str]:
    """Hashes of templates as their publishers released them; each has been rendered under guard and without."""
    lines = (FOLDER / "released.sha256").read_text(encoding="utf-8").splitlines()
    return frozenset(line.partition(" ")[0] for line in lines)


def is_shipped(jinja: str) -> bool:
    """Whether `jinja` is a template of this package, whatever its system message."""
    for shipped in set(_distinct_texts()):
        head, placeholder, tail = shipped.partition(SYSTEM_MESSAGE)
        if jinja == shipped:
            return True
        if placeholder and jinja.startswith(head) and jinja.endswith(tail) and len(jinja) >= len(head) + len(tail):
            message = jinja[len(head) : len(jinja) - len(tail)]
            if re.fullmatch(r"(?:[^'\\\n]|\\.)*", message):  # nothing that could end the quotes
                return True
    return False


@functools.cache
def _distinct_texts() -> tuple[str, ...]:
    return tuple({shipped.jinja for shipped in SHIPPED.values()})
