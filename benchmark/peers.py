"""The servers that are measured: how each is started, and what it must be told so that all do the same work.

Every server has a precision; ours are compared with peers of the same or a finer one. Settings of the peers are those
that served them best on two cores, with a KV cache of 2 GiB each, which is several times what any workload uses.
"""

import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import peer_environments
from model_forms import ModelForms, make_int8_directory, make_openvino_directory, make_q4_0_gguf
from peer_environments import CannotInstallError

from weft.benchmark.profiles import PROFILES, Profile

LONG_PROFILES = frozenset({"long-prompt", "shared-prefix", "running-stream"})
"""Profiles that need few slots with much context rather than many with little."""
FAR_BEHIND = "left out of a quick sitting: many times slower than the others here"
SLOWER_BUILD = "left out of a quick sitting: the build for this processor is faster"
NO_GOAL = "left out of a quick sitting: four bits are for few rows"
NOT_FOR_FOUR_BITS = dict.fromkeys((*LONG_PROFILES, "streams-64", "large-16"), NO_GOAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One way of starting a server, for all profiles or for some. `{port}` in the command is replaced."""

    command: tuple[str, ...]
    profiles: frozenset[str] = frozenset(PROFILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server under test."""

    label: str
    precision: str
    weight_format: str
    """Whose limit it is held against: a name of `roofline.WEIGHT_FORMATS`."""
    launches: tuple[Launch, ...]
    model: str
    """What requests name as `model`."""
    weights: Path
    """The file or directory that it loads."""
    is_peer: bool = True
    omitted_fields: frozenset[str] = frozenset()
    """Fields of the request body that the server refuses."""
    environment: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    left_out_when_quick: Mapping[str, str] = field(default_factory=dict)
    """Profile → why."""

    def launch_for(self, profile: Profile) -> Launch:
        """The way of starting it that suits a profile."""
        return next(launch for launch in self.launches if profile.name in launch.profiles)


def weft_servers(forms: ModelForms) -> list[Server]:
    """This working tree's server in every precision that there is a form of the model for."""
    directory = str(forms.bfloat16_directory)
    servers = [
        _weft("weft bf16", "bf16", "bf16", directory),
        _weft("weft int8", "int8", "int8", directory, "--quantize", "int8"),
        _weft("weft int8 + int8 KV", "int8", "int8", directory, "--quantize", "int8", "--kv-cache-dtype", "int8"),
        _weft("weft int4", "int4", "int4", directory, "--quantize", "int4"),
    ]
    packed = forms.q4_0_gguf if forms.q4_0_gguf.exists() else forms.original_gguf
    if packed is not None:
        name = "Q4_0" if packed == forms.q4_0_gguf else "GGUF"
        servers.append(_weft(f"weft {name} packed", "int4", "q4_0", str(packed), "--gguf-compute", "packed"))
    return servers


def _weft(label: str, precision: str, weight_format: str, model: str, *extra: str) -> Server:
    command = (str(Path(sysconfig.get_path("scripts")) / "text-generation-launcher"), "--model-id", model)
    return Server(
        label=label,
        precision=precision,
        weight_format=weight_format,
        launches=(Launch(command=(*command, "--hostname", "127.0.0.1", "--port", "{port}", *extra)),),
        model="tgi",
        weights=Path(model),
        is_peer=False,
        version=version("weft"),
        left_out_when_quick=NOT_FOR_FOUR_BITS if precision == "int4" else {},
    )


def peer_servers(forms: ModelForms, is_wanted: Callable[[str], bool]) -> tuple[list[Server], dict[str, str]]:
    """Every wanted peer on one model, installed and its form of the model written; and why others are absent."""
    makers: dict[str, Callable[[ModelForms, str], Server]] = {
        "OpenVINO bf16": _openvino,
        "vLLM bf16": _vllm,
        "llama.cpp bf16": _llamacpp,
        "transformers serve bf16": _transformers_serve,
        "OpenVINO int8": _openvino,
        "vLLM int8": _vllm,
        "llama.cpp Q4_0": _llamacpp,
        "llama.cpp wheel bf16": _llamacpp_wheel,
        "llama.cpp wheel GGUF": _llamacpp_wheel,
    }
    servers: list[Server] = []
    absent: dict[str, str] = {}
    for label, make in makers.items():
        if not is_wanted(label):
            continue
        try:
            servers.append(make(forms, label))
        except CannotInstallError as error:
            absent[label] = f"cannot be installed here: {error}"
    return servers, absent


def _num_cores() -> str:
    return str(len(os.sched_getaffinity(0)))


def _transformers_serve(forms: ModelForms, label: str) -> Server:
    """Continuous batching of transformers, with the cache and step sizes that suit two cores."""
    python = str(peer_environments.make_transformers_environment() / "bin" / "python")
    model = str(forms.bfloat16_directory)
    command = (
        *(python, "-m", "transformers.cli.transformers", "serve"),
        *(model, "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu", "--dtype", "bfloat16"),
        *("--continuous-batching", "--cb-num-blocks", "2048", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"),
    )
    slow = LONG_PROFILES | {"streams-64", "large-1", "large-16"}
    return Server(
        label=label,
        precision="bf16",
        weight_format="bf16",
        launches=(Launch(command=command),),
        model=model,
        weights=forms.bfloat16_directory,
        omitted_fields=frozenset({"ignore_eos", "stream_options"}),
        environment={"HF_HUB_OFFLINE": "1"},
        version=peer_environments.TRANSFORMERS_REQUIREMENTS[0].partition("==")[2],
        left_out_when_quick=dict.fromkeys(slow, FAR_BEHIND),
    )


def _llamacpp(forms: ModelForms, label: str) -> Server:
    """llama.cpp, built for this processor."""
    programs = peer_environments.make_llamacpp()
    gguf = forms.bfloat16_gguf
    if label.endswith("Q4_0"):
        make_q4_0_gguf(forms, programs / "llama-quantize")
        gguf = forms.q4_0_gguf

    def command(slots: int, context: int) -> tuple[str, ...]:
        return (
            *(str(programs / "llama-server"), "-m", str(gguf), "--host", "127.0.0.1", "--port", "{port}"),
            *("-t", _num_cores(), "-tb", _num_cores(), "-np", str(slots), "-c", str(context)),
            *("--no-kv-unified", "--no-ui"),
        )

    is_quantized = label.endswith("Q4_0")
    return Server(
        label=label,
        precision="int4" if is_quantized else "bf16",
        weight_format="q4_0" if is_quantized else "bf16",
        launches=_llamacpp_launches(command),
        model=gguf.stem,
        weights=gguf,
        version=peer_environments.LLAMACPP_SOURCE.replace("==", " "),
        left_out_when_quick=NOT_FOR_FOUR_BITS
        if is_quantized
        else dict.fromkeys(("long-prompt", "shared-prefix"), FAR_BEHIND),
    )


def _llamacpp_wheel(forms: ModelForms, label: str) -> Server:
    """llama.cpp from a prebuilt wheel: installed in a minute, and slower than a build for this processor."""
    python = str(peer_environments.make_transformers_environment() / "bin" / "python")
    script = str(Path(__file__).with_name("llamacpp_server.py"))
    is_quantized = label.endswith("GGUF")
    gguf = forms.original_gguf if is_quantized else forms.bfloat16_gguf
    if gguf is None:
        raise CannotInstallError("the 1.07B model has no quantized file of its own")

    def command(slots: int, context: int) -> tuple[str, ...]:
        sizes = ("--slots", str(slots), "--context", str(context))
        return (python, script, str(gguf), "--port", "{port}", *sizes)

    return Server(
        label=label,
        precision="int4" if is_quantized else "bf16",
        weight_format="q4_0" if is_quantized else "bf16",
        launches=_llamacpp_launches(command),
        model=gguf.stem,
        weights=gguf,
        version=peer_environments.TRANSFORMERS_REQUIREMENTS[1].replace("==", " "),
        left_out_when_quick=dict.fromkeys(PROFILES, SLOWER_BUILD),
    )


def _llamacpp_launches(command: Callable[[int, int], tuple[str, ...]]) -> tuple[Launch, ...]:
    """It divides its context among slots: `command` gets the number of slots and the tokens of context of all."""
    large = frozenset(profile.name for profile in PROFILES.values() if profile.is_large_model)
    return (
        Launch(command=command(16, 8_192), profiles=large),
        Launch(command=command(8, 34_816), profiles=LONG_PROFILES),
        Launch(command=command(64, 32_768), profiles=frozenset(PROFILES) - LONG_PROFILES - large),
    )


def _openvino(forms: ModelForms, label: str) -> Server:
    """OpenVINO GenAI behind our HTTP wrapper."""
    environment = peer_environments.make_openvino_environment()
    precision = label.rpartition(" ")[2]
    make_openvino_directory(forms, environment, precision)
    script = str(Path(__file__).with_name("openvino_server.py"))
    model = str(forms.openvino_directory(precision))
    command = (str(environment / "bin" / "python"), script, model, "--port", "{port}", "--threads", _num_cores())
    return Server(
        label=label,
        precision=precision,
        weight_format=precision,
        launches=(Launch(command=command),),
        model="openvino",
        weights=forms.openvino_directory(precision),
        version=peer_environments.OPENVINO_REQUIREMENTS[0].partition("==")[2],
    )


def _vllm(forms: ModelForms, label: str) -> Server:
    """As the documentation of vLLM advises: a thread per core, bound, with its allocator and OpenMP preloaded."""
    environment = peer_environments.make_vllm_environment()
    precision = label.rpartition(" ")[2]
    directory = forms.bfloat16_directory
    if precision == "int8":
        make_int8_directory(forms)
        directory = forms.int8_directory
    command = (
        *(str(environment / "bin" / "vllm"), "serve", str(directory), "--served-model-name", "model"),
        *("--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16", "--max-model-len", "8192"),
    )
    preloads = peer_environments.vllm_preloads(environment)
    return Server(
        label=label,
        precision=precision,
        weight_format=precision,
        launches=(Launch(command=command),),
        model="model",
        weights=directory,
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(_num_cores()) - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(map(str, preloads)),
        },
        version=peer_environments.VLLM_VERSION,
    )
