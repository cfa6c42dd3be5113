"""A model as a flat program that the compiled kernels run with one call per step.

A program is recorded, not written: the model runs once on a small batch, each operation it calls is noted with its
weights, sizes and operands, and what depends on the batch becomes a place to fill in. So there is one definition of a
model, the one in `models/`, and a program is to it what a CUDA graph is on a GPU. Activations live in buffers that are
shared out by how long each is needed; their sizes follow the number of rows of a step.

The structures mirror those of `program.h`; a size that differs is a bug of the build and raises when first used.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from weft.errors import InvariantBroken
from weft.kernels import recording
from weft.kernels.cpu.operations import ACTIVATION_CODES, DTYPE_CODES, KV_DTYPE_CODES, library
from weft.kernels.packed import PackedLinear

_OPERATIONS = (
    "embedding",
    "linear",
    "rms_norm",
    "rotary_and_store",
    "paged_attention",
    "gated_activation",
    "take_rows",
    "softcap",
    "greedy",
)
_EXACT = frozenset({"embedding", "take_rows"})
"""Operations that give the same bits in every implementation."""
_NEEDS = dict.fromkeys(
    ("rotary_and_store", "paged_attention"), "an even head size and blocks of at least 16 tokens (--block-size-tokens)"
)
"""What makes an operation run on other kernels than the compiled ones, for people."""
_INDICES = ("token_ids", "positions", "kv_slots", "query_starts", "context_lens", "block_tables", "logit_rows")
"""What every step brings, by the names of `StepTensors` and of `Step` in program.h."""
_ALIGNMENT_BYTES = 64
_NO_BUFFER = -1


class NotExpressible(Exception):
    """The model does something that a program cannot hold; the message says what. It runs operation by operation."""


class LayerTensors(Protocol):
    """Keys and values `[N, Hkv, B, W]` of one layer, see `kv_layout`."""

    @property
    def keys(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def values(self) -> torch.Tensor: ...  # noqa: D102


class StepTensors(Protocol):
    """What a step brings; `models.forward_batch.ForwardBatch` says what each tensor is."""

    @property
    def token_ids(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def positions(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def kv_slots(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def query_starts(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def context_lens(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def block_tables(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def logit_rows(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def kv(self) -> Sequence[LayerTensors]: ...  # noqa: D102


class _Operand(Structure):
    _fields_ = (("buffer", c_int32), ("dtype", c_int32), ("offset", c_int64), ("stride", c_int64))


class _PackedWeight(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("dtype", c_int32),
        ("layout", c_int32),
    )


class _Instruction(Structure):
    _fields_ = (
        ("operation", c_int32),
        ("rows", c_int32),
        ("inputs", _Operand * 3),
        ("outputs", _Operand * 2),
        ("linear", _PackedWeight),
        ("weight", c_void_p),
        ("width", c_int64),
        ("inner", c_int64),
        ("query_heads", c_int64),
        ("kv_heads", c_int64),
        ("head_size", c_int64),
        ("rotary_size", c_int64),
        ("table_rows", c_int64),
        ("window", c_int64),
        ("layer", c_int32),
        ("activation", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("eps", c_float),
        ("weight_offset", c_float),
    )


class _Step(Structure):
    _fields_ = (
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("kv_slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("logit_rows", c_void_p),
        ("tokens", c_int64),
        ("sequences", c_int64),
        ("logits", c_int64),
        ("table_stride", c_int64),
        ("table_width", c_int64),
        ("num_blocks", c_int64),
        ("block_size", c_int64),
        ("kv_dtype", c_int32),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("buffers", POINTER(c_void_p)),
        ("nanoseconds", POINTER(c_int64)),
    )


@dataclass(eq=False)
class _Value:
    """An activation: rows of `width` elements, one per token (`of_logits` False) or one per row of logits."""

    tensor: torch.Tensor
    """From the recording; kept so that no other tensor can take its address."""
    of_logits: bool
    width: int
    first: int
    """The instruction that makes it."""
    last: int
    """The instruction that reads it last."""
    buffer: int = _NO_BUFFER

    @property
    def row_bytes(self) -> int:
        return self.width * self.tensor.element_size()


@dataclass(slots=True)
class _Buffer:
    of_logits: bool
    row_bytes: int
    free_from: int
    """The first instruction that may write something else into it."""


@dataclass(slots=True)
class _Call:
    """One instruction before buffers are known."""

    instruction: _Instruction
    label: str
    inputs: list[tuple[int, "_Value", int, int]] = field(default_factory=list)
    """(place, value, offset, stride)"""
    outputs: list[tuple[int, "_Value"]] = field(default_factory=list)


class Arena:
    """Memory for the activations of one step at a time; programs that never run at once may share one."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.generation = 0
        """Changes with the memory."""

    def reserve(self, num_bytes: int) -> None:
        """Hold at least this much, touched as far as it is used."""
        if self.memory.numel() < num_bytes:
            self.memory = torch.empty(num_bytes, dtype=torch.uint8)
            self.generation += 1


