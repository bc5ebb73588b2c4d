"""The package's directory: made beside its place, moved there when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError
from .manifest import NAME


@contextmanager
def new_package(target: Path, *, force: bool) -> Iterator[Path]:
    """Gives an empty directory to fill; it becomes `target` when the block ends without an error.

    Until then `target` is as it was. An existing `target` is refused unless `force`, and then only a package or an
    empty directory is replaced. Whatever ends the block early, the unfinished directory is removed; one that a killed
    process leaves is called `TARGET.partial-*` and has no manifest, so nothing opens it.
    """
    target = Path(os.path.abspath(target))
    _check(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for directory in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
            _sync(directory)
        _check(target, force)
        _move(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)


def _check(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ExportError(f"{target} exists; give another directory, or --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise ExportError(f"{target} is no directory, --force replaces packages only; give another path")
    if any(target.iterdir()) and not (target / NAME).is_file():
        raise ExportError(f"{target} is no package (it has no {NAME}), --force replaces packages only; remove it first")


def _move(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{target.name}.old-", dir=target.parent))
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there, and a rename is durable without it
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
