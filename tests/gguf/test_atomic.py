"""A file under its final name is always whole: every write, sync and rename is made to fail, then to kill."""

import errno
import os
import stat

import pytest

from fastllm.gguf.atomic import SaveError, atomic_file

from .faults import fail_with, interrupt_at, killed_at

OLD, NEW = b"old content", [b"new ", b"content, ", b"longer than the old one"]


def save(path):
    with atomic_file(path, sum(map(len, NEW))) as file:
        offset = 0
        for part in NEW:
            file.write_at(offset, part)
            offset += len(part)


def partials(folder):
    return [entry.name for entry in folder.iterdir() if entry.name.endswith(".partial")]


def num_operations(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count = interrupt_at(patch, -1, lambda: None)
        save(tmp_path / "count")
    (tmp_path / "count").unlink()
    return count[0]


def test_a_new_file_and_a_replaced_one(tmp_path):
    for _ in range(2):
        save(tmp_path / "deep" / "a.gguf")
        assert (tmp_path / "deep" / "a.gguf").read_bytes() == b"".join(NEW)
        assert partials(tmp_path / "deep") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_each_operation_that_fails_leaves_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "a.gguf"
    total = num_operations(tmp_path, monkeypatch)
    assert total == len(NEW) + 4  # truncate, writes, sync of the file, rename, sync of the folder
    for k in range(1, total + 1):
        path.write_bytes(OLD)
        with monkeypatch.context() as patch:
            interrupt_at(patch, k, fail_with(code))
            with pytest.raises(SaveError, match=r"a\.gguf") as caught:
                save(path)
        assert caught.value.errno == code
        assert "fix:" in str(caught.value)
        # Only the sync of the folder comes after the rename.
        assert path.read_bytes() == (OLD if k < total else b"".join(NEW))
        assert partials(tmp_path) == []


def test_a_kill_at_each_operation_leaves_old_or_new_and_the_next_run_succeeds(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    for k in range(1, num_operations(tmp_path, monkeypatch) + 1):
        path.write_bytes(OLD)
        assert killed_at(monkeypatch, k, lambda: save(path))
        assert path.read_bytes() in (OLD, b"".join(NEW))
        save(path)
        assert path.read_bytes() == b"".join(NEW)
        assert partials(tmp_path) == []


def test_a_disk_without_room_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    written = interrupt_at(monkeypatch, -1, lambda: None)
    with pytest.raises(SaveError, match="bytes needed"), atomic_file(tmp_path / "a", 2**60):
        pytest.fail("the block must not start")
    assert written[0] == 2  # the empty partial file is truncated and removed
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_and_the_first_one_finishes(tmp_path):
    with atomic_file(tmp_path / "a", 4) as file:
        file.write_at(0, b"fine")
        with pytest.raises(SaveError, match="another process"):
            save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"fine"


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(OLD)
    (tmp_path / ".a.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(SaveError):
        save(tmp_path / "a")
    assert (tmp_path / "victim").read_bytes() == OLD


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(SaveError, match=r"choose a file name"):
        save(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_clear_error(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(SaveError, match="may write"):
        save(tmp_path / "a")
    tmp_path.chmod(stat.S_IRWXU)


def test_an_error_of_the_caller_passes_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_file(tmp_path / "a", 4):
        raise KeyError("x")
    assert list(tmp_path.iterdir()) == []
