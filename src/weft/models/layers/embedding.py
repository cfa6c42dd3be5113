"""Token ids to vectors and vectors to logits, the vocabulary spread over the ranks."""

import torch

from weft.kernels import ops
from weft.kernels.packed import PackedLinear
from weft.models.layers.reader import WeightReader
from weft.models.spec import DecoderSpec, LinearSpec
from weft.models.weights.partition import even_span
from weft.parallel.groups import Group

SPLIT_MULTIPLE = 64
"""Ranks own whole runs of this many vocabulary entries, so that no vector register straddles two ranks."""


class VocabularyLayers:
    """Input and output embedding of one rank; one tensor when tied.

    Shapes   embed `[T]` → `[T, E]`; logits `[S', E]` → `[S', V]` float32
    """

    def __init__(self, reader: WeightReader, spec: DecoderSpec, group: Group) -> None:
        spans = [
            even_span(spec.vocab_size, rank, group.world_size, multiple=SPLIT_MULTIPLE)
            for rank in range(group.world_size)
        ]
        self._span = spans[group.rank]
        self._sizes = [span.size for span in spans]
        self._group = group
        self._scale = spec.embedding_scale
        self._softcap = spec.logit_softcap
        self._vocab_size = spec.vocab_size
        head = LinearSpec(spec.head, spec.vocab_size, spec.hidden_size)
        self._head = reader.packed_rows([(head, self._span)], is_vocabulary=True)
        table = LinearSpec(spec.embedding, spec.vocab_size, spec.hidden_size)
        self._table = self._head if spec.is_tied else PackedLinear.of_rows(reader.rows(table, self._span))

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self._head.num_bytes + (0 if self._table is self._head else self._table.num_bytes)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look rows up, each on the rank that owns it; the others contribute zero."""
        if self._group.world_size == 1:
            return ops.embedding(token_ids, self._table, self._scale)
        local = token_ids - self._span.start
        foreign = (local < 0) | (local >= self._span.size)
        rows = ops.embedding(local.masked_fill(foreign, 0), self._table, self._scale)
        return self._group.all_reduce(rows.masked_fill(foreign[:, None], 0.0))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the whole vocabulary, on every rank."""
        if len(x) == 0:  # a step that only fills the cache; all ranks skip the exchange alike
            return x.new_empty(0, self._vocab_size, dtype=torch.float32)
        scores = ops.linear(x, self._head, torch.float32)
        if self._group.world_size > 1:
            scores = self._group.all_gather(scores, dim=-1, sizes=self._sizes)
        if self._softcap:
            ops.softcap(scores, self._softcap)
        return scores
