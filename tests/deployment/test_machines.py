"""docs/deploy.md, followed to the letter on three machines; then cables are pulled and clocks are wrong."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.data import DataConfig
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe
from flexperts.server.checkpoint import load_server

from .cluster import wait_until
from .containers import DEPLOY
from .machines import Machines, blocks, require_machines

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

Rows = dict[str, Path]
Deployed = Callable[..., Path]
FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
RUN, RESUME = (text.splitlines()[0] for _, text in blocks(3))
SILOS = ["clinic", "law_firm"]
CLOCK = Path(__file__).with_name("wrong_clock.c")
WORKER, NODE = 0, 1
"""A silo's terminals."""
FAKED = "export LD_PRELOAD=/home/flexperts/clock.so CLOCK_OFF={}"


@pytest.fixture(autouse=True)
def _machines() -> None:
    require_machines()


@pytest.fixture(scope="module")
def machines_once(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: Rows) -> Iterator[Machines]:
    """Machines on which tests set a wrong clock for the SuperNode of clinic; none runs there."""
    require_machines()
    if shutil.which("cc") is None:
        pytest.skip("cc not installed: it makes the wrong clock")
    with Machines(tmp_path_factory.mktemp("clocks") / "machines", rows, tiny_base, socket.AF_INET) as machines:
        machines.follow()
        clinic = machines.silos["clinic"]
        clinic.end(NODE)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", clinic.at("~/clock.so"), CLOCK, "-ldl"], check=True)
        yield machines


def bits(checkpoint: Path) -> bytes:
    return load_server(checkpoint).shared.vector.tobytes()


def alone(recipe: Path, rows: Rows, folder: Path) -> bytes:
    """Return the shared weights of the same run in this process."""
    clients = {n: {"train": str(p / "train.jsonl"), "test": str(p / "test.jsonl")} for n, p in rows.items()}
    data = DataConfig.model_validate({"clients": clients})
    run_federation(load_recipe(recipe).model_copy(update={"data": data}), folder)
    return bits(folder / "checkpoint.safetensors")


