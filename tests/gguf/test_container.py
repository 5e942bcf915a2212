"""The GGUF container: what is written is what the `gguf` package reads, and files that lie are refused."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm._errors import FastllmError
from fastllm.gguf.container import GGUFError, encode_header, lay_out
from fastllm.gguf.reader import GGUFReader
from fastllm.gguf.tensor_types import F32, Q8_0, TENSOR_TYPES, tensor_type
from fastllm.gguf.writer import gguf_writer

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "a.flag": True,
    "a.negative": -5,
    "a.large": 2**40,
    "a.words": ["one", "zwei", "三"],
    "a.types": [1, -2, 3],
    "a.scores": [0.5, -1.0],
    "a.flags": [True, False],
}


def write_two_tensors(path, metadata=METADATA):
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    codes = torch.arange(2 * 3 * 34, dtype=torch.uint8).view(6, 34)
    tensors = lay_out([("weight", (3, 4), F32), ("experts", (2, 3, 32), Q8_0)])
    with gguf_writer(path, metadata, tensors) as writer:
        writer.write("experts", codes[3:], first_row=3)  # in any order, in parts
        writer.write("weight", weight.view(torch.uint8))
        writer.write("experts", codes[:3])
    return weight, codes


def test_types_are_those_of_ggml():
    for kind in TENSOR_TYPES.values():
        theirs = gguf.GGMLQuantizationType[kind.name]
        assert (kind.id, (kind.block_size, kind.block_bytes)) == (int(theirs), gguf.GGML_QUANT_SIZES[theirs])


def test_an_unknown_type_is_refused_with_the_nearest_name():
    with pytest.raises(FastllmError, match="did you mean 'Q4_K'"):
        tensor_type("q4_kk")


def test_the_gguf_package_reads_what_we_write(tmp_path):
    weight, codes = write_two_tensors(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value in METADATA.items():
        assert reader.fields[key].contents() == value
    assert [tensor.name for tensor in reader.tensors] == ["weight", "experts"]
    assert np.array_equal(reader.tensors[0].data, weight.numpy())
    assert np.array_equal(reader.tensors[1].data.reshape(6, 34), codes.numpy())
    assert list(reader.tensors[1].shape) == [32, 3, 2]


def test_we_read_what_the_gguf_package_writes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint8("a.byte", 7)
    writer.add_array("a.words", ["x", "y"])
    writer.add_float64("a.wide", 0.1)
    writer.add_tensor("t", np.ones((2, 5), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFReader(tmp_path / "b.gguf") as reader:
        assert reader.metadata["a.byte"] == 7
        assert reader.metadata["a.words"] == ["x", "y"]
        assert reader.metadata["a.wide"] == 0.1
        assert reader.tensors["t"].shape == (2, 5)
        assert torch.equal(reader.data("t").view(torch.float16), torch.ones(2, 5, dtype=torch.float16))


def test_we_read_what_we_write(tmp_path):
    weight, codes = write_two_tensors(tmp_path / "a.gguf")
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert reader.metadata == METADATA
        assert torch.equal(reader.data("weight").view(torch.float32), weight)
        assert torch.equal(reader.data("experts"), codes)


def test_data_outlives_the_reader(tmp_path):
    weight, _ = write_two_tensors(tmp_path / "a.gguf")
    with GGUFReader(tmp_path / "a.gguf") as reader:
        view = reader.data("weight")
    assert torch.equal(view.view(torch.float32), weight)
    view.zero_()
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert torch.equal(reader.data("weight").view(torch.float32), weight)


@pytest.mark.parametrize("value", [[], [1, 2.0], [1, "a"], None, 2**70, {"a": 1}])
def test_values_without_a_kind_are_refused(value):
    with pytest.raises(GGUFError, match="GGUF kind"):
        encode_header({"key": value}, [])


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", (4,), F32), ("a", (4,), F32)],
        [("", (4,), F32)],
        [("a" * 64, (4,), F32)],
        [("a", (4, 0), F32)],
        [("a", (1, 1, 1, 1, 1), F32)],
        [("a", (2, 33), Q8_0)],
    ],
)
def test_tensors_that_the_format_cannot_hold_are_refused(tensors):
    with pytest.raises(GGUFError):
        lay_out(tensors)


def test_missing_doubled_and_misshapen_rows_are_refused(tmp_path):
    tensors = lay_out([("a", (4, 8), F32), ("b", (8,), F32)])
    rows = torch.zeros(4, 32, dtype=torch.uint8)
    missing = pytest.raises(GGUFError, match="1 of 2 tensors are missing or not whole: b")
    with missing, gguf_writer(tmp_path / "a.gguf", {}, tensors) as writer:
        writer.write("a", rows)
    with pytest.raises(GGUFError, match="arrive twice"), gguf_writer(tmp_path / "a.gguf", {}, tensors) as writer:
        writer.write("a", rows)
        writer.write("a", rows[:1], first_row=3)
    with pytest.raises(GGUFError, match="do not fit"), gguf_writer(tmp_path / "a.gguf", {}, tensors) as writer:
        writer.write("a", rows, first_row=1)
    assert list(tmp_path.iterdir()) == []


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(num_tensors=0, num_pairs=0, version=3, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_pairs)


def tensor(name=b"t", shape=(32,), kind=0, offset=0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def alignment(value: bytes) -> bytes:
    return header(1, 1) + string(b"general.alignment") + value + tensor() + PAD * 8


PAD = bytes(64)
HOSTILE = {
    "empty": b"",
    "magic": header(magic=b"GGML") + PAD,
    "version 1": header(version=1) + PAD,
    "big endian": header(version=3 << 24) + PAD,
    "tensor count": header(num_tensors=2**63) + PAD,
    "pair count": header(num_pairs=2**63) + PAD,
    "pairs missing": header(num_pairs=3) + PAD,
    "key length": header(num_pairs=1) + struct.pack("<Q", 2**62) + PAD,
    "empty key": header(num_pairs=1) + string(b"") + PAD,
    "key twice": header(num_pairs=2) + (string(b"k") + struct.pack("<IB", 0, 1)) * 2 + PAD,
    "key not utf-8": header(num_pairs=1) + string(b"\xff\xfe") + PAD,
    "value kind": header(num_pairs=1) + string(b"k") + struct.pack("<I", 13) + PAD,
    "string length": header(num_pairs=1) + string(b"k") + struct.pack("<IQ", 8, 2**63) + PAD,
    "array length": header(num_pairs=1) + string(b"k") + struct.pack("<IIQ", 9, 12, 2**60) + PAD,
    "array of strings": header(num_pairs=1) + string(b"k") + struct.pack("<IIQ", 9, 8, 2**40) + PAD,
    "array of arrays": header(num_pairs=1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1) + PAD,
    "array kind": header(num_pairs=1) + string(b"k") + struct.pack("<IIQ", 9, 99, 1) + PAD,
    "alignment 0": alignment(struct.pack("<II", 4, 0)),
    "alignment 3": alignment(struct.pack("<II", 4, 3)),
    "alignment huge": alignment(struct.pack("<II", 4, 2**31)),
    "alignment text": alignment(struct.pack("<I", 8) + string(b"32")),
    "tensor name": header(1) + tensor(name=b"x" * 64) + PAD * 8,
    "no dimensions": header(1) + tensor(shape=()) + PAD * 8,
    "five dimensions": header(1) + tensor(shape=(32, 1, 1, 1, 1)) + PAD * 8,
    "dimension count": header(1) + string(b"t") + struct.pack("<I", 2**31) + PAD * 8,
    "dimension 0": header(1) + tensor(shape=(32, 0)) + PAD * 8,
    "overflow": header(1) + tensor(shape=(2**32, 2**32)) + PAD * 8,
    "overflow to small": header(1) + tensor(shape=(2**63, 2, 1, 1)) + PAD * 8,
    "type": header(1) + tensor(kind=4) + PAD * 8,
    "type unknown": header(1) + tensor(kind=2**31) + PAD * 8,
    "half a block": header(1) + tensor(kind=8, shape=(33,)) + PAD * 8,
    "past the end": header(1) + tensor(shape=(32, 1000)) + PAD * 8,
    "offset past the end": header(1) + tensor(offset=2**62) + PAD * 8,
    "overlap": header(2) + tensor(b"a") + tensor(b"b", offset=32) + PAD * 8,
    "gap": header(2) + tensor(b"a") + tensor(b"b", offset=256) + PAD * 8,
    "name twice": header(2) + tensor(b"a") + tensor(b"a", offset=128) + PAD * 8,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_lie_are_refused(tmp_path, name):
    (tmp_path / "bad.gguf").write_bytes(HOSTILE[name])
    with pytest.raises(GGUFError, match=r"bad\.gguf"):
        GGUFReader(tmp_path / "bad.gguf")


def test_every_cut_of_a_file_is_noticed(tmp_path):
    write_two_tensors(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    with GGUFReader(tmp_path / "a.gguf") as reader:
        last = reader.tensors["experts"]
        end = reader.data_offset + last.offset + last.num_bytes
    for length in range(end):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            GGUFReader(tmp_path / "cut.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_raise_our_error_or_read(tmp_path, changes):
    path = tmp_path / "a.gguf"
    if not path.exists():
        write_two_tensors(path)
    content = bytearray(path.read_bytes())
    for position, byte in changes:
        content[position % len(content)] = byte
    (tmp_path / "fuzzed.gguf").write_bytes(content)
    try:
        with GGUFReader(tmp_path / "fuzzed.gguf") as reader:
            for name in reader.tensors:
                reader.data(name)
    except GGUFError:
        pass
