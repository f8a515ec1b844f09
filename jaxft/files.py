"""Writing so that nothing is half-written: output folders are checked first, files appear by renaming.

What is being written has a hidden name beside the final one. It is locked as long as its process lives, so that the
next process that writes the same thing removes what a killed one left, or goes on with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxft.errors import JaxftError

# One of these in a folder says that it is a checkpoint or an adapter, which `overwrite` may replace.
CHECKPOINT_FILES = ("config.json", "adapter_config.json", "jaxft_checkpoint.json")
_KEY = ".resume_key"  # in a temporary folder: the key of `new_folder`


def prepare_output_dir(path: str | Path, *, overwrite: bool = False) -> Path:
    """Creates `path`, or accepts it where it is an empty folder (with `overwrite`, any folder).

    Raises:
      JaxftError: it is a file, is not empty, or cannot be written to.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise JaxftError(path, "is a file, not a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not overwrite and any(path.iterdir()):
            raise JaxftError(path, "is not empty", "Choose another folder, or ask for overwriting")
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise JaxftError(path, f"cannot be written to ({error.strerror})") from error
    return path


@contextlib.contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False, resume_key: str = "") -> Iterator[Path]:
    """Yields a temporary folder beside `path` that becomes `path` at the end, or is removed on any exception.

    With `overwrite` an earlier checkpoint at `path` is replaced whole, and only then.

    Args:
      resume_key: where it is not empty, the folder may be the one that a killed process left with the same key, with
        what that had written.

    Raises:
      JaxftError: `path` is a file, is not empty, cannot be written to, or is to be overwritten but is no checkpoint.
    """
    existed = Path(path).exists()
    path = prepare_output_dir(path, overwrite=overwrite).resolve()  # a link's target, or "." by its name, is replaced
    if any(path.iterdir()) and not any((path / name).is_file() for name in CHECKPOINT_FILES):
        raise JaxftError(path, "is not empty and holds no checkpoint, so it is not replaced", "Choose another folder")
    with contextlib.ExitStack() as lock:
        temporary = _taken_up(path, resume_key, lock) or _made(path, lock)
        _remove_leftovers(path)
        try:
            with _disk_errors(path):
                if resume_key:
                    (temporary / _KEY).write_text(resume_key)
                yield temporary
                (temporary / _KEY).unlink(missing_ok=True)
                temporary.chmod(0o755)
                # Two renames: a process that is killed leaves all of the old checkpoint there, nothing, or all of the
                # new.
                old = temporary.with_name(f"{temporary.name}.old")
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
        except BaseException:
            if not existed and path.is_dir():
                path.rmdir()
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_files(folder: Path, *, resume_key: str = "", name: str = "") -> Iterator[Path]:
    """Yields a temporary folder in `folder`, into which its files move at the end; all of them or, on any exception,
    none. See `new_folder` for `resume_key`.

    Args:
      name: of the one file that it will be, for messages; empty for several.

    Raises:
      JaxftError: `folder` is a file, or cannot be written to.
    """
    existed = folder.exists()
    path = prepare_output_dir(folder, overwrite=True) / (name or "files")
    with contextlib.ExitStack() as lock:
        temporary = _taken_up(path, resume_key, lock) or _made(path, lock)
        _remove_leftovers(path)
        try:
            with _disk_errors(folder / name):
                (temporary / _KEY).write_text(resume_key)
                yield temporary
                (temporary / _KEY).unlink()
                for file in sorted(temporary.iterdir()):
                    file.replace(folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()


def _made(path: Path, lock: contextlib.ExitStack) -> Path:
    """A new temporary folder for `path`, locked."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise JaxftError(
            path.parent, f"cannot be written to ({error.strerror}), and {path.name} is made there"
        ) from error
    lock.enter_context(_locked(temporary))
    return temporary


@contextlib.contextmanager
def new_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary file name beside `path` that becomes `path` at the end, or is removed on any exception.

    Raises:
      JaxftError: `path` exists and is not to be overwritten, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise JaxftError(path, "exists already", "Choose another name, or ask for overwriting")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise JaxftError(path, f"cannot be written ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        with _locked(temporary), _disk_errors(path):
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock on a file or folder, which the system lifts when the process ends in whatever way."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _leftovers(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.????????")


def _taken_up(path: Path, key: str, lock: contextlib.ExitStack) -> Path | None:
    """The folder that a killed process left of writing `path` with the same key, locked; None without one."""
    for leftover in _leftovers(path) if key else ():
        with contextlib.suppress(OSError), contextlib.ExitStack() as own:  # OSError: somebody is writing it
            own.enter_context(_locked(leftover))
            if (leftover / _KEY).read_text() == key:
                lock.enter_context(own.pop_all())
                return leftover
    return None


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of earlier tries to write `path`."""
    for leftover in _leftovers(path):
        with contextlib.suppress(OSError), _locked(leftover):  # locked: somebody is writing it
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            shutil.rmtree(f"{leftover}.old", ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A full disk and its like, told as what they are."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise JaxftError(path, f"could not be written ({reason})", "Check the space that is left") from error
