"""What an adapter adds to a training step on many GPUs, counted: sent, held, passed over.

    python -m benchmarks.scale             # the table of docs/scale.md

Nothing here was timed, and no GPU was used. Sent are the collectives of :func:`added`, which
``tests/processes/test_tensor_parallel.py`` holds against what two processes send. With s bytes a
number, m SECURA's rank, r LoRA's and T tokens:

| set-up | SECURA (m, inner rank 2 m)                  | LoRA (PEFT's)     |
|--------|---------------------------------------------|-------------------|
| DDP    | all-reduce of 4 m² s a layer                | of r (N + K) s    |
| FSDP2  | 2 all-gathers, 1 reduce-scatter of the same | the same          |
| TP, N  | 2 all-reduces of T m s, one of 4 m² bytes   | one of T r s      |
| TP, K  | nothing                                     | one of T r s      |

FSDP2's all-gathers are sent together with the frozen block's; its reduce-scatter is the adapter's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from . import markdown
from .shapes import MODELS, M, ModelShape, R

NODE = 8
"""GPUs that NVLink joins; others are reached over the network."""
TOKENS, ITEMSIZE = 8192, 2
GPU_BYTES = 75 * 2**30
"""Of an 80 GB GPU, what weights may take."""
METHODS = ("lora", "secura channel")
SETUPS = ("DDP", "FSDP2", "TP 8")
LAUNCHES = {"lora": 10, "secura channel": 11}
"""Of a layer's step beyond the frozen layer's: products, passes and kernels; no casts."""
_SHARE = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}
_CORE_ITEMSIZE = 4


class Linear(NamedTuple):
    """An adapted layer ``K → N``, and whether tensor parallelism splits its N or its K."""

    n: int
    k: int
    splits: str


class Collective(NamedTuple):
    """One kind of collective of a step.

    Attributes:
        kind: ``"all-reduce"``, ``"all-gather"`` or ``"reduce-scatter"``.
        bytes: of the whole tensor, which is reduced, gathered or scattered.
        calls: how often; 0 where it is sent together with one of the frozen model.
        times: how often those bytes are sent.
    """

    kind: str
    bytes: int
    calls: int
    times: int = 1


def block(shape: ModelShape) -> list[Linear]:
    """The linear layers of one decoder block."""
    return [
        Linear(projection.n, projection.k, "K" if name in ("o", "down") else "N")
        for projection in shape.projections()
        for name in projection.name.split("+")
    ]


def trained(method: str, layer: Linear, m: int, r: int) -> int:
    """Trained numbers of one layer: A and B of SECURA's core, or LoRA's."""
    return r * (layer.n + layer.k) if method == "lora" else 4 * m * m


def added(
    setup: str, method: str, layers: Iterable[Linear], m: int, r: int, t: int, itemsize: int
) -> Iterator[Collective]:
    """What a step of one decoder block sends beyond the frozen model's, forward and backward.

    Args:
        setup: ``"DDP"``, ``"FSDP2"`` or ``"TP"``.
        method: of ``METHODS``.
        layers: the block's.
        m, r: SECURA's rank and LoRA's.
        t: tokens of the step.
        itemsize: bytes a number, of adapters and activations.
    """
    layers = list(layers)
    held = itemsize * sum(trained(method, layer, m, r) for layer in layers)
    if setup == "DDP":
        yield Collective("all-reduce", held, 1)
    elif setup == "FSDP2":
        yield Collective("all-gather", held, 0, times=2)
        yield Collective("reduce-scatter", held, 1)
    elif method == "lora":
        yield Collective("all-reduce", itemsize * t * r, len(layers), times=len(layers))
    else:
        count = sum(layer.splits == "N" for layer in layers)
        yield Collective("all-reduce", itemsize * t * m, 2 * count, times=2 * count)
        yield Collective("all-reduce", _CORE_ITEMSIZE * m * m, count, times=count)


def sent(collective: Collective, gpus: int) -> tuple[float, float]:
    """Bytes that a GPU sends over NVLink and over the network, by rings.

    Of a ring's links in a node, one leaves it.
    """
    share = _SHARE[collective.kind] * (gpus - 1) / gpus * collective.times * collective.bytes
    network = share / min(gpus, NODE) if gpus > NODE else 0.0
    return share - network, network


class Cost(NamedTuple):
    """What an adapter adds on a GPU in a step: bytes, but for ``calls`` and ``launches``."""

    nvlink: float
    network: float
    calls: int
    launches: int
    state: float
    kept: float
    passed: float


def cost(shape: ModelShape, setup: str, gpus: int, method: str) -> Cost | None:
    """The costs of ``method`` on every linear layer, or None where the weights do not fit.

    ``TP 8`` splits every layer over a node, and shards over the nodes by FSDP2.
    """
    tensor = NODE if setup == "TP 8" else 1
    replicas = gpus // tensor
    layers = block(shape)
    weights = ITEMSIZE * shape.layers * sum(layer.n * layer.k for layer in layers)
    if weights / (1 if setup == "DDP" else gpus) > GPU_BYTES:
        return None
    numbers = (M, R, TOKENS, ITEMSIZE)
    moves = []
    if tensor > 1:
        moves += [(one, tensor, 1) for one in added("TP", method, layers, *numbers)]
    if replicas > 1:
        over = "DDP" if setup == "DDP" else "FSDP2"
        here = [_part(layer, tensor) for layer in layers] if method == "lora" else layers
        moves += [(one, replicas, tensor) for one in added(over, method, here, *numbers)]
    nvlink = network = 0.0
    calls = 0
    for one, group, apart in moves:
        near, far = sent(one, group) if apart == 1 else (0.0, sum(sent(one, group)))
        nvlink, network, calls = nvlink + near, network + far, calls + one.calls
    calls *= shape.layers
    if setup == "DDP":  # in buckets, over all blocks
        calls = -(-shape.layers * moves[0][0].bytes // (25 * 2**20))
    shards = 1 if setup == "DDP" else replicas
    depth = shape.layers
    return Cost(
        nvlink=nvlink * depth,
        network=network * depth,
        calls=calls,
        launches=depth * LAUNCHES[method] * len(layers),
        state=depth * sum(_state(layer, method, tensor, shards) for layer in layers),
        kept=depth * kept(layers, method, tensor),
        passed=depth * sum(_passed(layer, method, tensor) for layer in layers),
    )


def _part(layer: Linear, tensor: int) -> Linear:
    """The layer with what one of ``tensor`` GPUs has of its split dimension."""
    n, k = layer.n // tensor, layer.k // tensor
    return layer._replace(n=n) if layer.splits == "N" else layer._replace(k=k)


def _state(layer: Linear, method: str, tensor: int, shards: int) -> float:
    """Parameters, gradients and Adam's two moments, sharded; buffers, which are not.

    SECURA's: U_acc and R Rᵀ in fp32, ‖W_i‖, and under tensor parallelism C.
    """
    own = _part(layer, tensor)
    numbers = trained(method, own if method == "lora" else layer, M, R)
    buffers = 0
    if method != "lora":
        buffers = 8 * M * M + 4 * own.n + (ITEMSIZE * M * own.n if tensor > 1 else 0)
    return 4 * ITEMSIZE * numbers / shards + buffers


def kept(layers: list[Linear], method: str, tensor: int) -> float:
    """What autograd keeps of a block beyond the frozen model's: z and Q, or x and A x.

    LoRA's x is one tensor for the layers that share it: q, k and v, gate and up.
    """
    if method == "lora":
        inputs = {(layer.k, layer.splits): _part(layer, tensor).k for layer in layers}
        attention = 1 if (layers[0].k, "N") in inputs else 0  # gate and up have another x than q
        columns = sum(inputs.values()) + attention * layers[0].k
        return ITEMSIZE * TOKENS * (columns + R * len(layers))
    return sum(
        ITEMSIZE * M * (TOKENS + _part(layer, tensor).n) + 4 * _part(layer, tensor).n
        for layer in layers
    )


def _passed(layer: Linear, method: str, tensor: int) -> float:
    """Bytes through memory beyond the frozen layer's, as it runs; thin tensors but z left out.

    PEFT's LoRA in elements: x for A, B's product, times s, plus y0; then g times s, g twice for ∂B
    and ∂(A x), x, and A's ∂x, which is added to W's. SECURA as ``secura_kernels.plan`` counts a
    layer's ways, by bytes alone, the cheaper one each time; y0 it is under tensor parallelism.
    Where N is split, [y0, z] is made, its gradient is padded, and ∂y0 is taken out.
    """
    (n, k, _), t = _part(layer, tensor), TOKENS
    if method == "lora":
        return ITEMSIZE * t * (10 * n + 6 * k)
    by_output, by_weight = 2 * t * n + 32 // ITEMSIZE * t * M, 2 * n * k + t * k
    forward, backward = min(by_output, by_weight), min(2 * t * n, 2 * n * k)
    if tensor > 1:
        copies = 6 * t * n if layer.splits == "N" else 0
        forward, backward = by_output, 2 * t * n + copies
    return ITEMSIZE * (forward + backward + t * n)


def table() -> str:
    """The table of docs/scale.md: LoRA / SECURA in each cell."""
    heads = [
        "model, GPUs, set-up", "NVLink, MB", "network, MB", "collectives", "launches", "state, MiB",
        "kept for backward, MiB", "through memory, GB",
    ]  # fmt: skip
    lines = []
    units = (1e6, 1e6, 1, 1, 2**20, 2**20, 1e9)
    for name in ("llama3-8b", "llama3-70b", "llama3-405b"):
        for gpus in (8, 64, 512):
            for setup in SETUPS:
                label = f"{name}, {gpus}, {setup}"
                if setup == "TP 8" and gpus > NODE:
                    label += f" × FSDP2 {gpus // NODE}"
                first, second = (cost(MODELS[name], setup, gpus, method) for method in METHODS)
                if first is None or second is None:
                    lines.append([label, "the weights do not fit", *[""] * (len(heads) - 2)])
                    continue
                both = zip(first, second, units, strict=True)
                cells = [f"{a / unit:,.0f} / {b / unit:,.0f}" for a, b, unit in both]
                lines.append([label, *cells])
    return f"{markdown.table(heads, lines)}\n\n{_CAPTION}\n"


_CAPTION = (
    f"Counted, not measured: LoRA r={R} / SECURA `channel` m={M} on every linear layer of the "
    f"decoder, beyond the frozen model, each GPU and step; bf16, {TOKENS} tokens a GPU (under TP a "
    "node), AdamW, no checkpointing. *Sent* by rings, of whose 8 links in a node of 8 GPUs one "
    "goes to another node. *Collectives* are those that the frozen model has not; FSDP2's "
    "all-gathers are sent together with its. "
    "*Launches* are those of the layers alone, by a layer of 256 × 256 at m = 32; at these sizes "
    "`channel` starts about 12 a layer where 11 are counted here. *Through memory*: as PEFT and "
    "our kernels run."
)


if __name__ == "__main__":
    print(table())
