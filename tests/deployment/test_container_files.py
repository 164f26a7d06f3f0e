"""The container files keep what docs/security.md promises, and agree with each other."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexperts.recipe import load_silo

from ..scripts import script  # noqa: TID252
from .cluster import shell
from .containers import DEPLOY, command_of, image_of, images, mounts, services, user_of

SETTINGS = {"SILO": "hospital", "SUPERLINK": "server.example:443", "ROWS": "/srv/rows", "BASE": "/srv/base"}
SILO = services("compose.silo.yaml", SETTINGS)
SERVER = services("compose.server.yaml", SETTINGS)
PODS = {
    document["metadata"]["name"]: document["spec"]["template"]["spec"]
    for file in (DEPLOY / "kubernetes").glob("*.yaml")
    for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))
    if document["kind"] == "StatefulSet"
}


@pytest.mark.parametrize(("name", "service"), [*SILO.items(), *SERVER.items()])
def test_no_container_can_write_its_root_or_gain_privileges(name: str, service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert min(user_of(service)) >= 10000
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert image_of(service).health or service["healthcheck"] == {"disable": True}


def test_rows_and_state_are_the_workers_and_the_network_is_the_supernodes() -> None:
    worker, node, apps = (SILO[name] for name in ("worker", "supernode", "apps"))
    assert (worker["network_mode"], apps["network_mode"]) == ("none", "none")
    assert "network_mode" not in node
    assert "ports" not in worker | node | apps
    writable = {there for there, (_, may) in mounts(worker).items() if may}
    assert writable == {"/var/lib/flexperts", "/run/flexperts"}
    assert mounts(node) == {"/run/runtime": ("runtime", True)}
    assert mounts(apps) == {"/run/runtime": ("runtime", False), "/run/flexperts": ("socket", False)}
    assert node["secrets"] == ["ca.crt", "supernode.key"]
    assert "secrets" not in worker | apps
    assert len({user_of(one)[0] for one in (worker, node, apps)}) == 3
    assert not any(may for _, may in mounts(SILO["serve"]).values())
    assert not {"/srv/rows", "/run/flexperts"} & mounts(SILO["serve"]).keys()


def test_the_silos_file_admits_the_user_of_the_apps_and_no_other() -> None:
    silo = load_silo(DEPLOY / "silo.toml")
    user, group = user_of(SILO["apps"])
    assert silo.socket is not None
    assert (silo.socket.users, silo.socket.group) == ([str(user)], str(group))
    assert user_of(SILO["worker"])[1] == group  # otherwise the worker could not give the socket to the group
    assert f'socket="{silo.socket.path}"' in command_of(SILO["supernode"])[-1]
    assert images()["worker"].health[-1] == silo.socket.path
    assert silo.name == SETTINGS["SILO"]
    inside = mounts(SILO["worker"])
    for path in (silo.state, silo.base, silo.data.train, silo.data.test or "", silo.socket.path):
        assert any(Path(path).is_relative_to(there) for there in inside), path


def test_the_server_publishes_the_proxy_alone() -> None:
    assert SERVER["proxy"]["network_mode"] == "service:superlink"
    assert SERVER["superlink"]["ports"] == ["443:8443"]
    assert "listen 8443 ssl" in (DEPLOY / "nginx.conf").read_text()
    assert "--host" not in (DEPLOY / "superlink.sh").read_text()  # it listens on loopback


@pytest.mark.parametrize("pod", PODS)
def test_pods_have_the_boundaries_of_the_compose_files(pod: str) -> None:
    compose = {"flexperts-silo": SILO, "flexperts-server": SERVER}[pod]
    its = PODS[pod]
    assert its["automountServiceAccountToken"] is False
    assert its["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert {c["name"] for c in its["containers"]} == compose.keys() - {"serve"}
    for container in its["containers"]:
        service, may = compose[container["name"]], container["securityContext"]
        assert container["image"] == service["image"]
        assert may["readOnlyRootFilesystem"] is True
        assert may["allowPrivilegeEscalation"] is False
        assert may["capabilities"] == {"drop": ["ALL"]}
        user = {**its["securityContext"], **may}
        assert (user["runAsUser"], user["runAsGroup"]) == user_of(service)
        here = {m["mountPath"] for m in container["volumeMounts"]}
        there = {*mounts(service), "/tmp"} | ({"/run/secrets"} if "secrets" in service else set())
        same = {"/etc/flexperts/silo.toml": "/etc/flexperts"}  # a ConfigMap is a folder
        assert here == {same.get(path, path) for path in there} - {"/run/runtime", "/srv/recipes"}


def test_kubernetes_pods_reach_what_their_policy_names() -> None:
    policies = {
        document["metadata"]["name"]: document["spec"]
        for file in (DEPLOY / "kubernetes").glob("*.yaml")
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))
        if document["kind"] == "NetworkPolicy"
    }
    assert policies.keys() == PODS.keys()
    for spec in policies.values():
        assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    assert policies["flexperts-silo"]["ingress"] == policies["flexperts-server"]["egress"] == []
    assert [p["port"] for p in policies["flexperts-server"]["ingress"][0]["ports"]] == [8443]


def test_what_is_copied_into_images_exists_and_nothing_else_is_sent_to_the_builder() -> None:
    files = {path for image in images().values() for path in image.files.values()}
    assert {"server", "worker", "supernode", "serve"} <= images().keys()
    root = DEPLOY.parent
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*"
    assert {root / line[1:] for line in ignored if line.startswith("!")} == files
    assert all(path.exists() for path in files)


@contextmanager
def served(status: int, certificate: Path | None = None) -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_server_is_healthy_if_it_answers_with_200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    answers = script("deploy/healthcheck.py").answers
    for status in (200, 503):
        with served(status) as port:
            assert answers(f"http://127.0.0.1:{port}/health") is (status == 200)
    assert not answers(f"http://127.0.0.1:{port}/health")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    shell(tmp_path, f'openssl req -x509 {key} -keyout it.pem -out crt -subj "/CN=server.example"; cat crt >>it.pem')
    with served(200, tmp_path / "it.pem") as port:
        assert answers(f"https://127.0.0.1:{port}/health")


def test_a_worker_is_healthy_while_it_listens(tmp_path: Path) -> None:
    is_listening, path = script("deploy/healthcheck.py").is_listening, str(tmp_path / "s")
    assert not is_listening(path)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        assert not is_listening(path)
        door.listen()
        assert is_listening(path)
        assert not is_listening(str(tmp_path))
    assert not is_listening(path)
    assert subprocess.run(["python3", DEPLOY / "healthcheck.py", path], check=False).returncode == 1
