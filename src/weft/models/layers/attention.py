"""Grouped-query attention over the paged KV pool, its heads spread over the ranks."""

import torch

from weft.kernels import ops
from weft.models.forward_batch import ForwardBatch, LayerKv
from weft.models.layers.linear import RowParallelLinear
from weft.models.layers.norm import RmsNorm
from weft.models.layers.reader import WeightReader
from weft.models.spec import AttentionSpec
from weft.models.weights.partition import head_share
from weft.parallel.groups import Group


class Attention:
    """Project, rotate, store keys and values, attend, project back; q, k and v as one matrix.

    Shapes   `[T, E]` → `[T, E]`
    Source   Ainslie et al. 2023, arXiv 2305.13245
    """

    def __init__(self, reader: WeightReader, spec: AttentionSpec, cos_sin: torch.Tensor, group: Group) -> None:
        share = head_share(spec.num_heads, spec.num_kv_heads, group.rank, group.world_size)
        query_rows, kv_rows = share.query.scaled(spec.head_dim), share.key_value.scaled(spec.head_dim)
        self._qkv = reader.packed_rows([(spec.query, query_rows), (spec.key, kv_rows), (spec.value, kv_rows)])
        self._output = RowParallelLinear(reader, spec.output, query_rows, group)
        self._query_norm = RmsNorm(reader, spec.query_norm) if spec.query_norm else None
        self._key_norm = RmsNorm(reader, spec.key_norm) if spec.key_norm else None
        self._cos_sin = cos_sin
        self._spec = spec
        self._num_heads = share.query.size
        self.num_kv_heads = share.key_value.size

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        norms = [norm.num_bytes for norm in (self._query_norm, self._key_norm) if norm is not None]
        return self._qkv.num_bytes + self._output.num_bytes + sum(norms)

    def __call__(self, x: torch.Tensor, batch: ForwardBatch, kv: LayerKv) -> torch.Tensor:
        """Attend every row to its own sequence; writes the rows' keys and values into `kv`."""
        spec = self._spec
        heads = ops.linear(x, self._qkv).view(x.shape[0], -1, spec.head_dim)
        q, k, v = torch.split(heads, [self._num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self._query_norm is not None:
            q = self._query_norm(q)
        if self._key_norm is not None:
            k = self._key_norm(k)
        ops.rotary_and_store(q, k, v, self._cos_sin, batch.positions, batch.kv_slots, kv.keys, kv.values)
        attended = ops.paged_attention(
            q,
            kv.keys,
            kv.values,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            spec.scale,
            spec.softcap,
            spec.window,
            max_query_len=batch.max_query_len,
            max_context_len=batch.max_context_len,
        )
        return self._output(attended.flatten(1))
