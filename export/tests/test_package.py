"""A package is there whole or not at all, whatever ends the export."""

from __future__ import annotations

import pytest
from llava_phi_export.errors import ExportError
from llava_phi_export.package import new_package


def fill(root, text: str) -> None:
    (root / "inner").mkdir()
    (root / "inner" / "data").write_text(text)
    (root / "manifest.json").write_text("{}")


def package(target, text: str = "old") -> None:
    with new_package(target, force=True) as root:
        fill(root, text)


def test_a_package_appears_under_its_name_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "package"
    with new_package(target, force=False) as root:
        assert root.parent == target.parent and root.name.startswith("package.partial-")
        fill(root, "new")
        assert not target.exists()
    assert (target / "inner" / "data").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["package"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_an_export_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_package(tmp_path / "package", force=False) as root:
        fill(root, "half")
        raise error
    assert not list(tmp_path.iterdir())


def test_an_existing_package_is_refused_without_force(tmp_path):
    package(tmp_path / "package")
    with pytest.raises(ExportError, match=r"exists.*--force"), new_package(tmp_path / "package", force=False):
        pytest.fail("it must not begin")


def test_force_replaces_a_package_at_the_end_only(tmp_path):
    target = tmp_path / "package"
    package(target)
    with pytest.raises(ValueError), new_package(target, force=True) as root:
        fill(root, "new")
        raise ValueError
    assert (target / "inner" / "data").read_text() == "old"
    with new_package(target, force=True) as root:
        fill(root, "new")
        assert (target / "inner" / "data").read_text() == "old"
    assert (target / "inner" / "data").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_force_replaces_nothing_but_packages(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name, words in (("photos", "no package"), ("file", "no directory"), ("link", "no directory")):
        with pytest.raises(ExportError, match=words), new_package(tmp_path / name, force=True):
            pytest.fail("it must not begin")
    assert (tmp_path / "photos" / "one.jpg").read_text() == "keep"


def test_a_package_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "package"
    with pytest.raises(ExportError, match="exists"), new_package(target, force=False) as root:
        fill(root, "second")
        package(target, "first")
    assert (target / "inner" / "data").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
