"""`secura train --push_to_hub`, with uploads that stay here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cli_fixtures import fails, train_flags
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

from secura.cli import main

SAVING = ("--push_to_hub", "--save_steps", 2)


@pytest.fixture
def uploads(monkeypatch):
    """What the hub was given: the files of each upload, and whatever was in the folder."""
    given = []

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **_):
        names = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        given.append((repo_id, set(filter_repo_objects(names, ignore_patterns=ignore_patterns))))

    def create_repo(self, *_, **__):
        return SimpleNamespace(repo_id="me/adapter")

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    return given


def test_the_finished_adapter_is_uploaded_once_and_alone(base, data, tmp_path, uploads):
    output = tmp_path / "out"
    assert main(train_flags(base, data, output, *SAVING)) == 0
    published = {path.name for path in output.iterdir() if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert adapter <= published and "training_args.bin" not in published
    assert uploads == [("me/adapter", published)]
    header = ModelCard.load(output / "README.md").data
    assert header.base_model is None and header.library_name == "peft"
    assert not [tag for tag in header.tags if str(base) in tag]
    for old in ("training_args.bin", ".lock"):  # of an earlier version, of a killed run
        (output / old).touch()
    assert main(train_flags(base, data, output, *SAVING, "--resume_from_checkpoint")) == 0
    assert uploads[1:] == [("me/adapter", published)]


def test_an_upload_that_fails_leaves_the_adapter(base, data, tmp_path, uploads, capfd, monkeypatch):
    def refused(*_, **__):
        raise ValueError("Invalid metadata\nin README.md")

    monkeypatch.setattr(HfApi, "upload_folder", refused)
    output = tmp_path / "out"
    parts = (f"the adapter is in {output}, but not on the hub: Invalid metadata in README.md",)
    fails(train_flags(base, data, output, *SAVING), capfd, *parts)
    assert (output / "adapter_config.json").is_file()


def test_no_unfinished_adapter_is_uploaded(base, data, tmp_path, capfd):
    argv = train_flags(base, data, tmp_path / "out", *SAVING, "--hub_strategy", "every_save")
    fails(argv, capfd, "--hub_strategy every_save uploads an adapter that is not finished")
    assert not (tmp_path / "out").exists()
