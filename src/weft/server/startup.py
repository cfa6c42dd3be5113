"""From settings to a rank that can run steps: meet the other ranks, read weights, size the KV pool, warm up.

Each phase is timed and reported as a log event (`startup.progress`), which the launcher turns into what clients see
while they wait. Ranks agree on the number of blocks by taking the least; everything else follows from the settings.
A context that memory cannot hold is clipped and named, never a reason not to start.
"""

import platform
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch

from weft.config import Settings
from weft.core.info import EngineInfo, QualityReceipt
from weft.core.plan import SequenceStart, StepPlan
from weft.core.request import Pooling, RequestId, SamplingParams, Slot, StopConditions
from weft.errors import DeviceError, DoesNotFitError, InvariantBroken
from weft.kernels import processor
from weft.kernels import registry as kernel_registry
from weft.limits import LIMITS
from weft.models import registry as model_registry
from weft.models.decoder import Decoder, load_decoder
from weft.models.quant.gguf_packed import GgufPacked
from weft.models.quant.rounded import rounded_scheme
from weft.models.quant.scheme import QuantScheme, Unquantized
from weft.models.spec import LongRopeScaling, ModelDescription, WeightFormat
from weft.parallel.groups import Group, SoloGroup, join_group
from weft.runner import graphs, memory
from weft.runner.kv_pool import KvPool
from weft.runner.memory import KvShape, MemoryPlan
from weft.runner.pooling import EmbeddingRunner
from weft.runner.runner import Model, ModelRunner
from weft.runner.sampling.watermark import WatermarkSettings
from weft.runner.worker import Runner
from weft.scheduler.config import DEFAULT_BLOCK_SIZE_TOKENS, DEFAULT_MAX_BATCH_PREFILL_TOKENS, SchedulerConfig
from weft.server import quality
from weft.server.fingerprint import NumericConfiguration, digest_of_weights, fingerprint

log = structlog.get_logger("weft.startup")

DEFAULT_INTER_TOKEN_TARGET_MS = {"cpu": 80.0, "cuda": 30.0}
_ATTENTION_SLOWNESS = 2.0
"""Time of a multiply-add in attention over that of one in a linear layer, roughly: 1.3 beside weights of 16 bits on a
CPU, 2.3 beside weights of 8 and 4."""
MIN_TOTAL_TOKENS = 2
WARMUP_TOKENS = 64
RENDEZVOUS_TIMEOUT_S = 120.0
PROGRESS_STEP_PERCENT = 10.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {**_DTYPES, "int8": torch.int8}
_NS_PER_MS = 1_000_000


COMPILING_NOTICE = "compiling kernels for this processor, which only the first start does and takes a minute or more"


class PhaseTimer:
    """Says what the process is doing and remembers how long each phase took."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._announced = 0.0

    @contextmanager
    def phase(self, name: str, message: str = "") -> Iterator[None]:
        """Time one phase; it is announced when it begins. `message`: why it takes long, for people."""
        self.progress(name, 0.0, message)
        begin = time.monotonic()
        yield
        self.seconds.append((name, time.monotonic() - begin))

    def progress(self, name: str, percent: float, message: str = "") -> None:
        """Announce how far a phase has come, 0–100; small steps are left out."""
        if 0.0 < percent < self._announced + PROGRESS_STEP_PERCENT:
            return
        self._announced = percent
        fields = {"message": message} if message else {}
        log.info("startup.progress", phase=name, percent=round(percent, 1), **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRank:
    """A rank that can run steps."""

    runner: Runner
    info: EngineInfo
    scheduler_config: SchedulerConfig
    group: Group


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What the model runs on and how its numbers are kept."""

    device: torch.device
    dtype_name: str
    kv_dtype_name: str
    block_size_tokens: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype_name]

    @property
    def kv_dtype(self) -> torch.dtype:
        return _KV_DTYPES[self.kv_dtype_name]


