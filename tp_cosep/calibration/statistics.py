"""What is collected of a model, and what a selector holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Size, Tensor, nn

from tp_cosep.calibration.input_observer import InputStatistics
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.utils.checks import check_one_of

__all__ = ["OBSERVED", "Statistics", "StatisticsSpec"]

#: What is observed of a layer: its outputs, or its inputs.
OBSERVED = ("outputs", "inputs")


@dataclass(frozen=True)
class StatisticsSpec:
    """Which statistics a selection requires.

    Attributes:
        class_moments: Class moments of the layers that create channels, or, by ``observe``, of those that consume them.
        inputs: Second moments of the consumers' inputs.
        input_classes: With ``inputs``: class means of the consumers' inputs, and class moments of the layers whose
            channels no layer consumes by weights alone.
        attention_maps: Average attention maps of every head, and nothing else.
        observe: Which tensors class moments describe, see :data:`OBSERVED`.
        spatial: Cells per dimension that maps are pooled to, ≥ 1; ``None`` for every pixel; ``"auto"`` for the most
            that fit ``memory_budget`` (4 for class means of inputs).
        channel_dims: Further types of layers to observe, and the dimension of their tensors that holds the channels.
        num_heads: Number of heads by attention layer.
        memory_budget: Bytes that the statistics may take.

    Raises:
        InputError: If ``spatial`` or ``observe`` is unknown.
    """

    class_moments: bool = False
    inputs: bool = False
    input_classes: bool = False
    attention_maps: bool = False
    observe: str = "outputs"
    spatial: int | str | None = 4
    channel_dims: Mapping[type[nn.Module], int] = field(default_factory=dict)
    num_heads: Mapping[nn.Module, int] = field(default_factory=dict)
    memory_budget: int = 2**32

    def __post_init__(self) -> None:
        spatial = self.spatial
        is_count = isinstance(spatial, int) and not isinstance(spatial, bool) and spatial >= 1
        if not (is_count or spatial is None or spatial == "auto"):
            raise InputError(f"fit: expected spatial to be an integer ≥ 1, None or 'auto', got {spatial!r}.")
        check_one_of("observe", self.observe, OBSERVED, "fit")

    @property
    def with_labels(self) -> bool:
        """Whether labels are required."""
        return self.class_moments or self.input_classes

    def facts(self) -> list[Any]:
        """What identifies the statistics in a file."""
        if self.attention_maps:
            return ["attention"]
        return [self.class_moments, self.inputs, self.input_classes, self.observe, self.spatial]


@dataclass
class Statistics:
    """What was collected of a model, by layer name.

    Attributes:
        moments: Class moments of layers' outputs (or inputs, as the spec says), in the order in which they ran.
        inputs: Second moments and class means of consumers' inputs.
        attention: Attention maps ``[heads, size, size]``.
        weight_shapes: Shapes of the weights of the layers in ``moments`` when they were observed.
        fingerprint: Hash of the model's parameters and buffers at that time.
    """

    moments: dict[str, ClassMoments] = field(default_factory=dict)
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    weight_shapes: dict[str, Size] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def layers(self) -> list[str]:
        """Names of the observed layers, in the order in which they ran."""
        return list(dict.fromkeys([*self.attention, *self.inputs, *self.moments]))