def record(
    function: Callable[[Any], torch.Tensor | tuple[torch.Tensor, ...]], batch: StepTensors, arena: Arena
) -> "Program":
    """Runs `function(batch)` and returns a program that computes the same for any batch.

    The batch must have different numbers of tokens and of rows of logits, both above one. Raises NotExpressible.
    """
    recorder = _Recorder(batch)
    with recording.watch(recorder):
        results = function(batch)
    return recorder.program((results,) if isinstance(results, torch.Tensor) else results, arena)


class _Recorder:
    """Turns calls of operations into instructions."""

    def __init__(self, batch: StepTensors) -> None:
        num_tokens, num_logits = len(batch.token_ids), len(batch.logit_rows)
        if min(num_tokens, num_logits) < 2 or num_tokens == num_logits:
            raise ValueError(f"a batch of {num_tokens} tokens and {num_logits} rows of logits tells them not apart")
        self._batch = batch
        self._num_rows = (num_tokens, num_logits)
        self._calls: list[_Call] = []
        self._values: dict[int, _Value] = {}
        """By address of the storage."""
        self._kept: list[torch.Tensor] = []
        """Weights, whose addresses the program holds."""
        self._fault = ""

    def record(
        self,
        implementation: recording.Implementation,
        arguments: tuple[object, ...],
        options: dict[str, object],
        result: object,
    ) -> None:
        """See `recording.Recorder`."""
        del options  # bounds that compiled kernels find themselves
        name = implementation.operation
        if implementation.name != "compiled" and name not in _EXACT:
            needs = f", and the compiled ones need {_NEEDS[name]}" if name in _NEEDS else ""
            raise NotExpressible(f"{name} runs on the {implementation.name} kernels{needs}")
        describe = getattr(self, f"_{name}", None)
        if describe is None:
            raise NotExpressible(f"programs have no {name}")
        describe(*arguments, *(() if result is None else (result,)))

    def program(self, results: Sequence[torch.Tensor], arena: Arena) -> "Program":
        """The program whose results are the given tensors."""
        values = [self._value_of(result, "a result") for result in results]
        for value in values:
            value.last = len(self._calls)
        buffers = _share_buffers(list(self._values.values()))
        for call in self._calls:
            for place, made in call.outputs:
                code = DTYPE_CODES.get(made.tensor.dtype, 0)
                call.instruction.outputs[place] = _Operand(made.buffer, code, 0, made.width)
            for place, used, offset, stride in call.inputs:
                code = DTYPE_CODES[used.tensor.dtype]
                call.instruction.inputs[place] = _Operand(used.buffer, code, offset, stride)
        return Program(
            [call.instruction for call in self._calls],
            [call.label for call in self._calls],
            [(buffer.of_logits, buffer.row_bytes) for buffer in buffers],
            [
                Output(value.buffer, value.of_logits, value.width, value.tensor.dtype, value.tensor.dim() == 1)
                for value in values
            ],
            len(self._batch.kv),
            self._kept,
            arena,
        )

    # One method per operation: its arguments, then its result if it has one.

    def _embedding(self, token_ids: torch.Tensor, packed: PackedLinear, scale: float, rows: torch.Tensor) -> None:
        self._require_own(token_ids, self._batch.token_ids, "token ids")
        call = self._begin("embedding", of_logits=False, label="embedding")
        call.instruction.linear = self._weight(packed, as_table=True)
        call.instruction.scale = scale
        self._end(call, rows)

    def _linear(
        self,
        x: torch.Tensor,
        packed: PackedLinear,
        out_dtype: torch.dtype | None,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> None:
        del out_dtype  # that of the result
        label = f"linear {packed.in_features} → {packed.out_features}"
        call = self._begin("linear", of_logits=self._value_of(x, "x").of_logits, label=label)
        self._use(call, x, residual)
        call.instruction.linear = self._weight(packed)
        self._end(call, y)

    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, y: torch.Tensor
    ) -> None:
        self._norm(x, None, weight, (eps, weight_offset), y)

    def _add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        both: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._norm(x, residual, weight, (eps, weight_offset), *both)

    def _norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        numbers: tuple[float, float],
        *results: torch.Tensor,
    ) -> None:
        call = self._begin("rms_norm", of_logits=self._value_of(x, "x").of_logits, label="norm")
        self._use(call, x, residual)
        instruction = call.instruction
        instruction.weight = self._keep(weight)
        instruction.width, instruction.inner = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
        instruction.eps, instruction.weight_offset = numbers
        self._end(call, *results)

    def _rotary_and_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        self._require_own(positions, self._batch.positions, "positions")
        self._require_own(kv_slots, self._batch.kv_slots, "pool slots")
        call = self._begin("rotary_and_store", of_logits=False, label="rotary and store")
        self._use(call, q, k, v)
        instruction = call.instruction
        instruction.weight = self._keep(cos_sin)
        instruction.table_rows, instruction.rotary_size = cos_sin.shape
        self._describe_heads(instruction, q, keys, values)

    def _paged_attention(  # noqa: PLR0913, PLR0917 - the arguments of `ops.paged_attention`
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        softcap: float,
        window: int,
        attended: torch.Tensor,
    ) -> None:
        self._require_own(block_tables, self._batch.block_tables, "block tables")
        self._require_own(query_starts, self._batch.query_starts, "row starts")
        self._require_own(context_lens, self._batch.context_lens, "context lengths")
        call = self._begin("paged_attention", of_logits=False, label="attention")
        self._use(call, q)
        instruction = call.instruction
        instruction.scale, instruction.softcap, instruction.window = scale, softcap, window
        self._describe_heads(instruction, q, keys, values)
        self._end(call, attended)

    def _gated_activation(self, x: torch.Tensor, kind: str, y: torch.Tensor) -> None:
        call = self._begin("gated_activation", of_logits=self._value_of(x, "x").of_logits, label="activation")
        self._use(call, x)
        call.instruction.width, call.instruction.activation = y.shape[1], ACTIVATION_CODES[kind]
        self._end(call, y)

    def _take_rows(self, x: torch.Tensor, rows: torch.Tensor, taken: torch.Tensor) -> None:
        self._require_own(rows, self._batch.logit_rows, "rows of logits")
        call = self._begin("take_rows", of_logits=True, label="rows")
        self._use(call, x)
        call.instruction.width = x.shape[1]
        self._end(call, taken)

    def _softcap(self, x: torch.Tensor, cap: float) -> None:
        call = self._begin("softcap", of_logits=self._value_of(x, "x").of_logits, label="softcap")
        self._use(call, x)
        call.instruction.width, call.instruction.softcap = x.shape[1], cap

    def _greedy(self, logits: torch.Tensor, chosen: tuple[torch.Tensor, torch.Tensor]) -> None:
        call = self._begin("greedy", of_logits=self._value_of(logits, "logits").of_logits, label="greedy")
        self._use(call, logits)
        call.instruction.width = logits.shape[1]
        self._end(call, *chosen)

    def _describe_heads(
        self, instruction: _Instruction, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        pools = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in self._batch.kv]
        pool = keys.data_ptr(), values.data_ptr()
        if pool not in pools:
            raise NotExpressible("keys and values are not one layer of the pool")
        instruction.layer = pools.index(pool)
        instruction.query_heads, instruction.head_size = q.shape[1], q.shape[2]
        instruction.kv_heads = keys.shape[1]

    def _begin(self, operation: str, *, of_logits: bool, label: str) -> _Call:
        instruction = _Instruction(operation=_OPERATIONS.index(operation), rows=int(of_logits))
        for operands in (instruction.inputs, instruction.outputs):
            for place in range(len(operands)):
                operands[place].buffer = _NO_BUFFER
        call = _Call(instruction, label)
        self._calls.append(call)
        return call

    def _use(self, call: _Call, *tensors: torch.Tensor | None) -> None:
        # Rows are taken from those of all tokens; everything else works on rows of its own kind.
        of_logits = bool(call.instruction.rows) and call.instruction.operation != _OPERATIONS.index("take_rows")
        for place, x in enumerate(tensors):
            if x is None:
                continue
            value = self._value_of(x, f"operand {place + 1} of {call.label}")
            offset = (x.data_ptr() - value.tensor.data_ptr()) // x.element_size()
            is_row_by_row = len(x) == self._num_rows[value.of_logits] and x.stride(0) == value.width
            if not (is_row_by_row and x.dtype == value.tensor.dtype and value.of_logits == of_logits):
                raise NotExpressible(f"operand {place + 1} of {call.label} is no run of columns of another's result")
            value.last = len(self._calls) - 1
            call.inputs.append((place, value, offset, x.stride(0)))

    def _end(self, call: _Call, *results: torch.Tensor) -> None:
        place_of_call = len(self._calls) - 1
        for place, result in enumerate(results):
            of_logits = bool(call.instruction.rows)
            width = result.numel() // len(result)
            value = _Value(result, of_logits, width, first=place_of_call, last=place_of_call)
            self._values[result.untyped_storage().data_ptr()] = value
            call.outputs.append((place, value))

    def _value_of(self, x: torch.Tensor, name: str) -> _Value:
        value = self._values.get(x.untyped_storage().data_ptr())
        if value is None:
            raise NotExpressible(f"{name} comes from an operation that was not seen")
        return value

    def _weight(self, packed: PackedLinear, *, as_table: bool = False) -> _PackedWeight:
        layout = library().weft_find_layout(packed.layout.encode(), as_table)
        if layout < 0:
            raise NotExpressible(f"weights are packed as `{packed.layout}`, which the compiled program does not read")
        if packed.dtype not in DTYPE_CODES:
            raise NotExpressible(f"{str(packed.dtype).removeprefix('torch.')} has no compiled kernels")
        return _PackedWeight(
            data=self._keep(packed.data),
            bias=None if packed.bias is None else self._keep(packed.bias),
            scales=None if packed.scales is None else self._keep(packed.scales),
            out_features=packed.out_features,
            in_features=packed.in_features,
            dtype=DTYPE_CODES[packed.dtype],
            layout=layout,
        )

    def _keep(self, weight: torch.Tensor) -> int:
        if weight.untyped_storage().data_ptr() in self._values:
            raise NotExpressible("a weight is computed in the step")
        self._kept.append(weight)
        return weight.data_ptr()

    @staticmethod
    def _require_own(given: torch.Tensor, own: torch.Tensor, name: str) -> None:
        if given.data_ptr() != own.data_ptr() or given.shape != own.shape:
            raise NotExpressible(f"an operation has its own {name}")


