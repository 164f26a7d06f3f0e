"""A hub on this machine: what huggingface_hub asks while it creates, fills and reads a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_ours"
SHA = "c" * 40


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHub:
    """The state: repositories by name, and large files by digest until a commit names them."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def create(self, owner: str | None, name: str, private: bool) -> tuple[int, Any]:
        whole = f"{owner or 'me'}/{name}"
        status = 409 if whole in self.repositories else 200
        self.repositories.setdefault(whole, Repository(private))
        return status, {"url": f"{self.url}/{whole}"}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = self.repositories[name].files
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large.pop(value["oid"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{SHA}", "commitOid": SHA, "success": True}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, status: int, content: Any, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _serve(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {path}")
            if not path.startswith("/lfs/") and self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self._answer(401, {"error": "no token"})
            if path == "/api/validate-yaml":
                return self._answer(200, {"warnings": [], "errors": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                private = asked.get("visibility") == "private" or asked.get("private", False)
                return self._answer(*hub.create(asked.get("organization"), asked["name"], private))
            if path.startswith("/lfs/"):
                digest = hashlib.sha256(body).hexdigest()
                hub.large[digest] = body
                return self._answer(200 if path == f"/lfs/{digest}" else 400, {})
            name = "/".join(path.removeprefix("/api/models").removesuffix(".git").split("/")[1:3]).removesuffix(
                ".git"
            )
            if name not in hub.repositories:
                return self._answer(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            return self._of_repository(path, name, body)

        def _of_repository(self, path: str, name: str, body: bytes) -> None:
            files = hub.repositories[name].files
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self._answer(200, {"transfer": "basic", "objects": objects})
            match path.split("/")[5 if path.startswith("/api/") else 3 :]:
                case ["preupload", _]:
                    modes = [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".gguf")) else "regular",
                            "shouldIgnore": False,
                        }
                        for each in json.loads(body)["files"]
                    ]
                    return self._answer(200, {"files": modes})
                case ["commit", _]:
                    return self._answer(*hub.commit(name, [json.loads(line) for line in body.splitlines()]))
                case ["tree", *_]:
                    tree = [
                        {
                            "type": "file",
                            "path": path,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        for path, content in files.items()
                    ]
                    return self._answer(200, tree)
                case ["resolve", _, *parts]:
                    content = files["/".join(parts)]
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    return self._answer(200, content, X_Repo_Commit=SHA, ETag=etag)
            siblings = [{"rfilename": each} for each in files]
            private = hub.repositories[name].private
            return self._answer(
                200, {"id": name, "modelId": name, "sha": SHA, "private": private, "tags": [], "siblings": siblings}
            )

        do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

    return Handler


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
