"""A saved adapter's two files, and changes to them by hand."""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "model.layers.0.self_attn.q_proj"
FIRST = f"base_model.model.{LAYER}.secura_adapter."
"""What the names of the first layer's tensors begin with."""


def rewrite(folder, change) -> None:
    """Change the tensors in place of their dict, or by the other dict that ``change`` gives."""
    state = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    given = change(state)
    (folder / WEIGHTS).unlink()
    save_file(given if isinstance(given, dict) else state, folder / WEIGHTS)


def edit(folder, **changes) -> None:
    """Change entries of the config."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
