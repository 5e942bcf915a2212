"""Writing beside computing: jobs in their order, a bound on what waits, and no error that is lost."""

import threading

import pytest
import torch

from fastllm.gguf.atomic import SaveError
from fastllm.gguf.container import lay_out
from fastllm.gguf.reader import GGUFReader
from fastllm.gguf.tensor_types import F32
from fastllm.gguf.write_behind import WriteBehind
from fastllm.gguf.writer import gguf_writer


def test_jobs_run_in_their_order_beside_the_caller():
    done = []
    with WriteBehind(max_bytes=10) as behind:
        for i in range(20):
            behind.submit(1, lambda i=i: done.append((i, threading.current_thread())))
        behind.wait()
    assert [i for i, _ in done] == list(range(20))
    assert len({thread for _, thread in done}) == 1 and done[0][1] is not threading.current_thread()


def test_no_more_than_the_bound_waits():
    """The third job of 4 bytes does not fit into 10: `submit` returns only when the first one is done."""
    may_run, first_done = threading.Event(), threading.Event()

    def first():
        may_run.wait()
        first_done.set()

    with WriteBehind(max_bytes=10) as behind:
        behind.submit(4, first)
        behind.submit(4, lambda: None)
        threading.Timer(0.05, may_run.set).start()
        behind.submit(4, lambda: None)
        assert first_done.is_set()
        behind.submit(100, lambda: None)  # alone, more than the bound is taken
        behind.wait()


def test_a_failure_is_raised_and_what_has_not_begun_is_dropped():
    def fail():
        raise OSError("no disk")

    later = []
    with pytest.raises(OSError, match="no disk"), WriteBehind(max_bytes=1) as behind:
        behind.submit(1, fail)
        behind.submit(1, lambda: later.append(1))
    assert later == []


def test_a_failure_of_the_last_write_publishes_no_file(tmp_path, monkeypatch):
    """It happens beside the caller, who has nothing more to write."""
    from fastllm.gguf import atomic

    table = lay_out([("a", (4,), F32), ("b", (4,), F32)])
    values = torch.arange(4.0).view(1, 4).view(torch.uint8)
    with gguf_writer(tmp_path / "fine.gguf", {}, table) as file:
        file.write("b", values)
        file.write("a", values)
    with GGUFReader(tmp_path / "fine.gguf") as reader:
        assert torch.equal(reader.data("b"), values)

    original, calls = atomic.os.pwrite, []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # the header, then two tensors
            raise OSError(5, "Input/output error")
        return original(*arguments)

    monkeypatch.setattr(atomic.os, "pwrite", pwrite)
    with pytest.raises(SaveError, match="Input/output error"), gguf_writer(tmp_path / "broken.gguf", {}, table) as file:
        file.write("b", values)
        file.write("a", values)
    assert [path.name for path in tmp_path.iterdir()] == ["fine.gguf"]


def test_large_files_are_synced_on_the_way(tmp_path, monkeypatch):
    """So that the last sync does not find the whole file waiting."""
    from fastllm.gguf import atomic, writer

    monkeypatch.setattr(writer, "_SYNC_BYTES", 32)
    original, syncs = atomic.os.fsync, []
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: syncs.append(original(descriptor)))
    table = lay_out([(f"t{i}", (4,), F32) for i in range(6)])
    with gguf_writer(tmp_path / "a.gguf", {}, table) as file:
        for info in table:
            file.write(info.name, torch.zeros(1, 16, dtype=torch.uint8))
    assert len(syncs) == 3 + 3  # after every second tensor; before the check, after it, and the folder
