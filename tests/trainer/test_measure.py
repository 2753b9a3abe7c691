"""What maskdiff.measure says of the code that was measured."""

import shutil
import subprocess

import pytest

from maskdiff import measure

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def test_no_git_is_no_revision(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.commit() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_revision_is_that_of_maskdiff_alone(tmp_path, monkeypatch):
    """Not that of the repository in whose folder it happens to be installed."""

    def git(*arguments: str) -> str:
        return subprocess.run([*GIT, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    path = tmp_path / "site-packages" / "maskdiff" / "measure.py"
    path.parent.mkdir(parents=True)
    shutil.copy(measure.__file__, path)
    monkeypatch.setattr(measure, "__file__", str(path))
    (tmp_path / "theirs").write_text("1")
    git("init", "--quiet")
    git("add", "theirs")
    git("commit", "--quiet", "-m", "theirs")
    assert measure.commit() is None
    git("add", ".")
    git("commit", "--quiet", "-m", "ours")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    assert measure.commit() == head
    (path.parent / "notes.md").write_text("no code")
    git("add", ".")
    assert measure.commit() == head
    path.write_text(path.read_text() + "\n")
    assert measure.commit() == f"{head}-dirty"
