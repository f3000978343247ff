"""The cache holds whole files or none, and never serves a damaged one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from innerloop.tasks._cache import Arrays, atomic_write, cache_folder, cached_arrays


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make() -> Callable[[], Arrays]:
    made: list[int] = []

    def make() -> Arrays:
        made.append(len(made))
        return {"numbers": np.arange(1000) + len(made), "names": np.array(["a", "bc"])}

    return make


def test_the_folder_is_the_users_own_unless_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert cache_folder() == folder
    monkeypatch.delenv("INNERLOOP_CACHE")
    assert cache_folder() == Path(platformdirs.user_cache_dir("innerloop"))


def test_arrays_are_made_once(folder: Path, make: Callable[[], Arrays]) -> None:
    first, second = cached_arrays("set.npz", make), cached_arrays("set.npz", make)
    assert first["numbers"][0] == second["numbers"][0] == 1
    assert all(np.array_equal(first[name], second[name]) for name in ("numbers", "names"))
    assert [path.name for path in folder.iterdir()] == ["set.npz"]


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_a_damaged_file_is_made_again(folder: Path, make: Callable[[], Arrays], damage: str) -> None:
    cached_arrays("set.npz", make)
    content = (folder / "set.npz").read_bytes()
    altered = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    (folder / "set.npz").write_bytes({"truncated": content[:-10], "altered": altered, "emptied": b""}[damage])
    assert cached_arrays("set.npz", make)["numbers"][0] == 2
    assert cached_arrays("set.npz", make)["numbers"][0] == 2


def test_without_a_folder_to_write_arrays_are_made_with_a_warning(folder: Path, make: Callable[[], Arrays]) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"could not keep .*set\.npz.*set INNERLOOP_CACHE"):
        arrays = cached_arrays("set.npz", make)
    assert arrays["numbers"][0] == 1


def test_a_failed_write_leaves_nothing(folder: Path) -> None:
    folder.mkdir()
    (folder / "kept").write_text("before")

    def write() -> None:
        with atomic_write(folder / "kept") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_text() == "before"
