"""README and docs: links lead somewhere, code compiles or runs, shown flags are the parsers'."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from datasets import Dataset

import secura
from secura.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)
TOLD = [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")]
"""Pages of what holds now: a log's commands are those of its day."""

ANOTHERS = {"--max-lora-rank"}
"""Flags of programs that are none of ours."""


LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?!\w+:)([^)\s]+)\)")
BLOCK = re.compile(r"(?P<run><!-- run -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The names GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    for link in LINK.findall(BLOCK.sub("", text(page))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page():
    linked = {link.partition("#")[0] for link in LINK.findall(text(ROOT / "README.md"))}
    assert {name(page) for page in PAGES} - {"README.md"} <= linked
    assert len(text(ROOT / "README.md").splitlines()) <= 150


def blocks(kind: str) -> list:
    return [
        pytest.param(match["code"], bool(match["run"]), id=f"{name(page)}-{number}")
        for page in TOLD
        for number, match in enumerate(BLOCK.finditer(text(page)))
        if match["kind"] == kind
    ]


@pytest.mark.parametrize(("code", "runs"), blocks("python"))
def test_python_blocks_compile_and_those_marked_run(code, runs, tmp_path, monkeypatch):
    compiled = compile(code, "block", "exec")
    if not runs:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    rows = tiny.tokens(4, 8).tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    exec(compiled, {"model": tiny.llama(hidden=128), "dataset": dataset})


def test_some_blocks_run():
    assert sum(block.values[1] for block in blocks("python")) >= 2


def command_lines(page: Path) -> Iterator[str]:
    """The lines of indented and `sh` blocks, and code spans, that run `secura` or a module."""
    plain = text(page)
    shell = [match["code"] for match in BLOCK.finditer(plain) if match["kind"] in ("sh", "")]
    prose = BLOCK.sub("", plain)
    shell += re.findall(r"^    .+$(?:\n    .+$)*", prose, re.M)
    lines = [line for part in shell for line in part.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        line = line.strip().removeprefix("accelerate launch -m secura.cli ").strip()
        if re.match(r"secura (?!.*COMMAND)|python -m benchmarks\.", line):
            yield line


def commands() -> list:
    """Each shown command once, as its words up to a pipe, a redirection or a comment."""
    found = {}
    for page in TOLD:
        if page.name == "results.md":  # its commands stand in results of their day
            continue
        for line in command_lines(page):
            words = shlex.split(line, comments=True)
            stop = next((i for i, word in enumerate(words) if word in ("<", ">", "|", "…")), None)
            found.setdefault(tuple(words[:stop]), f"{name(page)}: {line[:60]}")
    return [pytest.param(words, id=where) for words, where in found.items()]


def entry(program: str) -> Any:
    """What runs a command of `secura`, or a module with `python -m`; None where there is none."""
    if program in COMMANDS:
        return lambda words: main([program, *words])
    for module in (f"{program}.__main__", program):
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module) and hasattr(
                importlib.import_module(module), "main"
            ):
                return importlib.import_module(module).main
    return None


@cache
def flags_of(program: str, words: tuple[str, ...] = ()) -> set[str]:
    """Every flag in a program's help, after `words`: names of what it has of commands."""
    run, said = entry(program), io.StringIO()
    assert run is not None, f"{program} is no command"
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        run([*words, "--help_all" if program == "train" else "--help"])
    return set(re.findall(r"--[a-zA-Z][\w-]*", said.getvalue()))


@pytest.mark.parametrize("words", commands())
def test_shown_flags_exist(words):
    words = [word for word in words if word != "--traceback"]
    program, *rest = words[2:] if words[0] == "python" else words[1:]
    if words == ["secura", "--help"]:
        return
    first = next((place for place, word in enumerate(rest) if word.startswith("-")), len(rest))
    shown = {word.partition("=")[0] for word in rest if re.match(r"--\w", word)}
    own = {"--config", "--help_all"} if program == "train" else set()
    assert shown <= flags_of(program, tuple(rest[:first])) | own


def test_flags_named_in_prose_exist():
    known = set().union(*map(flags_of, COMMANDS)) | {"--config", "--traceback", "--help_all"}
    for page in TOLD:
        if page.parent.name != "benchmarks" and page.name != "results.md":
            spans = re.findall(r"`(--[a-zA-Z][\w-]*)", BLOCK.sub("", text(page)))
            assert set(spans) <= known | ANOTHERS, page


def test_commands_are_found():
    programs = {param.values[0][:2] for param in commands()}
    assert {("secura", command) for command in ("train", "generate", "merge", "export_lora")} <= (
        programs
    )


def test_pages_that_the_code_cites_are_there():
    cited = re.compile(r"\b(docs/\w+\.md)(?:, \"([^\"]+)\")?")
    for package in ("secura", "secura_kernels", "benchmarks", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            for page, heading in cited.findall(text(path)):
                headings = re.findall(r"^#+ (.+)$", text(ROOT / page), re.M)
                assert not heading or heading in headings, f"{path}: {page}, {heading}"


def test_versions_agree():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text(ROOT / "constraints.txt"), re.M))
    hooks = yaml.safe_load(text(ROOT / ".pre-commit-config.yaml"))["repos"]
    assert hooks[0]["rev"] == f"v{pins['ruff']}"
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    ci = yaml.safe_load(text(ROOT / ".github" / "workflows" / "ci.yml"))
    pythons = ci["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={pythons[0]}"
    assert str(yaml.safe_load(text(ROOT / "CITATION.cff"))["version"]) == secura.__version__
