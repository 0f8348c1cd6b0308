"""Extensions are found by their file name, and listing them imports nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pocketglm import registry
from pocketglm.errors import UsageError


@pytest.fixture
def method_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry of methods, which `pocketglm.methods` also imports from."""
    import pocketglm.methods

    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(registry, "_ROOT", tmp_path)
    monkeypatch.setattr(pocketglm.methods, "__path__", [str(folder)])
    return folder


def test_a_new_file_is_a_new_entry(method_folder: Path) -> None:
    (method_folder / "zz_new_method.py").write_text("SPEC = 'the new one'\n")
    (method_folder / "_helper.py").write_text("")
    (method_folder / "__init__.py").write_text("")
    (method_folder / "notes.txt").write_text("")
    assert registry.names("methods") == ["zz_new_method"]
    try:
        assert registry.load("methods", "zz_new_method") == "the new one"
    finally:
        sys.modules.pop("pocketglm.methods.zz_new_method")


@pytest.mark.parametrize(("kind", "word"), registry.KINDS.items())
def test_unknown_entry_names_the_kind_and_the_known_ones(kind: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.load(kind, "no such entry")
    assert caught.value.message == f"unknown {word} 'no such entry'"
    assert "known: " in caught.value.hint
    for name in registry.names(kind):
        assert name in caught.value.hint


def test_near_miss_is_guessed(method_folder: Path) -> None:
    (method_folder / "quantize_rtn.py").write_text("SPEC = 1\n")
    with pytest.raises(UsageError) as caught:
        registry.load("methods", "quantise_rtn")
    assert caught.value.hint.startswith("did you mean 'quantize_rtn'?")


@pytest.mark.parametrize("name", ["_helper", "__init__", "../errors", ""])
def test_helpers_and_paths_are_not_entries(name: str) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        registry.load("targets", name)


def test_listing_imports_no_entry() -> None:
    code = (
        "import sys; from pocketglm import registry\n"
        "for kind in registry.KINDS: registry.names(kind)\n"
        "print([m for m in sys.modules if m.startswith('pocketglm.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(done.stdout)) == {"pocketglm.registry", "pocketglm.errors"}
