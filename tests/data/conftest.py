"""Tokenizers to test with: a toy one that is always there, and real vocabularies where they are stored."""

import importlib.util
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABS = Path(os.environ.get("FASTLLM_VOCABS", Path(__file__).parents[3] / "shared" / "vocabs"))
STORED = (
    "llama-bpe",
    "llama-spm",
    "phi-3",
    "qwen2",
    "qwen35",
    "gemma-4",
    "gpt-2",
    "deepseek-llm",
    "starcoder",
    "falcon",
)
MISTRAL = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
}
REAL = (*STORED, *MISTRAL)

_SETTINGS = ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side")
_SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Write a function that adds two numbers.",
    "user assistant system Below are some instructions that describe some tasks.",
    "### Instruction: ### Response: Hello there, how are you today?\n\nI am fine.\n",
]
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def make_toy_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 600 tokens with ChatML's control tokens; anything can be encoded."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_SENTENCES * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture
def toy() -> PreTrainedTokenizerFast:
    return make_toy_tokenizer()


def make_small_model(folder: Path) -> Path:
    """A checkpoint of a tiny Llama with the toy tokenizer, saved in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_toy_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **shape,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class RealTokenizers:
    """Real tokenizers by name, each as it was loaded; skips where the vocabulary is not stored.

    Tests share them: `get_chat_template` gives a tokenizer another backend where it renames tokens and else sets plain
    attributes, so putting both back is enough. A test that adds tokens asks for a `fresh` one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __call__(self, name: str) -> Any:
        if name not in self._loaded:
            tokenizer = self.fresh(name)
            state = {key: getattr(tokenizer, key) for key in ("_tokenizer", "chat_template", *_SETTINGS)}
            self._loaded[name] = tokenizer, state
        tokenizer, state = self._loaded[name]
        for key, value in state.items():
            setattr(tokenizer, key, value)
        return tokenizer

    def fresh(self, name: str) -> Any:
        return (self._mistral if name in MISTRAL else self._stored)(name)

    def _stored(self, name: str) -> Any:
        packed = VOCABS / f"ggml-vocab-{name}.gguf.xz"
        if not packed.exists():
            pytest.skip(f"no vocabulary {packed}; set FASTLLM_VOCABS to a folder of llama.cpp's models/*.gguf.xz")
        (self.folder / f"{name}.gguf").write_bytes(lzma.decompress(packed.read_bytes()))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder, gguf_file=f"{name}.gguf")
        if name == "llama-bpe":
            tokenizer.backend_tokenizer.model.ignore_merges = True
        if name == "llama-spm":
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
            tokenizer.backend_tokenizer.pre_tokenizer = None
        return tokenizer

    def _mistral(self, name: str) -> Any:
        found = importlib.util.find_spec("mistral_common")
        readers = ("sentencepiece", "google.protobuf")
        if found is None or found.origin is None or not all(map(_is_installed, readers)):
            pytest.skip("Mistral's vocabularies: pip install mistral-common sentencepiece protobuf")
        from transformers import LlamaTokenizer

        model = Path(found.origin).parent / "data" / MISTRAL[name]
        source = self.folder / f"{name}-source"
        source.mkdir(exist_ok=True)
        shutil.copy(model, source / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(source)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealTokenizers:
    return RealTokenizers(tmp_path_factory.mktemp("vocabs"))


def talk(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of alternating user and assistant turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]