def start_rank(settings: Settings, *, rank: int, world_size: int, timer: PhaseTimer) -> StartedRank:
    """Bring up one rank of the group.

    Raises   ModelNotFoundError, DoesNotFitError, DeviceError: with a text for the user
    """
    with timer.phase("inspect"):
        layout = _choose_layout(settings, rank)
        description = _within_context(describe_model(settings), settings)
        scheme = choose_scheme(settings, description, layout.device)
    with timer.phase("kernels", COMPILING_NOTICE if kernel_registry.must_compile() else ""):
        configure_kernels(settings)
    with timer.phase("connect"):
        group = connect_ranks(settings, rank, world_size, layout.device)
    with timer.phase("load"), ThreadPoolExecutor(1) as beside:
        digest = beside.submit(digest_of_weights, Path(settings.model_path))
        decoder = load_decoder(
            Path(settings.model_path),
            description,
            dtype=layout.dtype,
            device=layout.device,
            group=group,
            progress=lambda share: timer.progress("load", 100.0 * share),
            scheme=scheme,
        )
        weights_digest = digest.result()
    numerics = _numeric_configuration(settings, description, layout, world_size, scheme)
    receipt = _quality(settings, description, decoder, layout, group, numerics, weights_digest, timer)
    with timer.phase("allocate"):
        plan = _plan_memory(settings, description, decoder, layout, group)
        config = _scheduler_config(settings, description, layout, plan)
        runner = _build_runner(settings, description, decoder, layout, plan, config, group)
    with timer.phase("warmup"):
        warm_up(runner, config, None if description.pooling is None else description.pooling.mode)
    info = _engine_info(settings, description, layout, plan, config, world_size, timer, numerics)
    device = info.device_name if layout.device.type != "cpu" else ""
    info = replace(info, fingerprint=fingerprint(weights_digest, numerics, device), quality=receipt)
    return StartedRank(runner=runner, info=info, scheduler_config=config, group=group)


def measure_quality(settings: Settings) -> tuple[str, NumericConfiguration, QualityReceipt]:
    """What few bits cost a model, measured whatever is known already: digest of its weights, configuration, receipt.

    Raises   as `start_rank`
    """
    layout = _choose_layout(settings, rank=0)
    configure_kernels(settings)
    path, group = Path(settings.model_path), SoloGroup()
    description = _within_context(model_registry.describe(path, model_registry.Use("generate")), settings)
    scheme = choose_scheme(settings, description, layout.device)
    numerics = _numeric_configuration(settings, description, layout, group.world_size, scheme)
    decoder = load_decoder(path, description, dtype=layout.dtype, device=layout.device, group=group, scheme=scheme)
    receipt = _measured_quality(settings, description, decoder, layout, group)
    return digest_of_weights(path), numerics, receipt


def describe_model(settings: Settings) -> ModelDescription:
    """What the files of the model say, for the use that the settings name."""
    use = model_registry.Use(settings.task, settings.pooling)
    return model_registry.describe(Path(settings.model_path), use)


def _within_context(description: ModelDescription, settings: Settings) -> ModelDescription:
    """The model with the context it will be used for: rotary tables and their scaling follow from it."""
    wanted = settings.max_total_tokens or description.max_positions
    return replace(description, max_positions=min(wanted, description.max_positions))


