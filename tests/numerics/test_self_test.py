"""The self-test of `weft doctor` passes on right kernels and finds wrong ones."""

import pytest
import torch

from weft.commands import self_test
from weft.kernels import ops, registry

pytestmark = pytest.mark.numerics


def test_every_operation_but_packing_is_compared_and_agrees() -> None:
    reports = self_test.run()
    assert {report.operation for report in reports} == set(registry.OPERATIONS) - {"pack_linear"}
    assert [report for report in reports if not report.is_good] == []


@pytest.mark.parametrize("operation", ["linear", "rms_norm", "paged_attention", "token_logprobs"])
@pytest.mark.parametrize(
    "spoil",
    [lambda y: y * 1.1, lambda y: y.masked_fill(torch.arange(len(y)).view(-1, *[1] * (y.dim() - 1)) == 0, torch.nan)],
)
def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, operation: str, spoil) -> None:
    right = getattr(ops, operation)
    monkeypatch.setattr(ops, operation, lambda *args, **options: spoil(right(*args, **options)))
    wrong = {report.operation for report in self_test.run() if not report.is_good}
    assert wrong == {operation}


def test_a_sampler_that_names_another_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.race
    monkeypatch.setattr(ops, "race", lambda *args: right(*args) + 1)
    assert {report.operation for report in self_test.run() if not report.is_good} == {"race"}


def test_the_choice_of_kernels_is_put_back() -> None:
    before = registry.kernel_set()
    self_test.run()
    assert registry.kernel_set() == before
