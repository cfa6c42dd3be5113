"""What the runner hands to a model: one step's rows as device tensors. No policy, no Python lists.

Shape letters: T tokens in the step · S sequences · N blocks · B tokens per block · L layers · Hkv key/value heads ·
D head size · N' longest block table of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerKv:
    """One layer's share of the KV pool; written in place."""

    keys: torch.Tensor
    """[N, Hkv, B, W], see `kernels.kv_layout`"""
    values: torch.Tensor
    """[N, Hkv, B, W]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Packed rows of S sequences, T tokens in all, sequence after sequence."""

    token_ids: torch.Tensor
    """[T] int32"""
    positions: torch.Tensor
    """[T] int32, absolute position of each token in its own sequence"""
    kv_slots: torch.Tensor
    """[T] int32, where the token's keys and values go: block · B + offset"""
    query_starts: torch.Tensor
    """[S + 1] int32, first packed row of each sequence; the last entry is T"""
    context_lens: torch.Tensor
    """[S] int32, tokens of the sequence after this step: position of its last row + 1"""
    block_tables: torch.Tensor
    """[S, N'] int32, blocks of each sequence in order; entries past its length are 0 and never read"""
    logit_rows: torch.Tensor
    """[S'] int32, packed rows whose logits are wanted"""
    kv: Sequence[LayerKv]
    """one entry per layer"""
    max_context_len: int
    """on the host, so that no kernel launch waits for the device: no context is longer, at most B - 1 are missing"""
    max_query_len: int
    """host copy of the longest row"""
