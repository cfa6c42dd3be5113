"""Will it fit? The division of memory that `weft serve` would make, foretold from a model's headers."""

from dataclasses import dataclass

from weft.config import Settings
from weft.errors import DeviceError
from weft.limits import LIMITS
from weft.models.spec import DTYPE_BYTES, ModelDescription, WeightFormat
from weft.runner import host_memory
from weft.scheduler.config import DEFAULT_BLOCK_SIZE_TOKENS, DEFAULT_MAX_BATCH_PREFILL_TOKENS

_LAYER_BITS = {"int8": 8, "int4": 4}
_GROUP_SCALE_BYTES = 4
"""A scale and a minimum in half precision."""
_OUTPUT_BYTES = 12
"""Sums of codes and what fills the last panel, per output; found by loading models of several widths."""

STREAM_LENGTHS_TOKENS = (1024, 4096, 16384)
"""Contexts for which the number of streams is told, beside the longest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the model would run on."""

    device_type: str
    available_bytes: int
    """Per rank, before anything is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Sizes are per rank, in bytes; lengths are in tokens."""

    model_type: str
    pooling: str
    """How texts become vectors; empty: the model generates text."""
    stored_dtype: str
    dtype: str
    """Of activations, and of cached keys and values."""
    weights_kept_as: str
    """The dtype, or the format with fewer bits that weights are multiplied in."""
    num_parameters: int
    world_size: int
    weights_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    available_bytes: int
    kv_pool_bytes: int
    pool_tokens: int
    model_context: int
    """The longest sequence that the model knows."""
    context: int
    """The longest sequence that would be served; 0 when nothing fits."""
    streams: dict[int, int]
    """Length of a sequence → how many of them the pool holds at once, within the limits on sequences."""
    missing_bytes: int
    """What is short; 0 when it fits."""

    @property
    def fits(self) -> bool:
        """Whether a server would start."""
        return self.missing_bytes == 0


