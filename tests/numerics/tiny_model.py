"""A small causal model over the paged pool, in float32 and plain PyTorch: what the runner needs to be tested with.

Two layers of single-head attention over embeddings, written so that a row's bits do not depend on other rows.
"""

import torch

from weft.models.forward_batch import ForwardBatch


class TinyModel:
    def __init__(self, vocab_size: int = 97, head_dim: int = 16, num_layers: int = 2, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.num_layers = num_layers
        self.head_dim = head_dim
        self.embedding = torch.randn(vocab_size, head_dim, generator=draw)
        self.projections = torch.randn(num_layers, 3, head_dim, head_dim, generator=draw) / head_dim**0.5
        self.output = torch.randn(vocab_size, head_dim, generator=draw)
        self.largest_logits_rows = 0

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self.logits(self.hidden_states(batch))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.largest_logits_rows = max(self.largest_logits_rows, len(hidden_states))
        return (
            torch.stack([self.output @ x for x in hidden_states])
            if len(hidden_states)
            else self.output[:, 0].new_empty(0, len(self.output))
        )

    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        hidden = [self._embed(int(t), int(p)) for t, p in zip(batch.token_ids, batch.positions, strict=True)]
        for layer, kv in enumerate(batch.kv):
            block_size = kv.keys.shape[2]
            queries = []
            for row, x in enumerate(hidden):
                query, key, value = self.projections[layer] @ x
                block, offset = divmod(int(batch.kv_slots[row]), block_size)
                kv.keys[block, 0, offset], kv.values[block, 0, offset] = key, value
                queries.append(query)
            for sequence, table in enumerate(batch.block_tables):
                for row in range(int(batch.query_starts[sequence]), int(batch.query_starts[sequence + 1])):
                    length = int(batch.positions[row]) + 1
                    places = [(int(table[p // block_size]), p % block_size) for p in range(length)]
                    keys = torch.stack([kv.keys[b, 0, o] for b, o in places])
                    values = torch.stack([kv.values[b, 0, o] for b, o in places])
                    hidden[row] = hidden[row] + torch.softmax(keys @ queries[row], 0) @ values
        return torch.stack(hidden)[batch.logit_rows.long()]

    def _embed(self, token: int, position: int) -> torch.Tensor:
        return self.embedding[token] * (1 + 0.01 * position)

    def logits_of(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V] logits of a whole sequence, without a pool."""
        hidden = torch.stack([self._embed(token, position) for position, token in enumerate(token_ids)])
        mask = torch.ones(len(token_ids), len(token_ids)).tril().bool()
        for projection in self.projections:
            query, key, value = (hidden @ weight.T for weight in projection)
            hidden = hidden + torch.softmax((query @ key.T).masked_fill(~mask, -torch.inf), -1) @ value
        return hidden @ self.output.T
