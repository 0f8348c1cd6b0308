"""Licence and base model of a downloaded folder."""

from __future__ import annotations

from pathlib import Path

from pocketglm.artifacts.origin import origin_of


def test_licence_and_base_model_are_read_where_they_are_stated(tmp_path: Path) -> None:
    assert origin_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\nwords --- more")
    (tmp_path / "config.json").write_text('{"_name_or_path": "c/d"}')
    assert origin_of(tmp_path) == {"license": "mit", "base_model": "a/b"}
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert origin_of(tmp_path) == {"base_model": "c/d"}
    (tmp_path / "config.json").write_text('{"_name_or_path": "/home/me"}')
    assert origin_of(tmp_path) == {}
