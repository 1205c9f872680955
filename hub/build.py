"""Write ``secura_kernels`` as a project of Hugging Face's kernel-builder, and its local builds.

    python hub/build.py OUT

    OUT/build.toml, OUT/flake.nix, OUT/torch-ext/secura_kernels   what kernel-builder takes
    OUT/build/torch-{cpu,cuda,rocm}          what ``kernels.get_local_kernel(OUT)`` chooses from

A build is the package with a namespace of its own for its ops, made of the sources' hash, so that
several versions can be in one process. ``inspection``, which serves tests and the command line, is
left out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "secura_kernels"


def build(out: Path) -> None:
    """Write project and builds into the new or empty folder ``out``."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} is no empty folder: choose another")
    project = out / "torch-ext" / SOURCE.name
    shutil.copytree(SOURCE, project, ignore=shutil.ignore_patterns("__pycache__", "inspection"))
    for name in ("build.toml", "flake.nix"):
        shutil.copy(HERE / name, out)
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    unique = _hash(project)
    for backend in general["backends"]:
        identifier = f"_{SOURCE.name}_{backend}_{unique}"
        variant = out / "build" / f"torch-{backend}"
        shutil.copytree(project, variant)
        ops = variant / "_ops.py"
        ops.write_text(ops.read_text().replace('"secura"', f'"{identifier}"'))
        about = {key: general[key] for key in ("name", "version", "license")}
        about |= {"id": identifier, "python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


def _hash(folder: Path) -> str:
    """Seven digits of a sum over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:7]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} OUT")
    build(Path(sys.argv[1]))
