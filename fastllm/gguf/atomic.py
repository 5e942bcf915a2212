"""A file that appears under its name whole or not at all.

The bytes go to `.<name>.partial` beside the target, are synced, and only then take the target's name; the folder is
synced after that, so that the name survives a power cut too. A process that dies leaves the partial file, which the
next run starts over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows refuses a second writer by itself: an open file can't be replaced there
    fcntl = None

from .._errors import FastllmError


class SaveError(FastllmError, OSError):
    """A file that could not be written. What stood under its name before is untouched."""


class AtomicFile:
    """The open partial file: `write_at` places bytes anywhere in it."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self.path = descriptor, path

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `offset`."""
        view = memoryview(data).cast("B")
        while len(view):
            done = _write(self._descriptor, view, offset)
            view, offset = view[done:], offset + done

    def sync(self) -> None:
        os.fsync(self._descriptor)


def _write(descriptor: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, data)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], num_bytes: int) -> Iterator[AtomicFile]:
    """Open a partial file for `path`; leaving the block without an error publishes it under that name.

    Raises `SaveError` before the first byte where `num_bytes` do not fit on the disk, the folder is not writable or
    another process writes the same file, and in place of any OSError inside the block.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has this name", str(target))
        partial = target.with_name(f".{target.name}.partial")
        descriptor = _open_partial(partial)
    except OSError as error:
        raise _described(error, target, num_bytes) from error
    try:
        os.ftruncate(descriptor, 0)
        require_space({target: num_bytes})
        file = AtomicFile(descriptor, partial)
        yield file
        file.sync()
        if os.name == "nt":  # Windows can't rename an open file
            os.close(descriptor)
            descriptor = -1
        os.replace(partial, target)
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and not isinstance(error, FastllmError):
            raise _described(error, target, num_bytes) from error
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _open_partial(partial: Path) -> int:
    """Open and lock the partial file. Never through a link, never while another process holds it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        descriptor = os.open(partial, flags, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that finished between open and lock has renamed this very file: then it is the target now.
            if _is_same_file(descriptor, partial):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def require_space(files: Mapping[Path, int]) -> None:
    """Raise `SaveError` where the disks do not have room for files of these sizes, all of them together."""
    needed: dict[int, int] = {}
    for path, num_bytes in files.items():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + num_bytes
        free = shutil.disk_usage(folder).free
        if needed[disk] > free:
            error = OSError(errno.ENOSPC, f"{needed[disk]:,} bytes needed, {free:,} free", str(path))
            raise _described(error, path, needed[disk]) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(error: OSError, target: Path, num_bytes: int) -> SaveError:
    remedies = {
        errno.ENOSPC: f"free {num_bytes:,} bytes in {target.parent}, or choose another folder or a smaller type",
        errno.EACCES: f"choose a folder that you may write to instead of {target.parent}",
        errno.EROFS: f"choose a folder that is not read-only instead of {target.parent}",
        errno.EAGAIN: "another process is writing this file: wait for it, or choose another name",
        errno.EISDIR: "choose a file name, for example model.gguf inside that folder",
    }
    fix = remedies.get(error.errno or 0, f"see what is wrong with the disk that holds {target.parent}, then run again")
    described = SaveError(f"could not write the file: {error.strerror or error}", where=str(target), fix=fix)
    described.errno = error.errno
    return described
