"""Publishing over an older adapter, killed at every step: what is there is the old or the new."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from secura import folders

FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
STEPS = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "shutil")
KILLED = 9


def fill(output: Path) -> Path:
    """A folder with an older adapter, a checkpoint, notes, and a newer adapter in its scratch."""
    (output / "checkpoint-2").mkdir(parents=True)
    scratch = output / folders.SCRATCH
    scratch.mkdir()
    for name in FILES:
        (output / name).write_text("old")
        (scratch / name).write_text("new")
    (output / "README.md").write_text("old")
    (output / "checkpoint-2" / "optimizer.pt").write_text("state")
    (output / "notes").symlink_to("checkpoint-2")
    (output / folders.LOCK).touch()
    return output


def killed_at(step: int, output: Path) -> bool:
    """Publish in a process of its own, which ends at once before its ``step``-th change."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(STEPS):
                left -= 1
                if left < 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        folders.move_out(output / folders.SCRATCH, output)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def content(output: Path) -> set[str]:
    return {(output / name).read_text() if (output / name).exists() else "none" for name in FILES}


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange is Linux's")
def test_a_kill_leaves_the_old_or_the_new(tmp_path):
    seen, step, killed = [], 0, True
    while killed:
        output = fill(tmp_path / str(step) / "adapter")
        (output / folders.LOCK).chmod(0o600)
        inode = output.joinpath(folders.LOCK).stat().st_ino
        killed = killed_at(step, output)
        seen.append(content(output))
        assert len(seen[-1]) == 1
        assert (output / "notes" / "optimizer.pt").read_text() == "state"
        assert (output / "notes").is_symlink()
        assert (output / "README.md").read_text() == "old"
        assert output.joinpath(folders.LOCK).stat().st_ino == inode  # the lock that a run holds
        scratch = output / folders.SCRATCH
        folders.clear(scratch)
        scratch.mkdir()  # the next run's, which clears what this one left
        (scratch / FILES[0]).write_text("newer")
        folders.move_out(scratch, output)
        assert (output / FILES[0]).read_text() == "newer"
        assert [path.name for path in output.parent.iterdir()] == ["adapter"]
        step += 1
    assert step > 10
    assert seen == sorted(seen, reverse=True, key=lambda found: found == {"old"})
    assert seen[0] == {"old"}
    assert seen[-1] == {"new"}


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("mode", [0o700, 0o2775])
def test_a_folder_keeps_its_mode(mode, tmp_path):
    output = fill(tmp_path / "adapter")
    output.chmod(mode)
    folders.move_out(output / folders.SCRATCH, output)
    assert content(output) == {"new"}
    assert stat.S_IMODE(output.stat().st_mode) == mode


@pytest.mark.parametrize("last", ["config.json", "adapter_config.json"])
def test_a_configuration_comes_last_into_an_empty_folder(last, tmp_path, monkeypatch):
    moved, replace = [], os.replace
    by_name = lambda folder: iter(sorted(folder / name for name in os.listdir(folder)))  # noqa: E731
    monkeypatch.setattr(Path, "iterdir", by_name)
    monkeypatch.setattr(os, "replace", lambda *of: moved.append(of[1].name) or replace(*of))
    with folders.complete_folder(tmp_path) as made:
        for name in (last, "model.safetensors", "tokenizer.json"):
            (made / name).touch()
    assert len(moved) == 3 and moved[-1] == last


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("empty", [False, True], ids=["new", "empty"])
def test_a_folder_within_has_the_modes_of_the_umask_too(empty, tmp_path):
    output = tmp_path / "out"
    if empty:
        output.mkdir()
    before = os.umask(0o027)
    try:
        with folders.complete_folder(output) as made:
            (made / "templates").mkdir(mode=0o700)
            (made / "templates" / "chat.jinja").touch(mode=0o600)
    finally:
        os.umask(before)
    found = [output / "templates", output / "templates" / "chat.jinja"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in found] == [0o750, 0o640]


@pytest.mark.parametrize("kind", ["current", "linked", "no links"])
def test_no_mixture_of_two_is_ever_loaded(kind, tmp_path, monkeypatch):
    step, killed = 0, True
    while killed:
        output = fill(tmp_path / str(step) / "adapter")
        if kind == "linked":
            (output.parent / "link").symlink_to("adapter")
            output = output.parent / "link"
        elif kind == "no links":
            monkeypatch.setattr(os, "link", refuse)
        else:
            monkeypatch.chdir(output)
        killed = killed_at(step, output)
        found = content(output)
        assert len(found) == 1 or not (output / FILES[0]).exists()
        assert (output / "notes" / "optimizer.pt").read_text() == "state"
        step += 1
    assert found == {"new"}
    assert not (output / folders.SCRATCH).exists()
    assert output.is_symlink() is (kind == "linked")


def refuse(*_: object, **__: object) -> None:
    raise PermissionError("no links here")


@pytest.mark.parametrize("older", [False, True])
def test_what_an_older_adapter_had_goes_with_it_and_nothing_else(older, tmp_path):
    output = fill(tmp_path / "out")
    (output / folders.SCRATCH / "tokenizer.json").unlink()
    (output / "chat_template.jinja").write_text("old")
    (output / "vocab.json").mkdir()  # no file of a tokenizer's
    if not older:
        (output / "adapter_config.json").unlink()
    replaces = ("chat_template.jinja", "tokenizer.json", "vocab.json", "merges.txt")
    folders.move_out(output / folders.SCRATCH, output, replaces=replaces)
    assert (output / "chat_template.jinja").exists() == (not older)
    assert (output / "tokenizer.json").exists() == (not older)
    assert (output / "vocab.json").is_dir() and (output / "README.md").is_file()
    assert (output / "adapter_config.json").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange is Linux's")
def test_publishing_leaves_alone_what_a_sibling_is_publishing(tmp_path):
    """Of a folder whose name goes on where this one's ends; what a killed run left here goes."""
    output = fill(tmp_path / "run")
    sibling, left = (tmp_path / f".{name}-ab3_defg.saving" for name in ("run-lr2", "run"))
    for folder in (sibling, left):
        (folder / "checkpoint-2").mkdir(parents=True)
    folders.move_out(output / folders.SCRATCH, output)
    assert content(output) == {"new"}
    assert (sibling / "checkpoint-2").is_dir() and not left.exists()
