"""The SDAR transformer: Qwen3-shaped, queries and keys normalised per head before the rotation, no biases."""

from __future__ import annotations

from dare.families.config import DenseShape
from dare.families.decoder import DecoderLayer, DecoderNetwork
from dare.families.layers.mlp import SwiGLU


class SDARNetwork(DecoderNetwork):
    """Under the official parameter names, `model.*` and `lm_head`."""

    def __init__(self, shape: DenseShape) -> None:
        width, mlp_size = shape.hidden_size, shape.mlp_size
        super().__init__(shape, (DecoderLayer(shape, SwiGLU(width, mlp_size)) for _ in range(shape.num_layers)))
