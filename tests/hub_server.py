"""The part of the Hub's protocol that huggingface_hub uses for models, on 127.0.0.1, with faults on demand.

Repositories live in memory: a list of commits, each a mapping of path to content. Content of LFS files is stored and
served by sha256 behind a redirect, as the Hub does.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from werkzeug import Request, Response
from werkzeug.serving import make_server

TOKEN = "hf_" + "x" * 34


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    commits: list[dict[str, bytes]] = field(default_factory=list)
    private: bool = False

    def ids(self) -> list[str]:
        return [hashlib.sha1(f"{i}{sorted(files)}".encode()).hexdigest() for i, files in enumerate(self.commits)]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        ids = self.ids()
        if revision == "main" and ids:
            return ids[-1], self.commits[-1]
        return (revision, self.commits[ids.index(revision)]) if revision in ids else None


@dataclass
class HubServer:
    """What is served, what goes wrong, and what was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    log: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes of body sent
    fail: int = 0  # answer so many requests with 500
    cut: int = 0  # break off so many downloads half way
    hang: bool = False  # accept and never answer
    tamper: bool = False  # serve other bytes of the same length
    slow: float = 0.0  # seconds before a body is sent
    url: str = ""
    store: str = ""  # the same server by another host name: to the client, somebody else's

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit `files` to a repository and return the commit's id."""
        repo = self.repos.setdefault(repo_id, Repo(private=private))
        repo.commits.append({**(repo.commits[-1] if repo.commits else {}), **files})
        self.blobs |= {sha256(content): content for content in files.values()}
        return repo.ids()[-1]

    def bodies(self) -> list[str]:
        """Paths of the downloads that carried a body, in order."""
        return [path for method, path, size in self.log if method == "GET" and size and not path.startswith("/api")]

    def __call__(self, environ, start_response):
        request = Request(environ)
        while self.hang:
            time.sleep(0.05)
        if self.fail:
            self.fail -= 1
            response = Response("out of order", 500)
        else:
            response = self.answer(request)
        size = int(response.headers.get("Content-Length", 0)) if request.method != "HEAD" else 0
        self.log.append((request.method, request.path, size))
        return response(environ, start_response)

    def answer(self, request: Request) -> Response:
        path = request.path
        if path == "/api/repos/create":
            body = request.get_json()
            repo_id = f"{body.get('organization') or 'me'}/{body['name']}"
            if self.unauthorised(request):
                return error(401, "", "Invalid credentials")
            if repo_id in self.repos:
                return as_json({"error": "exists", "url": f"{self.url}/{repo_id}"}, 409)
            self.repos[repo_id] = Repo([{}], private=bool(body.get("private")))
            return as_json({"url": f"{self.url}/{repo_id}", "name": repo_id})
        if path == "/api/whoami-v2":
            return as_json({"name": "me", "type": "user", "orgs": [], "auth": {}})
        if path.startswith("/api/validate-yaml"):
            return as_json({"errors": [], "warnings": []})
        if path.startswith("/objects/"):
            return self.object(request, path.removeprefix("/objects/"))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        repo_id = "/".join(parts[:2]).removesuffix(".git")
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and self.unauthorised(request)):
            return error(401, "RepoNotFound", "Repository not found")
        if path.endswith("/info/lfs/objects/batch"):
            return self.lfs_batch(request)
        if api and len(parts) > 3 and parts[2] == "preupload":
            files = request.get_json()["files"]
            mode = {True: "lfs", False: "regular"}
            return as_json({"files": [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]})  # fmt: skip
        if api and len(parts) > 3 and parts[2] == "commit":
            return self.commit(request, repo_id, repo)
        found = repo.at(parts[3] if len(parts) > 3 else "main")
        if found is None:
            return error(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if api and parts[2:3] == ["tree"]:
            return as_json([{"type": "file", "path": p, "size": len(c), "oid": sha256(c)} for p, c in files.items()])
        if api:
            names = [{"rfilename": name} for name in files]
            return as_json({"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": names, "private": False})
        return self.resolve(request, commit, files, "/".join(parts[4:]))

    def resolve(self, request: Request, commit: str, files: dict[str, bytes], name: str) -> Response:
        if name not in files:
            return error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        digest, headers = sha256(files[name]), {"X-Repo-Commit": commit}
        if name.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[name]))}
            return Response("", 302, {**headers, "Location": f"{self.store}/objects/{digest}"})
        return content(request, files[name], {**headers, "ETag": f'"{digest[:40]}"'})

    def object(self, request: Request, digest: str) -> Response:
        if request.method == "PUT":
            data = request.get_data()
            if sha256(data) != digest:
                return Response("wrong content", 400)
            self.blobs[digest] = data
            return Response("", 200)
        data = self.blobs[digest]
        time.sleep(self.slow)
        if self.tamper:
            data = data[:-1] + bytes([data[-1] ^ 1])
        response = content(request, data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})
        if self.cut and request.method == "GET":
            self.cut -= 1
            body = response.get_data()
            response.response = [body[: len(body) // 2]]  # the length that was announced stays
        return response

    def lfs_batch(self, request: Request) -> Response:
        if self.unauthorised(request):
            return error(401, "", "Invalid credentials")
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            | ({} if o["oid"] in self.blobs else {"actions": {"upload": {"href": f"{self.store}/objects/{o['oid']}"}}})
            for o in request.get_json()["objects"]
        ]
        return as_json({"transfer": "basic", "objects": objects})

    def commit(self, request: Request, repo_id: str, repo: Repo) -> Response:
        if self.unauthorised(request):
            return error(401, "", "Invalid credentials")
        files = {}
        for line in request.get_data().decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        commit = self.add(repo_id, files)
        url = f"{self.url}/{repo_id}/commit/{commit}"
        return as_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    @staticmethod
    def unauthorised(request: Request) -> bool:
        return request.headers.get("Authorization") != f"Bearer {TOKEN}"


def content(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """`data`, or the range of it that is asked for."""
    if request.range and request.range.range_for_length(len(data)):
        start, stop = request.range.range_for_length(len(data))
        response = Response(data[start:stop], 206, headers)
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    else:
        response = Response(data, 200, headers)
    response.headers["Content-Length"] = str(len(response.get_data()))
    return response


def as_json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, content_type="application/json")


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response("", status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})


@contextmanager
def serve() -> Iterator[HubServer]:
    """A running server on a free port; it stops with the block, and its threads do not outlive the process."""
    hub = HubServer()
    server = make_server("127.0.0.1", 0, hub, threaded=True)
    server.daemon_threads = True
    hub.url, hub.store = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hang = False
        server.shutdown()
        server.server_close()
        thread.join(5)
