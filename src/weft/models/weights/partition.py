"""Which rows and columns of a weight a rank owns. Pure arithmetic, no torch.

Heads are split by KV group (the query heads that share one key/value head), unevenly when the ranks do not divide the
groups; with fewer groups than ranks the key/value head is replicated and its query heads are split.
"""

from dataclasses import dataclass

from weft.errors import DoesNotFitError


@dataclass(frozen=True, slots=True)
class Span:
    """Indices start ≤ i < stop."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many indices."""
        return self.stop - self.start

    def scaled(self, factor: int) -> "Span":
        """The span of elements when every index stands for `factor` of them (heads → rows)."""
        return Span(self.start * factor, self.stop * factor)

    def shifted(self, offset: int) -> "Span":
        """The same span `offset` further on."""
        return Span(self.start + offset, self.stop + offset)


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one rank. Every rank has at least one of each."""

    query: Span
    key_value: Span


def even_span(total: int, rank: int, world_size: int, *, multiple: int = 1) -> Span:
    """Split `total` ≥ `world_size` into contiguous non-empty parts, as even as whole groups of `multiple` allow.

    The first parts are the larger ones; only the last may end inside a group. Groups are halved until every part has
    one.
    """
    while multiple > 1 and -(-total // multiple) < world_size:
        multiple //= 2
    groups = -(-total // multiple)
    share, extra = divmod(groups, world_size)
    start = rank * share + min(rank, extra)
    stop = start + share + (1 if rank < extra else 0)
    return Span(min(start * multiple, total), min(stop * multiple, total))


def head_share(num_heads: int, num_kv_heads: int, rank: int, world_size: int) -> HeadShare:
    """Return the query and key/value heads of `rank`.

    Raises   DoesNotFitError: more ranks than the heads can occupy
    """
    if world_size > num_heads:
        raise DoesNotFitError(
            f"`--num-shard` {world_size} is too many for a model with {num_heads} attention heads. "
            f"Use at most {num_heads}."
        )
    group_size = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        groups = even_span(num_kv_heads, rank, world_size)
        return HeadShare(groups.scaled(group_size), groups)
    # Fewer groups than ranks: ranks are dealt to groups as evenly as ranks are dealt to anything else.
    group = next(g for g in range(num_kv_heads) if rank < even_span(world_size, g, num_kv_heads).stop)
    ranks_of_group = even_span(world_size, group, num_kv_heads)
    within = even_span(group_size, rank - ranks_of_group.start, ranks_of_group.size)
    return HeadShare(within.shifted(group * group_size), Span(group, group + 1))
