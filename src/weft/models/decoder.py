"""The one generic decoder: runs any `DecoderSpec`. Knows layers and collectives, no family and no policy.

See ADR-0004.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from weft.kernels import ops
from weft.models.forward_batch import ForwardBatch, LayerKv
from weft.models.layers.attention import Attention
from weft.models.layers.embedding import VocabularyLayers
from weft.models.layers.mlp import GatedMlp
from weft.models.layers.norm import RmsNorm
from weft.models.layers.reader import WeightReader
from weft.models.layers.rope import cos_sin_table
from weft.models.quant.formats import open_weights
from weft.models.quant.scheme import QuantScheme
from weft.models.spec import DecoderSpec, LayerSpec, ModelDescription, RopeSpec
from weft.parallel.groups import Group

Progress = Callable[[float], None]
"""Called with the fraction of the layers read so far, 0 to 1."""


def load_decoder(
    path: Path,
    description: ModelDescription,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    progress: Progress | None = None,
    check_finite: bool = False,
    scheme: QuantScheme | None = None,
) -> "Decoder":
    """Read this rank's share of a model; `scheme` rounds its matrices (default: as they are).

    Raises   ModelNotFoundError: a tensor is missing, has a wrong shape or dtype, or (with `check_finite`) holds NaN
             or infinity; DoesNotFitError: more ranks than attention heads
    """
    source = open_weights(path, description.weight_format)
    try:
        reader = WeightReader(source, dtype=dtype, device=device, check_finite=check_finite, scheme=scheme)
        return Decoder(reader, description.spec, description.max_positions, group, progress)
    finally:
        source.close()


class DecoderLayer:
    """x += [post] mixer(norm x);  x += [post] ffn(norm x), the sums fused into the norms that follow them."""

    def __init__(self, reader: WeightReader, spec: LayerSpec, cos_sin: torch.Tensor, group: Group) -> None:
        self._mixer_norm = RmsNorm(reader, spec.mixer_norm)
        self._mixer = Attention(reader, spec.mixer, cos_sin, group)
        self._mixer_post_norm = RmsNorm(reader, spec.mixer_post_norm) if spec.mixer_post_norm else None
        self._ffn_norm = RmsNorm(reader, spec.ffn_norm)
        self._ffn = GatedMlp(reader, spec.ffn, group)
        self._ffn_post_norm = RmsNorm(reader, spec.ffn_post_norm) if spec.ffn_post_norm else None
        self.kv_shape = (self._mixer.num_kv_heads, spec.mixer.head_dim)

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        norms = (self._mixer_norm, self._ffn_norm, self._mixer_post_norm, self._ffn_post_norm)
        return self._mixer.num_bytes + self._ffn.num_bytes + sum(norm.num_bytes for norm in norms if norm)

    def __call__(
        self, delta: torch.Tensor | None, residual: torch.Tensor, batch: ForwardBatch, kv: LayerKv
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (what this layer still has to add, the stream before it is added), both `[T, E]`.

        `delta` is what the previous layer still has to add; None before the first.
        """
        if delta is None:
            normed = self._mixer_norm(residual)
        else:
            normed, residual = self._mixer_norm.add(delta, residual)
        mixed = self._mixer(normed, batch, kv)
        if self._mixer_post_norm is not None:
            mixed = self._mixer_post_norm(mixed)
        normed, residual = self._ffn_norm.add(mixed, residual)
        fed = self._ffn(normed)
        if self._ffn_post_norm is not None:
            fed = self._ffn_post_norm(fed)
        return fed, residual


class Decoder:
    """A loaded model, or one rank's share of it. `forward` and its two halves are its only behaviour."""

    def __init__(
        self,
        reader: WeightReader,
        spec: DecoderSpec,
        max_positions: int,
        group: Group,
        progress: Progress | None = None,
    ) -> None:
        report = progress or (lambda _: None)
        self.spec = spec
        self._tables: dict[RopeSpec, torch.Tensor] = {}
        self._vocabulary = VocabularyLayers(reader, spec, group)
        self._final_norm = RmsNorm(reader, spec.final_norm)
        self._layers: list[DecoderLayer] = []
        for layer in spec.layers:
            rope = layer.mixer.rope
            if rope not in self._tables:
                self._tables[rope] = cos_sin_table(rope, max_positions, reader.device)
            self._layers.append(DecoderLayer(reader, layer, self._tables[rope], group))
            report(len(self._layers) / len(spec.layers))

    @property
    def num_parameters(self) -> int:
        """Distinct trained numbers of the whole model."""
        return self.spec.num_parameters

    @property
    def weights_bytes(self) -> int:
        """Memory held by this rank's weights and position tables."""
        layers = sum(layer.num_bytes for layer in self._layers)
        tables = sum(table.nbytes for table in self._tables.values())
        return self._vocabulary.num_bytes + self._final_norm.num_bytes + layers + tables

    @property
    def kv_shapes(self) -> list[tuple[int, int]]:
        """(Hkv of this rank, D) for each layer."""
        return [layer.kv_shape for layer in self._layers]

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run packed rows through the model; writes their keys and values into `batch.kv`.

        Shapes   → logits `[S', V]` float32 of the rows in `batch.logit_rows`, equal on every rank
        """
        return self.logits(self.hidden_states(batch))

    @torch.inference_mode()
    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        """The first half of `forward`: the normed stream `[S', E]` of the rows in `batch.logit_rows`."""
        embedded = self._vocabulary.embed(batch.token_ids)
        delta, residual = self._layers[0](None, embedded, batch, batch.kv[0])
        for layer, kv in zip(self._layers[1:], batch.kv[1:], strict=True):
            delta, residual = layer(delta, residual, batch, kv)
        rows = batch.logit_rows
        normed, _ = self._final_norm.add(ops.take_rows(delta, rows), ops.take_rows(residual, rows))
        return normed

    @torch.inference_mode()
    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The second half of `forward`: `[S', E]` → `[S', V]` float32. Every rank must call it alike."""
        return self._vocabulary.logits(hidden_states)
