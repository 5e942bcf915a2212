"""Fixtures of the GGUF tests: the judge (llama.cpp) and real vocabularies, where they are there."""

import lzma
import os
from pathlib import Path

import pytest

from . import llama_cpp

VOCABS = Path(os.environ.get("FASTLLM_VOCABS", Path(__file__).parents[3] / "shared" / "vocabs"))


@pytest.fixture(scope="session")
def judge():
    """llama.cpp, from the `xllamacpp` wheel of the dev extra."""
    if not llama_cpp.is_installed():
        pytest.skip("pip install xllamacpp")
    return llama_cpp


@pytest.fixture(scope="session")
def real_vocab(tmp_path_factory):
    """`real_vocab(name)`: (GGUF file with a real vocabulary, test texts, their ids). Skips where it is not there."""
    folder = tmp_path_factory.mktemp("vocabs")

    def unpack(name: str) -> tuple[Path, list[str], list[list[int]]]:
        packed = VOCABS / f"ggml-vocab-{name}.gguf.xz"
        if not packed.exists():
            pytest.skip(f"set FASTLLM_VOCABS to a folder with {packed.name}")
        path = folder / f"{name}.gguf"
        if not path.exists():
            path.write_bytes(lzma.decompress(packed.read_bytes()))
        texts = packed.with_suffix(".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        lines = packed.with_suffix(".out").read_text().splitlines()
        ids = [[int(number) for number in line.split()] for line in lines]
        return path, texts[: len(ids)], ids  # the last text may be followed by a separator

    return unpack
