"""The servers that are measured: how each is started, and what it must be told so that all do the same work.

Peers live in an environment of their own, `.venv-peers`, with the versions below. It is stacked on the development
environment, so every server runs on the same torch.
"""

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path

from model_forms import ModelForms

ROOT = Path(__file__).resolve().parent.parent
PEERS_ENVIRONMENT = ROOT / ".venv-peers"
PEER_REQUIREMENTS = ("transformers[serving]==5.23.0", "xllamacpp==2026.10.11549")

LONG_PROFILES = frozenset({"long-prompt", "shared-prefix"})
"""Profiles that need few slots with much context rather than many with little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One way of starting a server, for all profiles or for some. `{port}` in the command is replaced."""

    command: tuple[str, ...]
    profiles: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server under test."""

    label: str
    launches: tuple[Launch, ...]
    model: str
    """What requests name as `model`."""
    omitted_fields: frozenset[str] = frozenset()
    """Fields of the request body that the server refuses."""
    environment: dict[str, str] = field(default_factory=dict)

    def launches_for(self, profile_names: list[str]) -> list[tuple[Launch, list[str]]]:
        """Each launch with those of the profiles that it is for."""
        chosen = [
            (launch, [name for name in profile_names if launch.profiles is None or name in launch.profiles])
            for launch in self.launches
        ]
        return [(launch, names) for launch, names in chosen if names]


def weft(label: str, model: str, *extra: str) -> Server:
    """This working tree's server."""
    command = (str(Path(sysconfig.get_path("scripts")) / "text-generation-launcher"), "--model-id", model)
    return Server(
        label=label,
        launches=(Launch(command=(*command, "--hostname", "127.0.0.1", "--port", "{port}", *extra)),),
        model="tgi",
    )


def transformers_serve(model_directory: Path) -> Server:
    """Continuous batching of transformers, with the cache and step sizes that suit two cores."""
    command = (
        *(str(PEERS_ENVIRONMENT / "bin" / "python"), "-m", "transformers.cli.transformers", "serve"),
        *(str(model_directory), "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu", "--dtype", "bfloat16"),
        *("--continuous-batching", "--cb-num-blocks", "2048", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"),
    )
    return Server(
        label="transformers serve bf16",
        launches=(Launch(command=command),),
        model=str(model_directory),
        omitted_fields=frozenset({"ignore_eos", "stream_options"}),
        environment={"HF_HUB_OFFLINE": "1"},
    )


def llamacpp(label: str, gguf: Path, all_profiles: frozenset[str]) -> Server:
    """llama.cpp divides its context among slots, so long prompts get a start of their own."""

    def launch(slots: int, context: int, profiles: frozenset[str]) -> Launch:
        python = str(PEERS_ENVIRONMENT / "bin" / "python")
        script = str(Path(__file__).with_name("llamacpp_server.py"))
        sizes = ("--slots", str(slots), "--context", str(context))
        return Launch(command=(python, script, str(gguf), "--port", "{port}", *sizes), profiles=profiles)

    launches = (launch(64, 32_768, all_profiles - LONG_PROFILES), launch(8, 34_816, LONG_PROFILES))
    return Server(label=label, launches=launches, model=gguf.stem)


def all_peers(forms: ModelForms, all_profiles: frozenset[str]) -> list[Server]:
    """Every peer, on the forms of the one model."""
    return [
        transformers_serve(forms.bfloat16_directory),
        llamacpp("llama.cpp Q4_1", forms.quantized_gguf, all_profiles),
        llamacpp("llama.cpp bf16", forms.bfloat16_gguf, all_profiles),
    ]


def make_peers_environment() -> None:
    """Create `.venv-peers` and install the pinned peers, unless that has been done."""
    stamp = PEERS_ENVIRONMENT / "installed.txt"
    wanted = "\n".join(PEER_REQUIREMENTS)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.create(PEERS_ENVIRONMENT, with_pip=True, clear=True)
    python = PEERS_ENVIRONMENT / "bin" / "python"
    site = next((PEERS_ENVIRONMENT / "lib").glob("python*/site-packages"))
    (site / "development.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER_REQUIREMENTS], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
