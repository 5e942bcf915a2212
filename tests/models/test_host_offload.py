"""Host memory for activations: how much of it there is, and that it is used again."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastllm import _device
from fastllm._locked_memory import _new_pages
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
    monkeypatch.setattr(host_offload, "locked_bytes", lambda count, for_forks: torch.empty(count, dtype=torch.uint8))
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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say how memory is mapped")
@pytest.mark.parametrize("for_forks", [True, False])
def test_pages_are_shared_with_forked_processes_or_kept_from_them(for_forks):
    """A private page that both had would be copied at the next write, beside the one that the GPU knows."""
    pages = _new_pages(1 << 20, for_forks=for_forks)
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        start, end = (int(number, 16) for number in mapping.split(" ", 1)[0].split("-"))
        if start <= address < end:
            flags = mapping.split("VmFlags:")[1].split()
    assert ("sh" in flags) == for_forks and ("dc" in flags) != for_forks
