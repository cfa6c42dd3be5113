"""What is known of a model before its weights are read: enough to plan memory, ranks and admission. Torch-free."""

from dataclasses import dataclass
from enum import StrEnum

from weft.models.spec.layout import DecoderSpec
from weft.models.spec.pooling import PoolingSpec
from weft.models.weights.partition import head_share

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KV_SCALE_BYTES = {"int8": 4}
"""Beside the elements of one key or value, see `kernels.kv_layout`."""
"""Bytes of one number, by the names that `--dtype` takes."""


class WeightFormat(StrEnum):
    """The container of the weights."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """All that is known of a model before its weights are read."""

    model_type: str
    family: str
    weight_format: WeightFormat
    stored_dtype: str
    """What most weight bytes are stored as: `bfloat16`, `float32`, `Q4_1`, …"""
    spec: DecoderSpec
    max_positions: int
    pooling: PoolingSpec | None = None
    """How texts become vectors; None: the model generates text."""

    @property
    def num_layers(self) -> int:
        """L"""
        return len(self.spec.layers)

    @property
    def num_heads(self) -> int:
        """Hq, of the first layer."""
        return self.spec.layers[0].mixer.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Hkv, of the first layer."""
        return self.spec.layers[0].mixer.num_kv_heads

    @property
    def head_dim(self) -> int:
        """D"""
        return self.spec.layers[0].mixer.head_dim

    @property
    def hidden_size(self) -> int:
        """E"""
        return self.spec.hidden_size

    @property
    def vocab_size(self) -> int:
        """V"""
        return self.spec.vocab_size

    @property
    def num_parameters(self) -> int:
        """Distinct trained numbers of the whole model."""
        return self.spec.num_parameters

    @property
    def tied_embeddings(self) -> bool:
        """Whether input and output embedding are one tensor."""
        return self.spec.is_tied

    @property
    def sliding_window(self) -> int | None:
        """The narrowest attention window of any layer; None when every layer sees everything."""
        windows = [layer.mixer.window for layer in self.spec.layers if layer.mixer.window]
        return min(windows, default=None)

    @property
    def widest_layer(self) -> int:
        """Largest output of a linear layer as it is run: gate and up together, or queries, keys and values."""
        return max(
            max(
                2 * layer.ffn.intermediate_size,
                (layer.mixer.num_heads + 2 * layer.mixer.num_kv_heads) * layer.mixer.head_dim,
            )
            for layer in self.spec.layers
        )

    def weights_bytes(self, dtype: str) -> int:
        """Memory of the weights in a dtype of `DTYPE_BYTES`, all ranks together."""
        return self.num_parameters * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str, *, rank: int = 0, world_size: int = 1) -> int:
        """Memory of one token's keys and values in every layer, on one rank.

        dtype    of `DTYPE_BYTES`, or `int8`

        Raises   DoesNotFitError: more ranks than heads
        """
        num_bytes = 0
        for layer in self.spec.layers:
            share = head_share(layer.mixer.num_heads, layer.mixer.num_kv_heads, rank, world_size)
            per_head = layer.mixer.head_dim * DTYPE_BYTES.get(dtype, 1) + _KV_SCALE_BYTES.get(dtype, 0)
            num_bytes += 2 * share.key_value.size * per_head
        return num_bytes