def _share_buffers(values: list[_Value]) -> list[_Buffer]:
    """Gives each value a buffer that no value needed at the same time has, the best fitting one first."""
    buffers: list[_Buffer] = []
    for value in sorted(values, key=lambda value: value.first):
        free = [
            index
            for index, buffer in enumerate(buffers)
            if buffer.of_logits == value.of_logits and buffer.free_from <= value.first
        ]
        if free:
            value.buffer = min(free, key=lambda index: abs(buffers[index].row_bytes - value.row_bytes))
            buffer = buffers[value.buffer]
            buffer.row_bytes = max(buffer.row_bytes, value.row_bytes)
        else:
            value.buffer = len(buffers)
            buffer = _Buffer(value.of_logits, value.row_bytes, 0)
            buffers.append(buffer)
        # What an instruction reads must outlive what it writes.
        buffer.free_from = value.last + 1
    return buffers


@dataclass(frozen=True, slots=True)
class Output:
    """Where a result of a program lies."""

    buffer: int
    of_logits: bool
    width: int
    dtype: torch.dtype
    is_column: bool
    """[rows] instead of [rows, 1]"""

    def cut(self, memory: torch.Tensor, start: int, rows: tuple[int, int]) -> torch.Tensor:
        """The result as a view of the arena. `rows`: tokens, rows of logits."""
        num_rows = rows[self.of_logits]
        run = memory[start : start + num_rows * self.width * self.dtype.itemsize].view(self.dtype)
        return run if self.is_column else run.view(num_rows, self.width)


