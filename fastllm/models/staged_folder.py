"""A folder of files that appears complete and checked, or not at all.

Everything is written into `.fastllm.partial` inside the target, synced and checked there, and only then renamed into
place. `config.json`, without which nobody loads the folder, goes first when an older model is replaced and comes back
last: a process that dies in between leaves a folder that is plainly not a model, never a mixture of two.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows refuses to replace files that somebody holds open
    fcntl = None

from .._errors import FastllmError, ModelError
from ..gguf.atomic import SaveError, sync_folder
from .checkpoints import INDEX_FILE, SINGLE_FILE, read_weight_map

_STAGING = ".fastllm.partial"
_SHARDS = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"
# What makes a folder loadable, in the order in which they are put in place.
_LAST = (INDEX_FILE, "adapter_config.json", "config.json")


@contextmanager
def staged_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to write into; what it holds at the end of the block replaces the files of the same names in `target`.

    Other files of the target stay, but for the weights of a model that is replaced. Raises `SaveError` before the
    first byte where `num_bytes` do not fit on the disk or another process writes there, and for every OSError inside.
    """
    created = not target.exists()
    staging = target / _STAGING
    lock, publishing = None, False
    try:
        target.mkdir(parents=True, exist_ok=True)
        _require_space(target, num_bytes)
        lock = _open_staging(staging)
        _empty(staging)
        yield staging
        _sync_files(staging)
        publishing = True
        _publish(staging, target)
        publishing = False
    except OSError as error:
        if isinstance(error, FastllmError):
            raise
        raise _described(error, target, staging if publishing else None) from error
    finally:
        if lock is not None:
            os.close(lock)
        if lock is not None and not publishing:
            shutil.rmtree(staging, ignore_errors=True)
        if created:
            with suppress(OSError):
                target.rmdir()  # only where nothing came of it


def _open_staging(staging: Path) -> int:
    """Create and lock the staging folder. Never through a link, never while another process holds it."""
    staging.mkdir(exist_ok=True)
    if staging.is_symlink():
        raise OSError(errno.ELOOP, "a link stands in the place of the folder for partial files", str(staging))
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(staging, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _empty(folder: Path) -> None:
    """Remove what a process that died has left."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(staging: Path, target: Path) -> None:
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    blocked = [file for file in files if (target / file).is_dir()]
    if blocked:
        raise OSError(errno.EISDIR, f"a folder is called {blocked[0]}", str(target))
    names = {file.name for file in files}
    if SINGLE_FILE in names or INDEX_FILE in names:
        _retire_model(target, keep=names)
    for file in sorted(files, key=lambda file: _LAST.index(file.name) if file.name in _LAST else -1):
        (target / file).parent.mkdir(exist_ok=True)
        if file.name in _LAST:
            sync_folder((target / file).parent)  # what this file speaks of is in place, whatever happens next
        os.replace(staging / file, target / file)
        if file.name in _LAST:
            sync_folder((target / file).parent)
    sync_folder(target)


def _retire_model(target: Path, keep: set[str]) -> None:
    """Make an older model unloadable, and remove those of its weights that the new one does not overwrite.

    The index, which says what those are, goes last, so that the next run can end what a process that died has begun.
    """
    (target / "config.json").unlink(missing_ok=True)
    sync_folder(target)
    old = {SINGLE_FILE, *(path.name for path in target.glob(_SHARDS))}
    with suppress(ModelError):  # no index, or one of a stranger: then its files are not known to be a model's
        old |= set(read_weight_map(target / INDEX_FILE).values())
    for name in old - keep:
        (target / name).unlink(missing_ok=True)
    (target / INDEX_FILE).unlink(missing_ok=True)


def _require_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes needed, {free:,} free", str(target))


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _described(error: OSError, target: Path, kept: Path | None) -> SaveError:
    remedies = {
        errno.ENOSPC: "free that much, or choose a folder on another disk",
        errno.EACCES: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that is not read-only",
        errno.EAGAIN: "another process is saving into this folder: wait for it, or choose another one",
        errno.EEXIST: "a file has this name: choose another one",
        errno.ENOTDIR: "a part of this path is a file: choose another one",
    }
    where = f"; the files that are not in place yet are complete in {kept}" if kept else ""
    described = SaveError(
        f"could not save: {error.strerror or error}{where}",
        where=str(target),
        fix=remedies.get(error.errno or 0, "see what is wrong with the disk, then run again"),
    )
    described.errno = error.errno
    return described
