"""A Hugging Face Hub of one repository, served over HTTP from local folders.

    with FakeHub("nvidia/Cosmos3-Tiny", {"main": folder, "fp8": other_folder}) as hub:
        ...  # in another process, with HF_ENDPOINT=hub.url: snapshot_download("nvidia/Cosmos3-Tiny", revision="fp8")
    assert "vision_encoder/model.safetensors" not in hub.downloaded

It answers what `huggingface_hub.snapshot_download` asks of a repository without Xet storage: the commit of a revision,
the files of a commit, and the files themselves, of which the large kinds come from another host, as on the real Hub.
"""

import json
import re
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".safetensors")
ROUTE = re.compile(r"/(?:api/models/)?([^/]+/[^/]+)/(revision|tree|resolve|cdn)/([^/]+)/?(.*)")


class FakeHub(ThreadingHTTPServer):
    """The server, which runs inside a `with`; its attributes may be changed while it runs."""

    def __init__(self, repo: str, folders: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.url = repo, f"http://127.0.0.1:{self.server_port}"
        self.revisions: dict[str, tuple[str, dict[str, bytes]]] = {}  # branch, tag or commit: commit, files
        self.gated: int | None = None  # the status with which files are refused: 401 without a token, 403 with one
        self.cuts: dict[str, int] = {}  # file: how many more downloads of it break off halfway
        self.downloaded: list[str] = []  # the files sent, whole or not (not a second one of the same content)
        for name, folder in folders.items():
            self.push(name, folder)

    def push(self, name: str, folder: Path) -> None:
        """Makes a commit of the files now in a folder, and a branch or tag point to it."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        commit = sha1(repr((name, files)).encode()).hexdigest()
        self.revisions[name] = self.revisions[commit] = commit, files

    def __enter__(self):
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: FakeHub

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def do_GET(self):
        hub, route = self.server, ROUTE.fullmatch(urlsplit(self.path).path)
        repo, asked, revision, file = map(unquote, route.groups()) if route else [""] * 4
        if repo != hub.repo:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in hub.revisions:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = hub.revisions[revision]
        if asked == "revision":
            return self.answer(200, {}, json.dumps({"id": repo, "sha": commit}).encode())
        if asked == "tree":
            return self.answer(200, {}, json.dumps([entry(*item) for item in files.items()]).encode())
        if asked == "resolve" and hub.gated:
            return self.answer(hub.gated, {"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, about = files[file], entry(file, files[file])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{about["oid"]}"', "Content-Length": str(len(content))}
        if asked == "resolve" and "lfs" in about:
            linked = {"X-Linked-Etag": f'"{about["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
            location = f"http://localhost:{hub.server_port}/{repo}/cdn/{commit}/{quote(file)}"
            return self.answer(302, {"X-Repo-Commit": commit, "Location": location} | linked)
        if self.command == "GET":
            hub.downloaded.append(file)
            if hub.cuts.get(file, 0):
                hub.cuts[file] -= 1
                content = content[: len(content) // 2]
        return self.answer(200, headers, content)

    do_HEAD = do_GET

    def log_message(self, *_): ...


def entry(path: str, content: bytes) -> dict:
    """A file as the Hub lists it."""
    about = {"type": "file", "path": path, "size": len(content), "oid": sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if path.endswith(LFS_SUFFIXES):
        about["lfs"] = {"oid": sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return about
