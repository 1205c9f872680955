"""The namespace of the ops.

kernel-builder puts a file of this name, with a namespace of its own, in this one's place, so that
several versions of the package can be in one process.
"""

import torch

_OPS_NAME = "secura"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """``namespace::op_name``."""
    return f"{_OPS_NAME}::{op_name}"


__all__ = ["add_op_namespace_prefix", "ops"]