def forecast(
    description: ModelDescription, settings: Settings, machine: Machine, dtype: str, file_bytes: int = 0
) -> Forecast:
    """Divide the memory as the start-up does: weights first, then activations, then the pool.

    dtype        of activations, and of weights: quantized files are decoded while they are loaded unless
                 `--gguf-compute packed` keeps them, and `--quantize` rounds what is loaded
    file_bytes   of a GGUF file

    Raises   DoesNotFitError: more ranks than heads
             DeviceError: weights, keys or values of few bits anywhere but on the CPU
    """
    world_size = settings.num_shard or 1
    block_size = settings.block_size_tokens or DEFAULT_BLOCK_SIZE_TOKENS[machine.device_type]
    all_weights_bytes, weights_kept_as = _weights(description, settings, machine.device_type, dtype, file_bytes)
    weights_bytes = -(-all_weights_bytes // world_size)
    per_token = description.kv_bytes_per_token(
        settings.kv_dtype_name(dtype, machine.device_type), world_size=world_size
    )
    num_sequences = settings.max_batch_size or min(LIMITS.max_num_sequences, settings.max_concurrent_requests)
    activation_bytes = host_memory.activation_bytes(
        max_step_tokens=settings.max_batch_prefill_tokens
        or min(DEFAULT_MAX_BATCH_PREFILL_TOKENS, description.max_positions),
        max_step_rows=num_sequences,
        hidden_size=description.hidden_size,
        widest_layer=description.widest_layer,
        vocab_size=description.vocab_size,
        element_bytes=DTYPE_BYTES[dtype],
    )
    left_bytes = machine.available_bytes - weights_bytes
    usable_bytes = left_bytes - activation_bytes
    wanted_bytes = settings.kv_pool_bytes or _default_pool_bytes(machine, left_bytes, usable_bytes)
    num_blocks = max(0, min(wanted_bytes, usable_bytes)) // (per_token * block_size)
    if settings.max_batch_total_tokens is not None:
        num_blocks = min(num_blocks, max(1, -(-settings.max_batch_total_tokens // block_size)))
    pool_tokens = num_blocks * block_size
    least_bytes = settings.kv_pool_bytes or per_token * block_size
    wanted_context = min(settings.max_total_tokens or description.max_positions, description.max_positions)
    # The last token of a sequence is sampled and never stored; a text that becomes a vector has no such token.
    context = min(wanted_context, pool_tokens + (description.pooling is None)) if pool_tokens else 0
    return Forecast(
        model_type=description.model_type,
        pooling="" if description.pooling is None else description.pooling.mode,
        stored_dtype=description.stored_dtype,
        dtype=dtype,
        weights_kept_as=weights_kept_as,
        num_parameters=description.num_parameters,
        world_size=world_size,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=per_token,
        activation_bytes=activation_bytes,
        available_bytes=machine.available_bytes,
        kv_pool_bytes=num_blocks * per_token * block_size,
        pool_tokens=pool_tokens,
        model_context=description.max_positions,
        context=context,
        streams=_streams(context, pool_tokens, block_size, num_sequences),
        missing_bytes=max(0, least_bytes - usable_bytes),
    )


def _weights(
    description: ModelDescription, settings: Settings, device_type: str, dtype: str, file_bytes: int
) -> tuple[int, str]:
    """(bytes of all ranks together, what they are kept as)."""
    is_packed = settings.gguf_compute == "packed" and description.weight_format is WeightFormat.GGUF
    if settings.quantize is None and not is_packed:
        return description.weights_bytes(dtype), dtype
    if device_type != "cpu":
        flag = f"--quantize: {settings.quantize}" if settings.quantize else "--gguf-compute: packed"
        raise DeviceError(f"{flag} has kernels for the CPU. Use --device cpu, or leave it out.")
    if settings.quantize is None:
        return file_bytes, f"{description.stored_dtype} (packed)"
    group_size = int(settings.quantize_group_size)
    name = f"int4 (groups of {group_size})" if settings.quantize == "int4" else settings.quantize
    return _rounded_bytes(description, _LAYER_BITS[settings.quantize], group_size, DTYPE_BYTES[dtype]), name


def _rounded_bytes(description: ModelDescription, layer_bits: int, group_size: int, element_bytes: int) -> int:
    """Matrices with few bits per weight, the vocabulary always with 8; norms and biases in full."""

    def matrix_bytes(out_features: int, in_features: int, bits: int) -> int:
        scale_bytes = _GROUP_SCALE_BYTES * (1 if bits == 8 else -(-in_features // group_size))
        return out_features * (in_features * bits // 8 + scale_bytes + _OUTPUT_BYTES)

    spec = description.spec
    linears = [linear for layer in spec.layers for linear in layer.linears()]
    num_vocabularies = 1 if spec.is_tied else 2
    in_matrices = sum(linear.out_features * linear.in_features for linear in linears)
    in_matrices += num_vocabularies * spec.vocab_size * spec.hidden_size
    return (
        sum(matrix_bytes(linear.out_features, linear.in_features, layer_bits) for linear in linears)
        + num_vocabularies * matrix_bytes(spec.vocab_size, spec.hidden_size, 8)
        + (description.num_parameters - in_matrices) * element_bytes
    )


def _default_pool_bytes(machine: Machine, left_bytes: int, usable_bytes: int) -> int:
    return host_memory.default_pool_bytes(left_bytes) if machine.device_type == "cpu" else usable_bytes


def _streams(context: int, pool_tokens: int, block_size: int, num_sequences: int) -> dict[int, int]:
    lengths = sorted({length for length in STREAM_LENGTHS_TOKENS if length < context} | {context})
    return {
        length: min(num_sequences, pool_tokens // (block_size * -(-max(length - 1, 1) // block_size)))
        for length in lengths
        if length
    }
