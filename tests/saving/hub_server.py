"""A model hub on this machine: what `huggingface_hub` asks for to upload a commit, over real HTTP."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse


@dataclass
class HubServer:
    """Repositories by name, each a table of files; `objects` holds what was uploaded and not committed yet.

    `refuses` are parts of addresses that are answered with an error, as by a hub that is down.
    """

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    refuses: tuple[str, ...] = ()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The JSON answer to a request, or None for one that is not known."""
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            self.repositories.setdefault(name, {})
            return {"url": f"{self.address}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.startswith("/storage/") and method == "PUT":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.objects[parts[1]] = body
            return {}
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._upload_of(o) for o in json.loads(body)["objects"]]}
        name, kind = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else ""
        if kind == "tree":
            files = self.repositories[name].items()
            return [{"type": "file", "path": path, "size": len(c), "oid": "0" * 40} for path, c in files]
        if kind == "preupload":
            wanted = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            large = (".safetensors", ".gguf")
            return {"files": [{"path": f["path"], "uploadMode": mode[f["path"].endswith(large)], "shouldIgnore": False}
                              for f in wanted]}  # fmt: skip
        if kind == "commit":
            self._commit(name, body)
            return {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.address}/{name}/commit/{'1' * 40}"}
        return {} if method == "GET" else None

    def _upload_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where an object is to be put; nowhere where it is already, so that an upload goes on where it broke off."""
        if wanted["oid"] in self.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/storage/{wanted['oid']}"}}}

    def _commit(self, name: str, body: bytes) -> None:
        files = dict(self.repositories[name])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.repositories[name] = files


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running hub."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlparse(self.path).path
            hub.requests.append((self.command, path, self.headers.get("Authorization") or ""))
            refused = any(part in path for part in hub.refuses)
            answer = None if refused else hub.answer(self.command, path, body)
            content = json.dumps({"error": "not served"} if answer is None else answer).encode()
            self.send_response(403 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
