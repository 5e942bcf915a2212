"""Host memory for activations: how much of it there is, and that it is used again."""

from types import SimpleNamespace

import pytest
import torch

from fastllm import _device
from fastllm.models import host_offload
from fastllm.models.host_offload import _Memory

GIB = 2**30


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with 40 GiB available, and a function that limits its container: (limit, use, reclaimable cache)."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {40 * GIB // 1024} kB\n")
    monkeypatch.setattr(_device, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(_device, "_CONTROL_GROUPS", ((str(tmp_path), "memory.max", "memory.current", ("file", "old")),))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def limit(most, used=0, cached=0):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 7\nfile {cached}\nold 0\n")

    return limit


def test_what_is_free_on_the_host(host, monkeypatch):
    assert _device.free_host_bytes() == 40 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _device.free_host_bytes() == 10 * GIB


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (("max",), 40),
        ((16 * GIB, 10 * GIB), 6),
        ((16 * GIB, 10 * GIB, 4 * GIB), 10),  # file cache is given up
        ((16 * GIB, 17 * GIB), 0),
        ((100 * GIB, 1 * GIB), 40),
    ],
)
def test_the_limit_of_a_container_counts(host, limit, expected):
    host(*limit)
    assert _device.free_host_bytes() == expected * GIB


def test_a_system_that_does_not_say_has_none(host, monkeypatch, tmp_path):
    monkeypatch.setattr(_device, "_MEMINFO", tmp_path / "nowhere")
    assert _device.free_host_bytes() == 0


def test_pieces_are_used_again_and_short_ones_make_room(monkeypatch):
    waits = []
    monkeypatch.setattr(host_offload, "locked_bytes", lambda count: torch.empty(count, dtype=torch.uint8))
    memory = _Memory(SimpleNamespace(synchronize=lambda: waits.append(len(memory._free))))
    short, long = memory.take(100), memory.take(300)
    for piece in (long, short):
        memory.give(piece)
    assert memory.take(50) is short and memory.take(50) is long, "the shortest that fits"
    for piece in (long, short):
        memory.give(piece)
    assert memory.take(400).numel() == 400 and waits == [2], "the device may still copy from what is dropped"
    assert memory.take(300) is long and memory._free == []
    memory.give(long)
    memory.release()
    assert memory._free == [] and waits == [2, 1]
