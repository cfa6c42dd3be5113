"""Choosing implementations, and saying truthfully which."""

import re
import subprocess
import sys
import threading

import pytest
import torch
from tests.numerics.kernels.paged_cases import make_case

from weft.kernels import ops, registry
from weft.kernels.registry import Case

pytestmark = pytest.mark.numerics

needs_library = pytest.mark.skipif(len(registry.kernel_sets()) == 1, reason="no compiled kernels on this machine")


def test_every_operation_has_a_reference_and_a_compiled_form() -> None:
    names = {row.operation for row in registry.REFERENCE_ROWS}

    assert names == set(registry.OPERATIONS) == {row.operation for row in registry.COMPILED_ROWS}
    assert names - {"pack_linear"} == set(ops.TOLERANCES)


def test_forcing_a_set_lasts_until_it_is_undone() -> None:
    before = registry.kernel_set()

    with registry.force("reference"):
        assert registry.kernel_set() == f"cpu: torch {torch.__version__}"
        assert registry.find("rms_norm", Case("cpu", torch.float32)).name == "reference"

    assert registry.kernel_set() == before


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"must be one of reference.*Given: sse2"):
        registry.force("sse2")


def test_the_banner_names_instruction_set_and_compiler(compiled: str) -> None:
    assert re.fullmatch(rf"cpu: {compiled} \((gcc|clang) \d+\.\d+.*\)", registry.kernel_set())


@needs_library
def test_only_fixed_order_kernels_claim_to_be_batch_invariant() -> None:
    assert registry.is_batch_invariant(torch.float32)
    assert registry.is_batch_invariant(torch.bfloat16)
    assert registry.is_batch_invariant(torch.float32, head_sizes=[64, 100], block_size=16)
    assert not registry.is_batch_invariant(torch.float16)
    assert not registry.is_batch_invariant(torch.float32, head_sizes=[64, 65])
    assert not registry.is_batch_invariant(torch.float32, block_size=8)
    assert not registry.is_batch_invariant(torch.float32, "cuda")
    with registry.force("reference"):
        assert not registry.is_batch_invariant(torch.float32)


@pytest.mark.parametrize(("head_size", "block_size"), [(65, 32), (64, 12)])
def test_sizes_the_compiled_attention_cannot_do_run_in_the_reference(head_size: int, block_size: int) -> None:
    case = make_case([(2, 20)], head_size=head_size, block_size=block_size)
    exact, _ = case.exact()

    assert registry.find("paged_attention", Case("cpu", torch.float32, head_size, block_size)).name == "reference"
    assert torch.allclose(case.run().double(), exact, atol=1e-5)


def test_a_packed_weight_is_read_by_the_implementation_that_packed_it(compiled: str) -> None:
    x, weight = torch.randn(3, 16), torch.randn(40, 16)
    packed = ops.pack_linear(weight)
    y = ops.linear(x, packed)

    with registry.force("reference"):
        plain = ops.pack_linear(weight)
        assert torch.equal(ops.linear(x, packed), y)
    assert torch.allclose(ops.linear(x, plain), y, atol=1e-5)


def test_without_a_compiler_operations_run_and_the_banner_says_why(without_compiled_kernels: str) -> None:
    assert without_compiled_kernels in registry.kernel_set()
    assert registry.notice() == without_compiled_kernels
    assert registry.kernel_sets() == ("reference",)
    assert make_case([(3, 40)]).run().shape == (3, 4, 64)
    registry.set_threads(1)


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`num_threads` must be >= 1\. Given: 0"):
        registry.set_threads(0)


@needs_library
def test_python_threads_may_call_at_the_same_time() -> None:
    """Calls release the interpreter lock; the pool serves them one after another."""
    registry.set_threads(2)
    packed = ops.pack_linear(torch.randn(700, 300))
    inputs = [torch.randn(rows, 300) for rows in (1, 3, 17, 40)]
    expected = [ops.linear(x, packed) for x in inputs]
    case = make_case([(40, 900)])
    attended = case.run()
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(50):
            if not torch.equal(ops.linear(inputs[index], packed), expected[index]):
                wrong.append(index)
            if not torch.equal(case.run(), attended):
                wrong.append(-1)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong


FORK = """
import os, warnings
import torch
from weft.kernels import ops, registry

warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: forking with threads
registry.set_threads(2)
packed, x = ops.pack_linear(torch.randn(3000, 64)), torch.randn(50, 64)
y = ops.linear(x, packed)
child = os.fork()
same = torch.equal(ops.linear(x, packed), y)
if child == 0:
    os._exit(0 if same else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + (0 if same else 2))
"""


@needs_library
def test_a_forked_process_starts_threads_of_its_own_and_both_end_cleanly() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stderr) == (0, "")
