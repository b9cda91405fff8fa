"""A small Hugging Face Hub on this machine: what huggingface_hub asks of one to create a repository and to fill it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER, TOKEN = "ann", "hf_of_ann"


class Hub(ThreadingHTTPServer):
    """`repositories`: name → visibility and files, path → bytes. Its LFS store is `stored`: sha256 → bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        """The sha256 of each file that was received, in order."""
        self.commits: list[list[str]] = []
        """The paths that each commit has added or deleted."""
        self.upload_limit: int | None = None
        """How many files are received before the others are refused."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *words: object) -> None:
        pass

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self) -> None:
        body, path = self.read(), self.path.partition("?")[0].removeprefix("/")
        with self.server.lock:
            if path.startswith("lfs/"):
                self.store(path.removeprefix("lfs/"), body)
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer({"error": "who are you?"}, 401)
            elif path == "api/repos/create":
                self.create(json.loads(body))
            elif path == "api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path == "verify":
                self.answer({}, 200 if json.loads(body)["oid"] in self.server.stored else 404)
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.plan_uploads(json.loads(body))
            else:
                _, _, *name, verb, revision = path.split("/") if path.count("/") > 3 else [*path.split("/"), "", ""]
                assert (verb, revision) in (
                    ("", ""),
                    *((verb, "main") for verb in ("preupload", "commit", "tree", "revision")),
                )
                self.use_repository("/".join(name), verb, body)

    do_GET = do_POST = do_PUT = handle_request

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or USER}/{asked['name']}"
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = {"private": asked.get("visibility") == "private", "files": {}}
        self.answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)

    def plan_uploads(self, asked: dict[str, Any]) -> None:
        objects = asked["objects"]
        for file in objects:
            if file["oid"] not in self.server.stored:
                place = {"href": f"{self.server.url}/lfs/{file['oid']}"}
                file["actions"] = {"upload": place, "verify": {"href": f"{self.server.url}/verify"}}
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, digest: str, content: bytes) -> None:
        if self.server.upload_limit is not None and len(self.server.uploads) >= self.server.upload_limit:
            return self.answer({"error": "your storage is full"}, 403)
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.stored[digest] = content
        self.server.uploads.append(digest)
        self.answer({})

    def use_repository(self, name: str, verb: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        files: dict[str, bytes] = repository["files"]
        if verb == "preupload":
            self.answer({"files": [
                {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                 "shouldIgnore": False, "oid": identify(file["path"], files.get(file["path"]))}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        elif verb == "tree":
            self.answer([{"type": "file", "path": path, "size": len(files[path]), "oid": ""} for path in files])
        elif verb == "commit":
            _, *operations = map(json.loads, body.splitlines())
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "deletedFile":
                    del files[value["path"]]
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.server.stored[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            self.server.commits.append([operation["value"]["path"] for operation in operations])
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self.answer({"id": name, "sha": "1" * 40, "private": repository["private"]})


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf", ".onnx"))


def identify(path: str, content: bytes | None) -> str | None:
    """sha256 of a large file, git's hash of a small one."""
    if content is None or is_large(path):
        return content and hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
