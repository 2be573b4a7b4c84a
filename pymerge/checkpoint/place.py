"""Where the output may go, and how the finished folder gets there in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from pymerge import _C
from pymerge.checkpoint.header import safe_name
from pymerge.checkpoint.read import Checkpoint
from pymerge.errors import OutputError
from pymerge.remote.urls import is_collapsed

_MODEL_FILES = ("config.json", "merge.json", "model_index.json", "model.safetensors", "model.safetensors.index.json")


def real_output(out: str | os.PathLike[str]) -> Path:
    """The folder that `out` names, links followed: the staging folder must lie beside the real one, on its file
    system.

    Raises   OutputError for a URL."""
    if is_collapsed(os.fspath(out)):
        raise OutputError(
            f"{_shown(out)}: output is written to local folders: give one, and copy it there when the merge is done"
        )
    return Path(os.path.realpath(out))


def staging_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_output_path(
    out: str | os.PathLike[str], inputs: Iterable[Checkpoint | str | os.PathLike[str]] = (), *, overwrite: bool = False
) -> Path:
    """Refuse an output folder that holds something already (unless overwrite), or that is, contains or lies in an
    input.

    Paths are compared by what they are on disk, so links and bind mounts do not hide anything. Returns the real path.
    Raises   OutputError (S42, S43)."""
    target = real_output(out)
    if target.name == "":
        raise OutputError(f"{_shown(target)}: not a folder that a model can be written to")
    for path in _input_paths(inputs):
        for own in (target, staging_of(target)):
            if _is_inside(own, path):
                raise OutputError(
                    f"output {_shown(out)} is, or lies inside, the input {_shown(path)}; inputs are never changed"
                )
            if _is_inside(path, own):
                raise OutputError(f"output {_shown(out)} contains the input {_shown(path)}; inputs are never changed")
    check_free(target, overwrite)
    return target


def check_output_file(out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a file in place of one of an input: in a model's folder, an adapter's of `base+adapter`, or the file that
    the input is. A page (.html) is of no model, an earlier one may be replaced.

    Raises   OutputError."""
    target = real_output(out)
    if target.suffix == ".html" or not os.path.lexists(target):
        return
    for path in _parts(inputs):
        if _is_inside(target, path) or (path.is_dir() and _identity(target) in map(_identity, path.iterdir())):
            raise OutputError(
                f"output {_shown(out)} replaces a file of the input {_shown(path)}; inputs are never changed"
            )


def check_output_beside(folder: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a folder for several files that is, or lies inside, an input. Raises OutputError."""
    target = real_output(folder)
    for path in _parts(inputs):
        if _is_inside(target, path):
            raise OutputError(
                f"output {_shown(folder)} is, or lies inside, the input {_shown(path)}; inputs are never changed"
            )


def _parts(references: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """The paths of references that exist here."""
    for reference in references:
        text = os.fspath(reference)
        yield from (Path(part) for part in {text, *text.split("+")} if part and os.path.exists(part))


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that holds something: a model unless `overwrite`, anything else always."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"{_shown(target)}: exists and is not a folder")
    names = os.listdir(target)
    if not names:
        return
    is_model = holds_model(target)
    if not overwrite:
        what = "holds a model already" if is_model else "is not empty"
        raise OutputError(
            f"{_shown(target)}: {what}. Choose another output, or --overwrite to replace it when the merge is done"
        )
    if not is_model or os.path.ismount(target):
        raise OutputError(
            f"{_shown(target)}: --overwrite replaces the folder of a model, and this does not look like one"
        )


def holds_model(folder: Path) -> bool:
    """Whether files of a model are in a folder, if there is one."""
    names = os.listdir(folder) if folder.is_dir() else []
    return any(name in _MODEL_FILES or name.endswith(".safetensors") for name in names)


def replace_folder(staging: Path, target: Path) -> None:
    """Make `staging` become `target` in one step; what was there before is deleted afterwards.

    An existing model is exchanged with the new one (RENAME_EXCHANGE), so the name is never without a whole model. Where
    the file system has no exchange, the old folder is renamed out of the way first, and back if the second rename
    fails: for a moment the name is absent, but it is never half a model."""
    replaced = replaced_of(target)
    if not target.is_dir() or not os.listdir(target):
        os.rename(staging, target)  # onto nothing, or onto an empty folder
    else:
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(staging, replaced)
        if not _C.rename_exchange(str(replaced), str(target)):
            os.rename(replaced, staging)
            _replace_in_two_steps(staging, target, replaced)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replace_in_two_steps(staging: Path, target: Path, replaced: Path) -> None:
    os.rename(target, replaced)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(replaced, target)
        raise


def replaced_of(target: Path) -> Path:
    """Where the new model waits for the exchange and the old one for its deletion. While the target exists, whatever a
    killed process left there may be deleted: the old model that was replaced, or a new one that never took its
    place."""
    return target.with_name(f".{target.name}.pymerge-replaced")


def sync_folder(folder: Path) -> None:
    """fsync a directory: its entries are on disk when this returns."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folders(folder: Path) -> None:
    """fsync every directory below and including `folder`."""
    for parent, _, _ in os.walk(folder):
        sync_folder(Path(parent))


def sync_tree(folder: Path) -> None:
    """fsync every file and directory below and including `folder`."""
    for parent, _, files in os.walk(folder):
        for name in files:
            fd = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(parent))


def _input_paths(inputs: Iterable[Checkpoint | str | os.PathLike[str]]) -> Iterator[Path]:
    for item in inputs:
        if not isinstance(item, Checkpoint):
            yield Path(item)
        elif item.path is not None:
            yield item.path
            yield from (Path(os.path.realpath(f.path)) for f in item.files)


def _is_inside(path: Path, folder: Path) -> bool:
    """`path` is `folder` or lies below it, as far as it exists."""
    identity = _identity(folder)
    if identity is None:
        return False
    real = Path(os.path.realpath(path))
    return any(_identity(p) == identity for p in (real, *real.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _shown(path: str | os.PathLike[str]) -> str:
    return safe_name(os.fspath(path), 400)
