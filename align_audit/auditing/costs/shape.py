"""A decoder as far as what it costs to compute depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from align_audit.errors import AnatomyError, ConfigurationError
from align_audit.models.anatomy import unwrap
from align_audit.models.weights.sharded import whole_shape, whole_size
from align_audit.models.weights.streaming import NotStreamable, find_layers

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of their experts."""


@dataclass(frozen=True)
class ModelShape:
    """Widths of a decoder, and how many weights it has.

    Attributes:
        layers: L.
        width: d, of the residual stream.
        query, key: heads × width of a head, and key-value heads × width of a head.
        vocabulary: V.
        layer_matrices: weights of one layer's matrices, each of which a token meets once.
        layer_weights: all weights of one layer.
        outside_weights: all others, embeddings and head; tied ones count once.
        value_bytes: of a weight, and of a value of the stream.

    Raises:
        ConfigurationError: a number below 1.

    Example:
        >>> ModelShape(2, 8, 8, 8, 16, layer_matrices=640, layer_weights=656, outside_weights=264, value_bytes=4).weights
        1576
    """

    layers: int
    width: int
    query: int
    key: int
    vocabulary: int
    layer_matrices: int
    layer_weights: int
    outside_weights: int
    value_bytes: int

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in vars(self).items() if value < 1}
        if wrong:
            raise ConfigurationError(f"expected a decoder's numbers of at least 1; found {wrong}")

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Of a causal LM, which may be wrapped, spread over processes, or on the meta device.

        Raises:
            AnatomyError: its layers cannot be found, its configuration does not name its heads, or it has
                experts, of which a token meets some.
        """
        model = unwrap(model)
        config: Any = getattr(model, "config", None)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        experts = next((name for name in _EXPERTS if getattr(config, name, None)), None)
        if experts is not None:
            raise AnatomyError(
                f"{type(model).__name__} has experts ({experts}={getattr(config, experts)}), of which a token meets some; "
                "expected a dense decoder: what such a model costs is not foreseen. Measure an audit of it (align-audit doctor)"
            )
        try:
            _, members = find_layers(model)
        except NotStreamable as error:
            raise AnatomyError(
                f"cannot foresee what {type(model).__name__} costs: {error}; expected decoder layers in a ModuleList"
            ) from None
        width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        if not width or not heads:
            raise AnatomyError(
                f"cannot foresee what {type(model).__name__} costs: expected a configuration with hidden_size and "
                f"num_attention_heads; found {width} and {heads}"
            )
        head, keys = getattr(config, "head_dim", None), getattr(config, "num_key_value_heads", None)
        if not all(isinstance(each, int | None) for each in (width, heads, head, keys)):
            raise AnatomyError(
                f"cannot foresee what {type(model).__name__} costs: expected of width, heads, their width and key-value heads "
                f"one number for all layers; found {[width, heads, head, keys]}"
            )
        head = head or width // heads
        inside = {id(weight) for layer in members for weight in layer.parameters()}
        weight = next(each for each in model.parameters() if each.is_floating_point())
        return cls(
            layers=len(members),
            width=width,
            query=head * heads,
            key=head * (keys or heads),
            vocabulary=whole_shape(embeddings.weight)[0],
            layer_matrices=_mean(
                [sum(whole_size(each) for each in layer.parameters() if _is_matrix(each)) for layer in members]
            ),
            layer_weights=_mean([sum(map(whole_size, layer.parameters())) for layer in members]),
            outside_weights=sum(whole_size(each) for each in model.parameters() if id(each) not in inside),
            value_bytes=weight.element_size(),
        )

    @property
    def weights(self) -> int:
        """Of the model."""
        return self.layers * self.layer_weights + self.outside_weights

    @property
    def stream_bytes(self) -> int:
        """Of one token's residual stream."""
        return self.width * self.value_bytes

    # Matrix products, in FLOP (two for each multiply-add):

    @property
    def layer_flops(self) -> int:
        """Of a token in a layer, without attention's scores."""
        return 2 * self.layer_matrices

    @property
    def spared_flops(self) -> int:
        """Of a token in the last layer, what is left out where nobody reads it: all but its keys and values."""
        return 2 * (self.layer_matrices - 2 * self.width * self.key)

    @property
    def meeting_flops(self) -> int:
        """Of a query that meets a key in a layer: score and weighted value, in all heads."""
        return 4 * self.query

    @property
    def head_flops(self) -> int:
        """Of a row in the unembedding."""
        return 2 * self.width * self.vocabulary


def _mean(sizes: list[int]) -> int:
    return round(sum(sizes) / len(sizes))


def _is_matrix(weight: nn.Parameter) -> bool:
    return len(whole_shape(weight)) == 2
