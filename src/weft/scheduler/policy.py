"""The choices of the scheduler, as small functions without state: who is more important, who gives way, who prefills.

A better policy is a change here, judged by the simulator (docs/adr/0010-simulation.md).
"""

from collections.abc import Sequence as Seq

from weft.core.sequence import Sequence


def rank(sequence: Sequence) -> tuple[int, int]:
    """Sort key, most important first: higher priority, then earlier arrival."""
    return (-sequence.request.priority, sequence.arrival)


def choose_victim(running: Seq[Sequence]) -> Sequence:
    """Who gives way when blocks run out: lowest priority, then latest arrival. `running` is sorted by `rank`.

    The most important sequence is therefore never preempted while another runs, and always gets on.
    """
    return running[-1]


def prefill_order(prefilling: Seq[Sequence]) -> list[Sequence]:
    """The most important prompt first, then the others: within a priority the shortest remainder first.

    `prefilling` is sorted by `rank`. Together with `first_share_tokens` neither a long prompt nor the short ones
    behind it can be shut out.
    """
    first, *others = prefilling
    others.sort(key=lambda sequence: (-sequence.request.priority, sequence.num_unplanned, sequence.arrival))
    return [first, *others]


def first_share_tokens(budget_tokens: int, block_size_tokens: int) -> int:
    """Tokens that the most important prompt is sure of while others wait: half the budget, at least a block."""
    return max(budget_tokens // 2, block_size_tokens)
