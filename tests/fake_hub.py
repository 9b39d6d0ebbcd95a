"""A small Hugging Face Hub in this process, for tests that push and download; it can break."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER, WRONG = "hf_ThisOneMayWrite", "hf_ThisOneMayRead", "hf_ThisOneIsNobodys"
RESOLVE = re.compile(r"/(?:(spaces|datasets)/)?([\w-]+/[\w.-]+)/resolve/\w+/(.+)")
API = re.compile(r"/api/(models|spaces|datasets)/([\w-]+/[\w.-]+)(?:/([\w-]+)(?:/[^/]+/?(.*))?)?")
COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub's protocol as pushing and downloading takes.

    repos: {(kind, name): {path: content}}; stored: pushed large files by their sha256; log: every
    request, as (method, path); sent: the file of every download; created: the settings of new
    repositories.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.stored, self.log, self.sent, self.created = {}, {}, [], [], []
        self.large = (".safetensors", ".npy")  # endings of what is stored by LFS
        self.closed = []  # parts of paths: the next request with one gets no answer
        self.truncated = {}  # {file: bytes after which its next download breaks}
        self.damaged = set()  # files that are sent as zeros
        self.gated = set()  # names of repositories that ask for access
        self.halfway = lambda name: None  # called when half of an LFS file is sent
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def times(self, *words):
        """How many requests had all these words in their method and path."""
        return sum(all(word in " ".join(entry) for word in words) for entry in self.log)

    def environment(self):
        """The variables that make another process use this hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"}

    def close(self):
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def running(monkeypatch):
    """A Hub that scripts run in this process use."""
    hub = Hub()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", True),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield hub
    hub.close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        path, hub = unquote(urlsplit(self.path).path), self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.log.append((self.command, path))
        for part in [part for part in hub.closed if part in path]:
            hub.closed.remove(part)
            return self.hang_up()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            return self.send(401, {"error": "Invalid credentials"},
                             {"X-Error-Message": "Invalid credentials in Authorization header"})
        reading = self.command != "POST" or "/paths-info/" in path  # a PUT has a secret address
        if not reading and token != WRITER:
            return self.send(403, {"error": "You don't have the rights"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path.startswith("/stored/"):
            hub.stored[path.split("/")[-1]] = body
        if path.startswith(("/stored/", "/api/validate-yaml")):
            return self.send(200, {})
        if any(f"/{name}/" in path for name in hub.gated):
            return self.send(403, {}, {"X-Error-Code": "GatedRepo",
                                       "X-Error-Message": "Visit the page to ask for access."})
        if match := API.fullmatch(path):
            return self.api(*match.groups(), body)
        if match := RESOLVE.fullmatch(path):
            return self.resolve(*match.groups())
        return self.send(404, {"error": path})

    do_GET = do_POST = do_PUT = do_HEAD

    def create(self, settings):
        key = f"{settings['type']}s", f"{settings['organization']}/{settings['name']}"
        answer = {"url": f"{self.server.url}/{key[1]}"}
        if key in self.server.repos:
            return self.send(409, answer | {"error": "It exists"})
        self.server.created.append(settings)
        self.server.repos[key] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.send(200, answer)

    def batch(self, request):
        objects = [{"oid": item["oid"], "size": item["size"]} |
                   ({} if item["oid"] in self.server.stored else {"actions": {
                       "upload": {"href": f"{self.server.url}/stored/{item['oid']}"}}})
                   for item in request["objects"]]
        self.send(200, {"transfer": "basic", "objects": objects})

    def api(self, kind, name, verb, folder, body):
        files = self.server.repos.get((kind, name))
        if files is None:
            return self.send(404, {"error": "Repository not found"},
                             {"X-Error-Code": "RepoNotFound"})
        if verb == "tree":
            inside = {path: content for path, content in sorted(files.items())
                      if path.startswith(f"{folder}/" if folder else "")}
            if "recursive=true" not in self.path.lower():
                start = len(folder) + 1 if folder else 0
                folders = {path[: path.index("/", start)] for path in inside if "/" in path[start:]}
                inside = {path: inside.get(path) for path in sorted(
                    {path for path in inside if "/" not in path[start:]} | folders)}
            return self.send(200, [self.described(*entry) for entry in inside.items()])
        if verb == "paths-info":
            asked = parse_qs(body.decode()).get("paths", [])
            return self.send(200, [self.described(path, files[path])
                                   for path in asked if path in files])
        if verb == "preupload":
            return self.preupload(files, json.loads(body)["files"])
        if verb == "commit":
            return self.commit(files, name, map(json.loads, body.splitlines()))
        self.send(200, {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                        "siblings": [{"rfilename": path} for path in files]})

    def described(self, path, content):
        """A file or folder (no content) in a listing, with its git or LFS sum."""
        if content is None:
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        entry = {"type": "file", "path": path, "size": len(content)}
        if path.endswith(self.server.large):
            digest = hashlib.sha256(content).hexdigest()
            return {**entry, "oid": "0" * 40,
                    "lfs": {"oid": digest, "size": len(content), "pointerSize": 130}}
        return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

    def preupload(self, files, asked):
        answers = []
        for path in (file["path"] for file in asked):
            mode = "lfs" if path.endswith(self.server.large) else "regular"
            answers.append({"path": path, "shouldIgnore": False, "uploadMode": mode})
            if path in files:
                entry = self.described(path, files[path])
                answers[-1]["oid"] = entry.get("lfs", entry)["oid"]
        self.send(200, {"files": answers})

    def commit(self, files, name, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}",
                        "commitOid": COMMIT})

    def resolve(self, kind, name, path):
        hub = self.server
        files = hub.repos.get((kind or "models", name), {})
        if path not in files:
            return self.send(404, {}, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
                   "Accept-Ranges": "bytes"}
        if not path.endswith(hub.large):
            return self.send(200, content, headers)
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if path in hub.damaged:
            content = bytes(len(content))
        self.send(206 if first else 200, content[first:], headers, path)

    def send(self, status, body, headers=(), large_file=""):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(content)
        if large_file:
            self.server.sent.append(large_file)
            end = self.server.truncated.pop(large_file, end)
        with contextlib.suppress(OSError):  # the client may have been killed
            self.wfile.write(content[: end // 2])
            if large_file:
                self.server.halfway(large_file)
            self.wfile.write(content[end // 2 : end])
        if end < len(content):
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