def logs(machines: Machines) -> list[dict[str, Any]]:
    """Return what the rounds of the run were."""
    path = machines.server.at("/srv/flexperts/runs/flu-season/rounds.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("family", FAMILIES)
def test_three_machines_that_follow_the_page_to_the_letter_have_a_run(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed, family: str
) -> None:
    recipe = deployed(2)
    with Machines(tmp_path / "machines", rows, tiny_base, FAMILIES[family]) as machines:
        machines.follow()
        machines.server.write("~/recipe.toml", recipe.read_bytes())
        machines.server.run(RUN)
        found = bits(machines.server.at("/srv/flexperts/runs/flu-season/checkpoint.safetensors"))
        assert found == alone(recipe, rows, tmp_path / "alone")
        clinic = machines.silos["clinic"]
        (run,) = (path.name for path in clinic.at("~/state/runs").iterdir())
        for title, text in blocks(4):
            assert title == "silo"
            told = clinic.run(text.replace(" RUN ", f" {run} ")).stdout
        assert told.strip()
        refused = (
            "curl --silent --cacert ca.crt --output /dev/null --write-out '%{http_code}' https://server.example/v1/"
        )
        assert clinic.run(f"{refused}control/list-runs").stdout == "403"
        assert "inet6" in clinic.run("ip addr show dev eth0").stdout
    rules = [" ".join(rule.split()) for rule in re.findall(r"location [^}]*}", (DEPLOY / "nginx.conf").read_text())]
    proxy = next(text for title, text in blocks(1) if title.endswith("flexperts.conf"))
    assert [" ".join(rule.split()) for rule in re.findall(r"location [^}]*}", proxy)] == rules


def test_rounds_go_on_while_a_cable_is_pulled(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed
) -> None:
    """A short cut costs nothing; a long one costs the silo its rounds until it is seen again."""
    recipe = deployed(12, deadline=60)
    with Machines(tmp_path / "machines", rows, tiny_base, socket.AF_INET6) as machines:
        machines.follow()
        server = machines.server
        server.write("~/recipe.toml", recipe.read_bytes())
        command = server.start(RUN)
        wait_until(lambda: len(logs(machines)) == 1, "the end of round 1", 300)
        machines.plug("clinic", "down")  # round 2 has begun, and no silo can have answered yet
        time.sleep(20)
        assert len(logs(machines)) == 1
        machines.plug("clinic", "up")
        wait_until(lambda: len(logs(machines)) == 2, "the end of round 2")
        machines.plug("clinic", "down")
        wait_until(lambda: len(logs(machines)) == 3, "the end of round 3")
        told = server.run("flexperts status /srv/flexperts/runs/flu-season").stdout
        machines.plug("clinic", "up")
        assert command.wait(400) == 0
        _, second, third, *_, last = logs(machines)
        assert [sorted(log["clients"]) for log in (second, third, last)] == [SILOS, ["law_firm"], SILOS]
        assert (second["missing"], third["missing"], last["missing"]) == ([], ["clinic"], [])
        assert "missing in their last round: clinic" in told
        assert len(logs(machines)) == 12


def test_a_run_that_needs_all_silos_stops_and_resumes_when_the_cable_is_in_again(
    tmp_path: Path, tiny_base: Path, rows: Rows, deployed: Deployed
) -> None:
    recipe = deployed(2, deadline=60)
    recipe.write_text(recipe.read_text().replace("min_clients = 2", "min_clients = 2\nquorum = 1.0"))
    with Machines(tmp_path / "machines", rows, tiny_base, socket.AF_INET) as machines:
        machines.follow()
        server = machines.server
        server.write("~/recipe.toml", recipe.read_bytes())
        command = server.start(RUN)
        wait_until(lambda: logs(machines), "the end of round 1", 300)
        machines.plug("clinic", "down")
        assert command.wait(300) == 2
        wait_until(lambda: "round 2: 1 of 2 clients sent a usable update (clinic missing)" in server.log(-1), "why")
        machines.plug("clinic", "up")
        server.run(RESUME)
        found = bits(server.at("/srv/flexperts/runs/flu-season/checkpoint.safetensors"))
        assert found == alone(recipe, rows, tmp_path / "alone")


@pytest.mark.parametrize(
    ("ahead", "said"),
    [
        (60, "SuperNode terminated gracefully"),
        (-2 * 86400, "certificate is not yet valid"),
        (400 * 86400, "certificate has expired"),
    ],
)
def test_a_wrong_clock_is_named(machines_once: Machines, ahead: int, said: str) -> None:
    """Flower stops without a word about the clock; `silo check` names it."""
    clinic = machines_once.silos["clinic"]
    check, node = (text for _, text in blocks(2) if "server.example:443" in text)
    started = clinic.start(f"{FAKED.format(ahead)}\n{node}")
    told = clinic.run(f"{FAKED.format(ahead)}\n{check.splitlines()[0]}", check=False)
    assert told.returncode == 2
    found = re.match(
        r"error: this machine's clock is (\d+) s (ahead of|behind) that of server\.example:443", told.stderr
    )
    assert found, told.stderr
    assert abs(int(found[1]) - abs(ahead)) <= 2
    assert (found[2] == "behind") is (ahead < 0)
    wait_until(lambda: said in clinic.log(-1), said)
    assert "SuperNode ID" not in clinic.log(-1)
    assert (started.wait(60) == 0) is ("gracefully" in said)


def test_a_clock_a_little_off_changes_nothing(machines_once: Machines, rows: Rows, deployed: Deployed) -> None:
    clinic, recipe = machines_once.silos["clinic"], deployed(1)

    def taken() -> bool:  # the key of a SuperNode that was killed is free after up to a minute
        started = clinic.start(f"{FAKED.format(3)}\n{blocks(2)[-1][1]}")
        wait_until(lambda: "SuperNode ID" in clinic.log(-1) or started.poll() is not None, "the SuperNode")
        return started.poll() is None

    wait_until(taken, "a SuperNode that the SuperLink takes")
    machines_once.server.write("~/recipe.toml", recipe.read_bytes())
    machines_once.server.run(RUN)
    assert [sorted(log["clients"]) for log in logs(machines_once)] == [SILOS]