class Program:
    """A recorded model: `run` computes what the recorded function computes, bit for bit, in one call."""

    def __init__(
        self,
        instructions: Sequence[_Instruction],
        labels: Sequence[str],
        buffers: Sequence[tuple[bool, int]],
        outputs: Sequence[Output],
        num_layers: int,
        kept: Sequence[torch.Tensor],
        arena: Arena,
    ) -> None:
        if library().weft_instruction_bytes() != ctypes.sizeof(_Instruction) or (
            library().weft_step_bytes() != ctypes.sizeof(_Step)
        ):
            raise InvariantBroken("the compiled kernels were built from another program.h")
        self._instructions = (_Instruction * len(instructions))(*instructions)
        self._labels = list(labels)
        self._buffers = list(buffers)
        self._outputs = list(outputs)
        self._num_layers = num_layers
        self._kept = list(kept)
        self._arena = arena
        self._pointers = (c_void_p * len(buffers))()
        self._place = (-1, -1, -1)
        """Tokens, rows of logits and generation of the arena that pointers and results belong to."""
        self._results: tuple[torch.Tensor, ...] = ()
        self._kv: Sequence[LayerTensors] = ()
        self._keys = (c_void_p * num_layers)()
        self._values = (c_void_p * num_layers)()
        self._bound: StepTensors | None = None
        self._step = _Step(buffers=self._pointers)

    @property
    def num_operations(self) -> int:
        """Instructions of the program."""
        return len(self._labels)

    def arena_bytes(self, num_tokens: int, num_logits: int) -> int:
        """Memory for the activations of a step."""
        rows = (num_tokens, num_logits)
        return sum(_aligned(rows[of_logits] * row_bytes) for of_logits, row_bytes in self._buffers)

    def reserve(self, num_tokens: int, num_logits: int) -> None:
        """Take the memory for steps up to a size, so that none of them has to."""
        self._arena.reserve(self.arena_bytes(num_tokens, num_logits))

    def run(self, batch: StepTensors) -> tuple[torch.Tensor, ...]:
        """The results for a batch; they are overwritten by the next run.

        Raises   InvariantBroken: an index of the batch is out of range (nothing was computed)
        """
        return self._run(batch, None)

    def time_operations(self, batch: StepTensors) -> dict[str, int]:
        """Runs a batch and tells the nanoseconds spent in each kind of operation, in order of appearance."""
        nanoseconds = (c_int64 * len(self._labels))()
        self._run(batch, nanoseconds)
        spent: dict[str, int] = {}
        for label, duration in zip(self._labels, nanoseconds, strict=True):
            spent[label] = spent.get(label, 0) + duration
        return spent

    def _run(self, batch: StepTensors, nanoseconds: "ctypes.Array[c_int64] | None") -> tuple[torch.Tensor, ...]:
        step, place = self._step, c_int64()
        self._bind_pool(batch.kv)
        self._bind_batch(batch)
        self._lay_out(step.tokens, step.logits)
        step.nanoseconds = nanoseconds
        fault = library().weft_run_step(self._instructions, len(self._labels), ctypes.byref(step), ctypes.byref(place))
        if fault:
            raise InvariantBroken(_describe_fault(fault, place.value, batch))
        return self._results

    def _bind_pool(self, kv: Sequence[LayerTensors]) -> None:
        if kv is self._kv:
            return
        if len(kv) != self._num_layers:
            raise InvariantBroken(f"the pool has {len(kv)} layers, the program {self._num_layers}")
        for index, layer in enumerate(kv):
            self._keys[index], self._values[index] = layer.keys.data_ptr(), layer.values.data_ptr()
        step, pool = self._step, kv[0].keys
        step.keys, step.values = self._keys, self._values
        step.num_blocks, step.block_size = pool.shape[0], pool.shape[2]
        step.kv_dtype = KV_DTYPE_CODES[pool.dtype]
        self._kv = kv

    def _bind_batch(self, batch: StepTensors) -> None:
        """Point the step at the tensors of a batch. Steady decoding brings the same one filled anew."""
        if batch is self._bound:
            return
        given = tuple(getattr(batch, name) for name in _INDICES)
        token_ids, _, _, _, _, block_tables, logit_rows = given
        num_tokens, num_sequences, num_logits = len(token_ids), len(block_tables), len(logit_rows)
        lengths = (num_tokens, num_tokens, num_tokens, num_sequences + 1, num_sequences, num_sequences, num_logits)
        step = self._step
        for name, x, length in zip(_INDICES, given, lengths, strict=True):
            if x.dtype != torch.int32 or not x.is_contiguous() or len(x) != length:
                raise InvariantBroken(
                    f"{name} must be contiguous int32 of {length} rows. Given: {list(x.shape)} {x.dtype}"
                )
            setattr(step, name, x.data_ptr())
        step.tokens, step.sequences, step.logits = num_tokens, num_sequences, num_logits
        step.table_width = step.table_stride = block_tables.shape[1]
        self._bound = batch

    def _lay_out(self, num_tokens: int, num_logits: int) -> None:
        """Place the buffers and results for a step, unless they lie there from the last one."""
        if (num_tokens, num_logits, self._arena.generation) == self._place:
            return
        self._arena.reserve(self.arena_bytes(num_tokens, num_logits))
        memory, rows = self._arena.memory, (num_tokens, num_logits)
        starts: list[int] = []
        offset = 0
        for index, (of_logits, row_bytes) in enumerate(self._buffers):
            starts.append(offset)
            self._pointers[index] = memory.data_ptr() + offset
            offset += _aligned(rows[of_logits] * row_bytes)
        self._results = tuple(output.cut(memory, starts[output.buffer], rows) for output in self._outputs)
        self._place = (num_tokens, num_logits, self._arena.generation)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _describe_fault(fault: int, index: int, batch: StepTensors) -> str:
    names = ("token_ids", "positions", "kv_slots")
    if fault <= len(names):
        name = names[fault - 1]
        return f"row {index}: {name} {int(getattr(batch, name)[index])} is out of range"
    if fault == len(names) + 1:
        rows = batch.query_starts[index : index + 2].tolist()
        return f"sequence {index}: rows {rows}, context {int(batch.context_lens[index])} and its blocks do not fit"
    return f"row {int(batch.logit_rows[index])} of logits is asked for of {batch.token_ids.shape[0]} rows"