def choose_device(name: str, rank: int) -> torch.device:
    """`auto` takes a GPU when there is one. Raises DeviceError when the one asked for is missing."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise DeviceError(
            "--device: cuda was asked for, and torch finds no GPU. Use --device cpu, or install a driver."
        )
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if rank >= num_devices:
        raise DeviceError(
            f"--num-shard: rank {rank} needs a GPU of its own, and this machine has {num_devices}. "
            f"Use --num-shard {num_devices} or less."
        )
    return torch.device("cuda", rank)


def choose_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if processor.has_bfloat16() else "float32"


def choose_scheme(settings: Settings, description: ModelDescription, device: torch.device) -> QuantScheme:
    """How weights are kept. Raises DeviceError where there are no kernels for what was asked for."""
    flag, asked = ("--quantize", settings.quantize) if settings.quantize else ("--gguf-compute", settings.gguf_compute)
    if asked == "dequantized":
        return Unquantized()
    if device.type != "cpu":
        raise DeviceError(f"{flag}: {asked} has kernels for the CPU. Use --device cpu, or leave it out.")
    if settings.quantize is not None:
        return rounded_scheme(settings.quantize, int(settings.quantize_group_size))
    if description.weight_format != WeightFormat.GGUF:
        return Unquantized()
    return GgufPacked(f"{description.stored_dtype} (packed)")


def configure_kernels(settings: Settings) -> None:
    """Fix kernel set and threads before the first tensor is packed. Raises DeviceError for a set this CPU lacks."""
    if settings.threads is not None:
        kernel_registry.set_threads(settings.threads)
    if settings.kernels == "auto":
        return
    try:
        kernel_registry.force(settings.kernels)
    except ValueError as error:
        raise DeviceError(f"--kernels: {error}") from error


def connect_ranks(settings: Settings, rank: int, world_size: int, device: torch.device) -> Group:
    """Meet the other ranks; alone, there is nobody to meet."""
    if world_size == 1:
        return SoloGroup()
    if settings.master_port is None:
        raise InvariantBroken("several ranks were started without a rendezvous port")
    return join_group(
        rank=rank,
        world_size=world_size,
        address=socket.gethostbyname(settings.master_addr),
        port=settings.master_port,
        device=device,
        timeout_s=RENDEZVOUS_TIMEOUT_S,
    )


def warm_up(runner: Runner, config: SchedulerConfig, pooling: Pooling | None = None) -> None:
    """Run a prefill and, where tokens are made, a decode step through every layer, so that no first request pays.

    What it writes is nobody's: the scheduler hands out every block as empty.
    """
    num_tokens = min(config.max_total_tokens, config.num_blocks * config.block_size_tokens, WARMUP_TOKENS) - 1
    num_blocks = -(-(num_tokens + 1) // config.block_size_tokens)
    start = SequenceStart(
        slot=Slot(0),
        request_id=RequestId(0),
        token_ids=(0,) * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(do_sample=True, top_k=10, top_p=0.9),
        stop=StopConditions(max_new_tokens=2),
        pooling=pooling,
    )
    prefill = StepPlan(
        step_id=0,
        starts=(start,),
        slots=[0],
        first_positions=[0],
        num_tokens=[num_tokens],
        samples=[True],
        new_block_slots=[0] * num_blocks,
        new_block_ids=list(range(num_blocks)),
    )
    decode = StepPlan(step_id=1, slots=[0], first_positions=[num_tokens], num_tokens=[1], samples=[True])
    for plan in (prefill, decode) if pooling is None else (prefill,):
        runner.execute(plan)


def _choose_layout(settings: Settings, rank: int) -> _Layout:
    """Raises DeviceError where there is no device, or none with kernels for what was asked for."""
    device = choose_device(settings.device, rank)
    dtype_name = choose_dtype(settings.dtype, device)
    return _Layout(
        device=device,
        dtype_name=dtype_name,
        kv_dtype_name=settings.kv_dtype_name(dtype_name, device.type),
        block_size_tokens=settings.block_size_tokens or DEFAULT_BLOCK_SIZE_TOKENS[device.type],
    )


def _plan_memory(
    settings: Settings, description: ModelDescription, decoder: Decoder, layout: _Layout, group: Group
) -> MemoryPlan:
    num_kv_heads, head_dim = decoder.kv_shapes[0]
    shape = KvShape(
        num_layers=description.num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size_tokens=layout.block_size_tokens,
        dtype=layout.kv_dtype,
    )
    activation_bytes = memory.estimate_activation_bytes(
        max_step_tokens=_max_batch_prefill_tokens(settings, description),
        max_step_rows=_max_num_sequences(settings),
        hidden_size=description.hidden_size,
        widest_layer=description.widest_layer,
        vocab_size=description.vocab_size,
        dtype=layout.dtype,
    )
    num_ranks_here = group.world_size if layout.device.type == "cpu" else 1
    available_bytes = memory.available_memory_bytes(
        layout.device, num_ranks=num_ranks_here, fraction=settings.cuda_memory_fraction
    )
    plan = memory.plan_memory(
        shape,
        device=layout.device,
        available_bytes=available_bytes,
        weights_bytes=decoder.weights_bytes,
        activation_bytes=activation_bytes,
        pool_bytes=settings.kv_pool_bytes,
        # Whatever holds a block can serve; a longer context is clipped to what fits.
        required_tokens=layout.block_size_tokens,
        max_batch_total_tokens=settings.max_batch_total_tokens,
    )
    return replace(plan, num_blocks=_least(group, plan.num_blocks, layout.device))


def _least(group: Group, number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    if group.world_size == 1:
        return number
    return int(group.all_gather(torch.tensor([number], dtype=torch.int64, device=device)).min())


def _max_batch_prefill_tokens(settings: Settings, description: ModelDescription) -> int:
    return settings.max_batch_prefill_tokens or min(DEFAULT_MAX_BATCH_PREFILL_TOKENS, description.max_positions)


def _max_num_sequences(settings: Settings) -> int:
    return settings.max_batch_size or min(LIMITS.max_num_sequences, settings.max_concurrent_requests)


def _scheduler_config(
    settings: Settings, description: ModelDescription, layout: _Layout, plan: MemoryPlan
) -> SchedulerConfig:
    target_ms = settings.inter_token_target_ms or DEFAULT_INTER_TOKEN_TARGET_MS[layout.device.type]
    return SchedulerConfig(
        max_num_sequences=_max_num_sequences(settings),
        num_blocks=plan.num_blocks,
        block_size_tokens=layout.block_size_tokens,
        max_total_tokens=_max_total_tokens(settings, description, plan),
        vocab_size=description.vocab_size,
        max_batch_prefill_tokens=_max_batch_prefill_tokens(settings, description),
        prefix_key=secrets.token_bytes(32),
        max_batch_total_tokens=None,
        max_batch_size=settings.max_batch_size,
        waiting_served_ratio=settings.waiting_served_ratio,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_queue_requests=LIMITS.max_queue_requests,
        prefix_caching=settings.prefix_caching,
        inter_token_target_ns=int(target_ms * _NS_PER_MS),
        attention_cost=_ATTENTION_SLOWNESS * description.spec.attention_cost,
    )


def _max_total_tokens(settings: Settings, description: ModelDescription, plan: MemoryPlan) -> int:
    """The longest sequence: what the user wants, the model knows and the pool holds."""
    wanted = settings.max_total_tokens or description.max_positions
    if settings.max_total_tokens is not None and settings.max_total_tokens > description.max_positions:
        log.warning(
            "startup.context_clipped",
            flag="--max-total-tokens",
            asked=settings.max_total_tokens,
            given=description.max_positions,
            reason="the model has no positions beyond",
        )
    # The last token of a sequence is sampled and never stored; a text that becomes a vector has no such token.
    fits = plan.max_batch_total_tokens + (description.pooling is None)
    if fits < min(wanted, description.max_positions):
        cap = settings.max_batch_total_tokens
        is_capped = cap is not None and plan.max_batch_total_tokens >= cap
        log.warning(
            "startup.context_clipped",
            flag="--max-batch-total-tokens" if is_capped else "--kv-pool-bytes",
            asked=min(wanted, description.max_positions),
            given=fits,
            reason="the KV pool holds no longer sequence; a larger one allows it",
        )
    granted = min(wanted, description.max_positions, fits)
    if granted < MIN_TOTAL_TOKENS:
        raise DoesNotFitError(f"--max-total-tokens: must be >= {MIN_TOTAL_TOKENS}. Given: {granted}")
    return granted


def _build_runner(
    settings: Settings,
    description: ModelDescription,
    decoder: Decoder,
    layout: _Layout,
    plan: MemoryPlan,
    config: SchedulerConfig,
    group: Group,
) -> Runner:
    pool = _kv_pool(decoder, layout, plan.num_blocks, layout.kv_dtype)
    model = _fastest_form(
        decoder, layout, group, max_step_tokens=_max_batch_prefill_tokens(settings, description), config=config
    )
    if description.pooling is not None:
        return EmbeddingRunner(
            model,
            pool,
            max_num_sequences=config.max_num_sequences,
            max_total_tokens=config.max_total_tokens,
            device=layout.device,
        )
    return ModelRunner(
        model,
        pool,
        max_num_sequences=config.max_num_sequences,
        max_total_tokens=config.max_total_tokens,
        vocab_size=description.vocab_size,
        device=layout.device,
        watermark=WatermarkSettings(settings.watermark_gamma, settings.watermark_delta),
        group=group,
    )


def _kv_pool(decoder: Decoder, layout: _Layout, num_blocks: int, dtype: torch.dtype) -> KvPool:
    num_kv_heads, head_dim = decoder.kv_shapes[0]
    return KvPool(
        num_layers=len(decoder.kv_shapes),
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        block_size_tokens=layout.block_size_tokens,
        head_dim=head_dim,
        dtype=dtype,
        device=layout.device,
    )


def _fastest_form(
    decoder: Decoder, layout: _Layout, group: Group, *, max_step_tokens: int, config: SchedulerConfig
) -> Model:
    """The decoder recorded for replay where that is possible. Both forms give the same bits."""
    if layout.device.type != "cpu":
        return decoder
    try:
        recorded = graphs.record_decoder(
            decoder, group, block_size_tokens=layout.block_size_tokens, dtype=layout.kv_dtype
        )
    except graphs.NotExpressible as reason:
        log.info("startup.one_by_one", reason=str(reason), effect="operations are called one by one, which is slower")
        return decoder
    recorded.reserve(max_step_tokens + config.max_num_sequences, config.max_num_sequences)
    log.info("startup.recorded", num_operations=recorded.num_operations)
    return recorded


def _engine_info(
    settings: Settings,
    description: ModelDescription,
    layout: _Layout,
    plan: MemoryPlan,
    config: SchedulerConfig,
    world_size: int,
    timer: PhaseTimer,
    numerics: NumericConfiguration,
) -> EngineInfo:
    device_type = layout.device.type
    return EngineInfo(
        model_id=settings.shown_model_name,
        revision=settings.revision or "",
        model_type=description.model_type,
        num_parameters=description.num_parameters,
        dtype=layout.dtype_name,
        quantization=numerics.weights or _stored_quantization(description),
        device_type=device_type,
        device_name=_device_name(layout.device),
        kernel_set=kernel_registry.kernel_set(device_type),
        vocab_size=description.vocab_size,
        max_total_tokens=config.max_total_tokens,
        max_batch_prefill_tokens=config.max_batch_prefill_tokens,
        max_batch_total_tokens=plan.max_batch_total_tokens,
        max_num_sequences=config.max_num_sequences,
        block_size_tokens=config.block_size_tokens,
        num_blocks=plan.num_blocks,
        weights_bytes=plan.weights_bytes,
        kv_pool_bytes=plan.kv_bytes,
        activation_bytes=plan.activation_bytes,
        free_bytes=plan.free_bytes,
        prefix_caching=config.prefix_caching,
        batch_invariant=kernel_registry.is_batch_invariant(
            layout.dtype,
            device_type,
            head_sizes=[layer.mixer.head_dim for layer in description.spec.layers],
            block_size=layout.block_size_tokens,
        ),
        world_size=world_size,
        pooling="" if description.pooling is None else description.pooling.mode,
        embedding_size=description.hidden_size,
        normalizes=description.pooling is not None and description.pooling.normalizes,
        embedding_dimensions=() if description.pooling is None else description.pooling.dimensions,
        phases=tuple(timer.seconds),
    )


def _numeric_configuration(
    settings: Settings, description: ModelDescription, layout: _Layout, world_size: int, scheme: QuantScheme
) -> NumericConfiguration:
    scalings = (layer.mixer.rope.scaling for layer in description.spec.layers)
    return NumericConfiguration(
        dtype=layout.dtype_name,
        weights=scheme.name,
        kv_cache=layout.kv_dtype_name,
        block_size_tokens=layout.block_size_tokens,
        world_size=world_size,
        is_long_context=any(
            isinstance(scaling, LongRopeScaling) and description.max_positions > scaling.original_max_positions
            for scaling in scalings
        ),
        watermark=(settings.watermark_gamma, settings.watermark_delta),
    )


def _quality(
    settings: Settings,
    description: ModelDescription,
    decoder: Decoder,
    layout: _Layout,
    group: Group,
    numerics: NumericConfiguration,
    weights_digest: str,
    timer: PhaseTimer,
) -> QualityReceipt | None:
    """What few bits cost, as far as it is known or asked for. Raises UsageError below the floor.

    It is told by the likeliest tokens, of which a model that makes vectors has none.
    """
    if not numerics.is_rounded or description.pooling is not None:
        return None
    receipt = quality.kept_receipt(weights_digest, numerics)
    if receipt is None and settings.quality_receipt:
        with timer.phase("quality"):
            receipt = _measured_quality(settings, description, decoder, layout, group)
    if receipt is not None:
        quality.require_quality(receipt, numerics, settings.quality_floor)
    return receipt


def _measured_quality(
    settings: Settings, description: ModelDescription, decoder: Decoder, layout: _Layout, group: Group
) -> QualityReceipt:
    path = Path(settings.model_path)
    exact = load_decoder(path, description, dtype=layout.dtype, device=layout.device, group=group)
    piece_tokens = min(quality.PIECE_TOKENS, description.max_positions)
    num_blocks = -(-piece_tokens // layout.block_size_tokens)
    return quality.measure(
        quality.Subject(exact, _kv_pool(exact, layout, num_blocks, layout.dtype)),
        quality.Subject(decoder, _kv_pool(decoder, layout, num_blocks, layout.kv_dtype)),
        quality.text_token_ids(path, Path(settings.cache_dir), description.vocab_size),
        layout.dtype_name,
        piece_tokens,
    )


def _stored_quantization(description: ModelDescription) -> str:
    return description.stored_dtype if description.stored_dtype.upper().startswith(("Q", "I")) else ""


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.machine()
    return platform.processor() or platform.machine()
