"""A Hub on loopback: what `huggingface_hub` sends to upload a folder and asks for to load it, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackHub:
    """Start with `with LoopbackHub() as hub`; `hub.url` is the endpoint.

    Attributes:
        repos: repository -> {"private": bool, "branches": {name: {path: bytes}}}.
        requests: (method, path) of every request, in order.
        num_objects_taken: weights that are taken before the line breaks; None = all.
    """

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.num_objects_taken: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.read_body()
                hub.requests.append((self.command, self.path))
                status, headers, content = hub.answer(self.command, self.path.split("?")[0], body)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict, bytes]:
        """Status, headers and content of one request."""

        def reply(content) -> tuple[int, dict, bytes]:
            return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            private = request.get("private") or request.get("visibility") == "private"
            name = f"spaces/{name}" if request.get("type") == "space" else name
            self.repos.setdefault(
                name, {"private": private, "variables": request.get("variables"), "branches": {"main": {}}}
            )
            return reply({"url": f"{self.url}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml":
            return reply({"errors": [], "warnings": []})
        if path.startswith("/objects/") and method == "PUT":
            if self.num_objects_taken is not None and len(self.objects) >= self.num_objects_taken:
                return 400, {}, b"the line broke"
            self.objects[path.rsplit("/", 1)[1]] = body
            return 200, {}, b""
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self.objects:  # no action = the content is here already
                    item["actions"] = {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}
            return reply({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(
            r"/api/(?:models/|(?=spaces/))((?:spaces/)?[^/]+/[^/]+)/(branch|preupload|commit|revision|tree)/([^/]+)(/.*)?",
            path,
        ):
            repo, verb, branch = match.group(1), match.group(2), match.group(3)
            branches = self.repos[repo]["branches"]
            if verb == "branch":
                branches.setdefault(branch, dict(branches["main"]))
                return reply({})
            if verb == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]
                return reply({"files": files})
            if verb == "commit":
                self.commit(branches[branch], body)
                return reply(
                    {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": revision(branches[branch])}
                )
            if verb == "tree":
                files = branches[self.find(repo, branch)]
                return reply([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()])
            return reply(self.info(repo, self.find(repo, branch)))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return reply(self.info(match.group(1), "main"))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, branch, name = match.groups()
            if repo not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            files = self.repos[repo]["branches"][self.find(repo, branch)]
            if name not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision(files)}, b""
            headers = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": revision(files)}
            return 200, headers, files[name]
        return 404, {}, b"no such address"

    def find(self, repo: str, name: str) -> str:
        """The branch with this name or at this revision."""
        branches = self.repos[repo]["branches"]
        return name if name in branches else next(b for b, files in branches.items() if revision(files) == name)

    def info(self, repo: str, branch: str) -> dict:
        files = self.repos[repo]["branches"][branch]
        described = {"id": repo, "modelId": repo, "sha": revision(files), "tags": []}
        return described | {"siblings": [{"rfilename": p} for p in files], "private": self.repos[repo]["private"]}

    def commit(self, files: dict[str, bytes], body: bytes) -> None:
        """Apply the lines of a commit: regular files carry their content, large ones were put before."""
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]


def mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def revision(files: dict[str, bytes]) -> str:
    """A commit id that changes with the content."""
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + hashlib.sha1(files[path]).digest())
    return digest.hexdigest()
