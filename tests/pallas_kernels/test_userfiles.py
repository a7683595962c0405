"""Folders and files of machine code: this user's alone, whole or not there."""

import os
import resource
from pathlib import Path

import pytest

from pallas_kernels import userfiles


@pytest.fixture
def as_another():
    """What is on disk belongs to somebody else, who is not root."""

    def status(mode: int) -> os.stat_result:
        return os.stat_result((mode, 1, 1, 1, os.getuid() + 1, 1, 1, 1, 1, 1))

    return status


@pytest.mark.parametrize(("mode", "safe"), [(0o700, True), (0o755, True), (0o775, False), (0o702, False)])
def test_who_may_write(tmp_path, mode, safe):
    folder = tmp_path / "f"
    folder.mkdir()
    folder.chmod(mode)
    assert userfiles.is_safe(folder.stat()) is safe


def test_what_others_own_is_not_safe(as_another):
    assert not userfiles.is_safe(as_another(0o40700))


def test_a_folder_is_made_for_its_user_alone(tmp_path):
    made = userfiles.make_folder(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_write_to_is_refused_with_what_to_do(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(userfiles.UnsafeError, match=r"mode 777.*empty it and chmod 700"):
        userfiles.make_folder(tmp_path)


def test_a_folder_of_another_user_is_refused_with_what_to_do(tmp_path, as_another, monkeypatch):
    monkeypatch.setattr(Path, "stat", lambda self, **_: as_another(0o40777))
    with pytest.raises(userfiles.UnsafeError, match=rf"name one of your own, such as {tmp_path}/"):
        userfiles.make_folder(tmp_path)


def test_a_file_that_others_write_to_is_not_read(tmp_path):
    file = tmp_path / "f"
    userfiles.write(file, b"x")
    assert userfiles.read(file) == b"x"
    file.chmod(0o666)
    with pytest.raises(userfiles.UnsafeError, match="mode 666"):
        userfiles.read(file)


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path):
    """A limit on file sizes fails a write as a full disk does: after a part of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            userfiles.write(tmp_path / "f", b"x" * 500_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "f"
    userfiles.write(file, b"old")
    with open(file, "rb") as reader:
        userfiles.write(file, b"new")
        assert reader.read() == b"old"
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


class TestCacheFolder:
    @pytest.fixture(autouse=True)
    def places(self, tmp_path, monkeypatch):
        self.home, self.temporary = tmp_path / "home", tmp_path / "temporary"
        self.home.mkdir()
        self.temporary.mkdir()
        monkeypatch.setattr(userfiles.tempfile, "gettempdir", lambda: str(self.temporary))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(self.home))

    def test_in_the_home(self):
        assert userfiles.cache_folder("a/b") == self.home / ".cache" / "a" / "b"
        assert list(self.temporary.iterdir()) == []

    def test_as_xdg_says(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert userfiles.cache_folder("a") == tmp_path / "xdg" / "a"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
        assert userfiles.cache_folder("a") == self.home / ".cache" / "a"

    def in_temporary(self) -> Path:
        return self.temporary / f"cache-{os.getuid()}" / "a"

    def test_without_a_home_and_an_unknown_user(self, monkeypatch):
        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
        assert userfiles.cache_folder("a") == self.in_temporary()
        assert userfiles.cache_folder("a") == self.in_temporary()  # the same for the next process
        assert len(list(self.temporary.iterdir())) == 1

    def test_a_home_that_cannot_be_written(self):
        (self.home / ".cache").write_text("not a folder")
        assert userfiles.cache_folder("a") == self.in_temporary()

    def test_a_home_that_others_write_to(self):
        userfiles.make_folder(self.home / ".cache" / "a").chmod(0o777)
        assert userfiles.cache_folder("a") == self.in_temporary()

    def test_a_folder_that_somebody_has_laid_there(self, tmp_path):
        (self.home / ".cache").write_text("not a folder")
        laid = self.temporary / f"cache-{os.getuid()}"
        laid.mkdir()
        laid.chmod(0o777)
        assert userfiles.cache_folder("a") is None
        laid.rmdir()
        (tmp_path / "elsewhere").mkdir()
        laid.symlink_to(tmp_path / "elsewhere")
        assert userfiles.cache_folder("a") is None
