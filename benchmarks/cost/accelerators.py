"""Prices on accelerators, from published peak figures times a stated share of them: a prediction that nobody has measured.

Figures are those of the manufacturer's data sheets for the SXM boards (dense, without sparsity). What runs in the host's memory
is priced as the calibration measured it on a CPU thread of this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prices import Prices

from align_audit.auditing.costs.shape import ModelShape

PRODUCTS = 0.4
"""Of peak matrix products that a layer's call of some thousand tokens reaches; the same is assumed of training."""
BANDWIDTH = 0.6
"""Of a memory's bandwidth that elementwise kernels reach."""
LINKS = 0.5
"""Of a link's bandwidth that gathers reach."""
NODE = 8
"""Accelerators that one node's fast links join."""

_LAYER_CALL = 4e-4
"""Seconds in which eager Python launches the kernels of one decoder layer. A call of the head, with every layer stubbed, takes
a quarter of it for each layer."""
_MESSAGE = 1e-4
"""Of a small message over gloo."""
_GATHER = 5e-5
"""Latency of a gather."""
_NETWORK = 2e9
"""Bytes a second that a process receives over gloo, of a node's eight that share its network."""
_COPY = 2e10
"""Bytes a second between a device and its host."""
_REDUCED = 0.1
"""Of a memory's bandwidth that reading a matrix again for each of its columns reaches, as singular values in float64 take."""
_SINGULAR, _VALUES = 16 / 3, 8 / 3
"""Bytes that this reads, over rows · d · min(rows, d) for singular values and d³ for eigenvalues."""
_EIGEN = 9.0
"""FLOP of an eigendecomposition with vectors, over d³; it reaches a tenth of the peak."""
_LOGIT_BYTES = {"scored": 10, "sloped": 24, "compared": 64, "travelled": 280}
"""Bytes that each reading of a logit moves, by its passes over memory."""


@dataclass(frozen=True)
class Accelerator:
    """Published peak figures of one device.

    Attributes:
        products, wide: FLOP a second in bfloat16 and in float64.
        memory: bytes a second.
        capacity: bytes.
        inside, between: bytes a second and direction of a device's links to others of its node, and of a node's links to other
            nodes, which its devices share in a gather.
    """

    name: str
    products: float
    wide: float
    memory: float
    capacity: float
    inside: float
    between: float

    def link(self, size: int) -> float:
        """Bytes a second by which each of so many devices receives what the others have."""
        return LINKS * (self.inside if size <= NODE else self.between)


ACCELERATORS = (
    Accelerator("H100", 989e12, 67e12, 3.35e12, 80 * 2**30, 450e9, 8 * 50e9),
    Accelerator("A100", 312e12, 19.5e12, 2.04e12, 80 * 2**30, 300e9, 8 * 25e9),
)


def priced(device: Accelerator, shape: ModelShape, host: Prices, ranks: int) -> Prices:
    """Seconds for each unit on so many devices.

    Args:
        host: what was measured on a thread of a CPU, for what runs there.
    """
    flop, byte = 1 / (PRODUCTS * device.products), 1 / (BANDWIDTH * device.memory)
    weights = shape.layer_weights * shape.value_bytes * byte
    return replace(
        host,
        call=_LAYER_CALL + weights,
        token_flop=flop,
        meeting_flop=flop,
        backward=1.5,
        head_call=_LAYER_CALL * shape.layers / 4 + shape.width * shape.vocabulary * shape.value_bytes * byte,
        head_flop=flop,
        **{name: moved * byte for name, moved in _LOGIT_BYTES.items()},
        decode_call=_LAYER_CALL + weights,
        decode_step=5e-3,
        wide_flop=1 / (0.5 * device.wide),
        cube=_EIGEN / (0.1 * device.wide),
        value_cube=_VALUES / (_REDUCED * device.memory),
        singular=_SINGULAR / (_REDUCED * device.memory),
        stream_byte=byte,
        kept_byte=1 / _COPY,
        # Integer sums over eight bytes for each of a weight, in some passes.
        hashed_byte=12 * byte,
        gather=_GATHER,
        gathered_byte=(ranks - 1) / ranks / device.link(ranks),
        exchange=_MESSAGE,
        brought_byte=1 / _NETWORK,
        audit=1.0,
    )


def training_seconds(device: Accelerator, shape: ModelShape, tokens: int, ranks: int) -> float:
    """Of training on so many tokens: forward and backward of the policy, computed again for the backward pass, and the
    reference's forward; as many FLOP a second as an audit's layers reach."""
    return 10 * shape.weights * tokens / (PRODUCTS * device.products * ranks)
