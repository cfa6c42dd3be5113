"""The dataclasses that say what a decoder is: which mixer, which feed-forward, which norms, which checkpoint tensors.

Sizes are those of the whole model; a rank's share is computed by `weights/partition.py`. Checkpoint names are those
of transformers; `weights/names.py` translates them for GGUF.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from weft.models.spec.rope import RopeSpec


@dataclass(frozen=True, slots=True)
class WeightRef:
    """A checkpoint tensor, or consecutive rows of one that packs several."""

    name: str
    first_row: int = 0
    packed_rows: int | None = None
    """Rows of the whole packed tensor; None when nothing else is in it."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """y = W x + b with W `[O, I]`."""

    weight: WeightRef
    out_features: int
    in_features: int
    bias: WeightRef | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers in weight and bias."""
        return self.out_features * (self.in_features + (self.bias is not None))


@dataclass(frozen=True, slots=True)
class NormSpec:
    """Root-mean-square norm: x / rms(x) · (weight + weight_offset)."""

    name: str
    size: int
    eps: float
    weight_offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention over the paged pool."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    query: LinearSpec
    key: LinearSpec
    value: LinearSpec
    output: LinearSpec
    query_norm: NormSpec | None = None
    """Norm over each head's D numbers before the rotation."""
    key_norm: NormSpec | None = None
    softcap: float = 0.0
    window: int = 0
    """How many of the newest positions are seen; 0 = all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """Gated feed-forward: down(act(gate x) · up x)."""

    intermediate_size: int
    activation: str
    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """x += [post] mixer(norm x);  x += [post] ffn(norm x)."""

    mixer: AttentionSpec
    ffn: MlpSpec
    mixer_norm: NormSpec
    ffn_norm: NormSpec
    mixer_post_norm: NormSpec | None = None
    ffn_post_norm: NormSpec | None = None

    def linears(self) -> Iterator[LinearSpec]:
        """Every weight matrix of the layer."""
        yield from (self.mixer.query, self.mixer.key, self.mixer.value, self.mixer.output)
        yield from (self.ffn.gate, self.ffn.up, self.ffn.down)

    def norms(self) -> Iterator[NormSpec]:
        """Every norm of the layer."""
        norms = (
            self.mixer_norm,
            self.ffn_norm,
            self.mixer_post_norm,
            self.ffn_post_norm,
            self.mixer.query_norm,
            self.mixer.key_norm,
        )
        yield from (norm for norm in norms if norm is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Embedding → layers → norm → logits."""

    vocab_size: int
    hidden_size: int
    embedding: WeightRef
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    head: WeightRef
    """`[V, E]`; the embedding itself when tied."""
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def is_tied(self) -> bool:
        """Whether input and output embedding are one tensor."""
        return self.head == self.embedding

    @property
    def num_parameters(self) -> int:
        """Distinct trained numbers."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        linears = sum(linear.num_parameters for layer in self.layers for linear in layer.linears())
        norms = sum(norm.size for layer in self.layers for norm in layer.norms())
        return embeddings + linears + norms + self.final_norm.size

    @property
    def attention_cost(self) -> float:
        """Multiply-adds of a token per position it attends to, as a share of those in its linear layers.

        Layers with a window are left out: what they see does not grow.
        """
        attended = sum(
            2 * layer.mixer.num_heads * layer.mixer.head_dim for layer in self.layers if not layer.mixer.window
        )
        return attended / sum(linear.num_parameters for layer in self.layers for linear in layer.linears())
