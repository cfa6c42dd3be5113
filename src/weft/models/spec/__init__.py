"""What a decoder is, layer by layer, as data that a family file writes and `decoder.py` runs. See ADR-0004.

Torch-free: the launcher plans memory with it.
"""

from weft.models.spec.description import DTYPE_BYTES, ModelDescription, WeightFormat
from weft.models.spec.layout import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    NormSpec,
    WeightRef,
)
from weft.models.spec.pooling import PoolingSpec, read_gguf_pooling, read_pooling
from weft.models.spec.reading import (
    ACTIVATIONS,
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Dimensions,
    causal_decoder,
    layer_windows,
    plain_linear,
    read_dimensions,
    refuse_bidirectional,
    separate_attention,
    separate_mlp,
    upper_layer_windows,
)
from weft.models.spec.rope import (
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
    read_rope,
)

__all__ = [
    "ACTIVATIONS",
    "DTYPE_BYTES",
    "FULL_ATTENTION",
    "SLIDING_ATTENTION",
    "AttentionSpec",
    "DecoderSpec",
    "Dimensions",
    "FrequencyDivisors",
    "LayerSpec",
    "LinearScaling",
    "LinearSpec",
    "Llama3Scaling",
    "LongRopeScaling",
    "MlpSpec",
    "ModelDescription",
    "NormSpec",
    "PoolingSpec",
    "RopeSpec",
    "WeightFormat",
    "WeightRef",
    "YarnScaling",
    "causal_decoder",
    "layer_windows",
    "plain_linear",
    "read_dimensions",
    "read_gguf_pooling",
    "read_pooling",
    "read_rope",
    "refuse_bidirectional",
    "separate_attention",
    "separate_mlp",
    "upper_layer_windows",
]
