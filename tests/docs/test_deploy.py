"""Files for containers and clouds name only flags, variables, paths, commands and files that exist."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft.config import options, resolve
from weft.router.app import ROUTES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
VARIABLES = {variable for option in options().values() for variable in option.env}
HOME = {"HOME": "/nonexistent"}
GET_PATHS = {route.path for route in ROUTES if route.method == "GET"}
SHELL_FILES = sorted(DEPLOY.glob("*.sh"))


def kubernetes() -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["weft"]


@pytest.fixture
def launched(tmp_path: Path) -> Any:
    """Runs an entry point with a launcher that prints what it got."""
    fake = tmp_path / "text-generation-launcher"
    fake.write_text('#!/bin/sh\nenv\necho "ARGUMENTS $*"\n')
    fake.chmod(0o755)

    def run(script: str, environ: dict[str, str], *words: str) -> tuple[int, dict[str, str], list[str]]:
        done = subprocess.run(
            ["/bin/sh", str(DEPLOY / script), *words], env={"PATH": f"{tmp_path}:/usr/bin:/bin", **environ},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        arguments = next((line.split()[1:] for line in lines if line.startswith("ARGUMENTS")), [])
        return done.returncode, dict(line.split("=", 1) for line in lines if "=" in line), arguments

    return run


@pytest.mark.parametrize("file", SHELL_FILES, ids=lambda file: file.name)
def test_a_script_is_sound_and_can_be_run(file: Path) -> None:
    assert subprocess.run(["/bin/sh", "-n", str(file)], check=False).returncode == 0
    assert file.stat().st_mode & 0o111
    commands = set(re.findall(r"text-generation-\w+", file.read_text()))
    assert commands <= set(SCRIPTS)
    assert set(re.findall(r"export ([A-Z_]+)=", file.read_text())) <= VARIABLES


@pytest.mark.parametrize(("environ", "port"), [({}, 80), ({"PORT": "81"}, 81), ({"AIP_HTTP_PORT": "82"}, 82)])
def test_the_image_listens_where_tgis_does_unless_told_otherwise(
    launched: Any, environ: dict[str, str], port: int
) -> None:
    status, seen, arguments = launched("entrypoint.sh", environ, "--max-best-of", "3")

    settings = resolve(arguments, {**HOME, **{name: seen[name] for name in VARIABLES & seen.keys()}})
    assert status == 0
    assert (settings.port, settings.max_best_of) == (port, 3)


def test_sagemakers_variables_become_ours(launched: Any) -> None:
    environ = {"HF_MODEL_ID": "a/b", "HF_MODEL_REVISION": "v1", "SM_NUM_GPUS": "2"}

    status, seen, arguments = launched("sagemaker-entrypoint.sh", environ, "--max-best-of", "3")

    settings = resolve(arguments, {**HOME, **{name: seen[name] for name in VARIABLES & seen.keys()}})
    assert status == 0
    assert (settings.model_id, settings.revision, settings.num_shard, settings.port, settings.max_best_of) == (
        "a/b", "v1", 2, 8080, 3,
    )  # fmt: skip


def test_sagemaker_without_gpus_is_one_shard_and_without_a_model_an_error(launched: Any) -> None:
    _, seen, _ = launched("sagemaker-entrypoint.sh", {"HF_MODEL_ID": "a/b", "SM_NUM_GPUS": "0"})
    status, _, _ = launched("sagemaker-entrypoint.sh", {})

    assert "NUM_SHARD" not in seen
    assert status == 2


def test_the_images_copy_and_start_what_exists() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    assert {"router", "server"} <= stages
    for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE):
        assert base in stages or base.startswith("python:3.")
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        assert [source for source in line.split()[:-1] if not (ROOT / source).exists()] == []
    for stage in re.findall(r"COPY --from=(\S+)", DOCKERFILE):
        assert stage in stages
    for command in re.findall(r'^ENTRYPOINT \["([^"]+)"\]$', DOCKERFILE, re.MULTILINE):
        assert command in SCRIPTS or (DEPLOY / command).is_file()


def test_the_router_image_has_every_dependency_but_those_of_shards() -> None:
    done = subprocess.run(
        ["python3", "deploy/router_requirements.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]

    left_out = set(dependencies) - set(done.stdout.split("\n"))
    assert {re.split("[<>=]", line)[0] for line in left_out} == {"torch", "safetensors"}


def test_compose_sets_what_exists() -> None:
    service = compose()

    assert set(service["environment"]) <= VARIABLES
    settings = resolve(service["command"], {**HOME, "PORT": service["environment"]["PORT"]})
    assert service["ports"][0].endswith(f":{settings.port}")
    assert service["build"]["target"] in re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert int(service["stop_grace_period"].removesuffix("s")) > settings.graceful_termination_timeout
    (path,) = re.findall(r"http://localhost(/[a-z/]+)", " ".join(service["healthcheck"]["test"]))
    assert path in GET_PATHS


def test_kubernetes_probes_and_sets_what_exists() -> None:
    deployment, service = kubernetes()
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]

    variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    assert set(variables) <= VARIABLES
    settings = resolve(container["args"], {**HOME, "PORT": variables["PORT"]})
    assert container["ports"][0]["containerPort"] == settings.port
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(settings.port)
    assert pod["metadata"]["annotations"]["prometheus.io/path"] in GET_PATHS
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["path"] for probe in probes.values()} <= GET_PATHS
    assert probes["readiness"]["path"] == "/health/ready"
    names = {port["name"] for port in container["ports"]}
    assert {probe["port"] for probe in probes.values()} | {service["spec"]["ports"][0]["targetPort"]} <= names
    assert pod["spec"]["terminationGracePeriodSeconds"] > settings.graceful_termination_timeout
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
