"""The judge: llama.cpp itself, from the prebuilt `xllamacpp` wheel. Nothing here knows of fastllm.

The wheel's shared object exports ggml's C functions for single tensors; its server class loads whole models.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import importlib.util
import io
import json
import math
import os
import urllib.request
from collections.abc import Iterator

import gguf
import numpy as np


@functools.cache
def _library() -> ctypes.CDLL:
    import xllamacpp

    folder = os.path.dirname(xllamacpp.__file__)
    (name,) = (entry for entry in os.listdir(folder) if entry.endswith((".so", ".pyd", ".dylib")))
    library = ctypes.CDLL(os.path.join(folder, name))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def quantize(name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """llama.cpp's own encoding of fp32 rows [R, C]: uint8 [R, bytes of a row]."""
    kind = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    num_rows, width = rows.shape
    encoded = np.zeros((num_rows, width // block_size * block_bytes), np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        assert importance.shape == (width,)
    weights = None if importance is None else importance.ctypes.data
    _library().ggml_quantize_chunk(int(kind), rows.ctypes.data, encoded.ctypes.data, 0, num_rows, width, weights)
    return encoded


def is_valid(name: str, encoded: np.ndarray) -> bool:
    """Whether llama.cpp accepts the bytes of a tensor."""
    encoded = np.ascontiguousarray(encoded)
    return _library().ggml_validate_row_data(int(gguf.GGMLQuantizationType[name]), encoded.ctypes.data, encoded.nbytes)


def decode(name: str, encoded: np.ndarray) -> np.ndarray:
    """fp32 weights of stored rows, by the `gguf` package: a third implementation."""
    return gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[name])


class Model:
    """A loaded GGUF file."""

    def __init__(self, server, vocab_size: int) -> None:
        self._server, self._vocab_size = server, vocab_size
        self._letter = self.tokenize("a")[0]

    def next_token_logprobs(self, ids: list[int]) -> np.ndarray:
        """log p(next token | ids) over the whole vocabulary, fp32 [V]."""
        request = self._one_token() | {"prompt": ids, "n_predict": 1, "logprobs": self._vocab_size}
        return self._logprobs(self._server.handle_completions(request))

    def image_logprobs(self, image, question: str) -> np.ndarray:
        """log p(next token | the image and the question in one user message), fp32 [V]."""
        request = self._one_token() | {
            "messages": [_seen(image, question)],
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": self._vocab_size,
        }
        return self._logprobs(self._server.handle_chat_completions(request))

    def image_prompt_tokens(self, image, question: str) -> int:
        """How many tokens such a message is, those of the image included."""
        return self._server.handle_chat_completions({"messages": [_seen(image, question)], "max_tokens": 1})["usage"][
            "prompt_tokens"
        ]

    def image_answer(self, image, question: str, num_tokens: int) -> list[int]:
        """The ids of the greedy answer to such a message."""
        reply = self._post(
            "/v1/chat/completions",
            {
                "messages": [_seen(image, question)],
                "max_tokens": num_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "return_tokens": True,
                "verbose": True,
            },
        )
        return reply["__verbose"]["tokens"]

    def _one_token(self) -> dict:
        return {
            # The probabilities are those before the bias. A letter is sampled because an end of text, or half of
            # a character, would come without probabilities.
            "logit_bias": [[self._letter, 10000.0]],
            "n_probs": self._vocab_size,
            "temperature": 0.0,
            "cache_prompt": False,
        }

    def _logprobs(self, reply: dict) -> np.ndarray:
        choices = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        logprobs = np.full(self._vocab_size, -math.inf, np.float32)
        for choice in choices:
            logprobs[choice["id"]] = choice["logprob"]
        return logprobs

    def greedy(self, ids: list[int], num_tokens: int) -> list[int]:
        """The ids that greedy decoding appends."""
        ids = list(ids)
        for _ in range(num_tokens):
            ids.append(int(self.next_token_logprobs(ids).argmax()))
        return ids[-num_tokens:]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def chat_prompt_tokens(self, messages: list[dict[str, str]]) -> int:
        """How many tokens a conversation is for the chat endpoint."""
        reply = self._server.handle_chat_completions({"messages": messages, "max_tokens": 1})
        return reply["usage"]["prompt_tokens"]

    def _post(self, route: str, body: dict) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)


def _seen(image, question: str) -> dict:
    """A user message with a PIL image before the question."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}],
    }


@contextlib.contextmanager
def loaded(
    path: os.PathLike[str],
    vocab_size: int,
    *,
    context: int = 256,
    lora: os.PathLike[str] | None = None,
    mmproj: os.PathLike[str] | None = None,
) -> Iterator[Model]:
    """Load a GGUF file with an f32 cache and everything on one thread."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = os.fspath(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if mmproj is not None:
        params.mmproj.path = os.fspath(mmproj)
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which is in f16
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo(os.fspath(lora), 1.0)
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    try:
        yield Model(server, vocab_size)
    finally:
        del server
