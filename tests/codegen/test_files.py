"""Files that are there whole or not at all."""

from __future__ import annotations

import pytest

from fxopt.codegen.files import whole_file, write_whole


def test_a_failing_writer_leaves_the_earlier_file(tmp_path):
    path = write_whole(tmp_path / "a.json", "earlier")

    def fail() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "earlier"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_folder_that_is_not_one_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="Give a path in a folder"):
        write_whole(tmp_path / "file" / "a.json", "")
