"""A small stand-in for the Hub, so that `huggingface_hub`'s own client code runs in tests without a network.

It keeps model repositories in memory: immutable commits, branches, tags, private repositories, large files behind a
redirect. It knows the requests that pushing and loading make and no others, and answers errors as the Hub does, with
`X-Error-Code`. Xet storage is left out: clients must run with `HF_HUB_DISABLE_XET=1`; see `HubStandIn.environment`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LARGE_FILES = (".safetensors", ".bin", ".png")
REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{REPOSITORY}", "information"),
    ("GET", rf"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)", "information"),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", "tree"),
    ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<name>[^/]+)", "create_branch"),
    ("POST", rf"/api/models/{REPOSITORY}/tag/(?P<revision>[^/]+)", "create_tag"),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "upload_modes"),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "large_file_batch"),
    ("PUT", r"/large-files/(?P<digest>\w+)", "upload_large_file"),
    ("GET", r"/large-files/(?P<digest>\w+)", "large_file"),
    ("HEAD", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class HubError(Exception):
    """An answer with an error code of the Hub's."""

    def __init__(self, status, code, message, **details):
        super().__init__(message)
        self.status, self.code = status, code
        self.content = json.dumps({"error": message, **details}).encode()


@dataclass
class Repository:
    """Commits are dicts of path -> content digest; branches and tags name commits."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision):
        revision = unquote(revision)
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def add_commit(self, branch, files):
        parent = self.branches.get(branch, "")
        content = json.dumps([parent, len(self.commits), sorted(files.items())])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class HubStandIn:
    """The server, to be used in a `with` statement.

    Args:
        users: User name -> token. A user may read and write repositories under its name, and read public ones.
    """

    def __init__(self, users):
        self.owners = {token: name for name, token in users.items()}
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host, as far as clients can tell

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=None):
        """Environment variables of a client that talks to this server and keeps everything in the folder `home`."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def files(self, repository, revision="main"):
        """Path -> content of one commit."""
        repository = self.repositories[repository]
        return {
            path: self.contents[digest] for path, digest in repository.commits[repository.commit_of(revision)].items()
        }

    def keep(self, content):
        digest = hashlib.sha256(content).hexdigest()
        self.contents[digest] = content
        return digest


class _Handler(BaseHTTPRequestHandler):
    """One request. Methods named in `ROUTES` return the answer's JSON, or have answered and return None."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_any(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            try:
                for method, pattern, name in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and method == self.command:
                        answer = getattr(self, name)(**match.groupdict())
                        break
                else:
                    raise HubError(501, "NotImplemented", f"the stand-in has no {self.command} {path}")
            except HubError as error:
                headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                self._answer(error.status, error.content, {**headers, "Content-Type": "application/json"})
                return
            if answer is not None:
                self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_GET = do_POST = do_PUT = do_HEAD = do_any

    def _read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self):
        """Name of the user whose token came along; None for nobody."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.owners:
            raise HubError(401, "InvalidToken", "Invalid credentials in Authorization header")
        return self.hub.owners.get(token)

    def _repository(self, name, write=False):
        repository = self.hub.repositories.get(name)
        owns = self.user == name.split("/")[0]
        if repository is None or (repository.private and not owns):
            # The same answer for both, so that nobody learns which private repositories exist.
            raise HubError(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        if write and not owns:
            raise HubError(403, "Forbidden", f"no permission to write {name}")
        return repository

    # ---- Repositories

    def whoami(self):
        if self.user is None:
            raise HubError(401, "InvalidToken", "Invalid credentials in Authorization header")
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def create_repository(self):
        values = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "InvalidToken", "Invalid username or password.")
        name = f"{values.get('organization') or self.user}/{values['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if not name.startswith(f"{self.user}/"):
            raise HubError(403, "Forbidden", f"no permission to create {name}")
        if name in self.hub.repositories:
            raise HubError(409, "Conflict", "You already created this model repo", url=url)
        private = values.get("visibility") == "private" or values.get("private") is True
        self.hub.repositories[name] = repository = Repository(private=private)
        repository.add_commit("main", {".gitattributes": self.hub.keep(b"*.safetensors filter=lfs\n")})
        return {"url": url, "name": name, "id": name}

    def information(self, repository, revision="main"):
        found = self._repository(repository)
        commit = found.commit_of(revision)
        siblings = [{"rfilename": path} for path in found.commits[commit]]
        return {
            "id": repository,
            "modelId": repository,
            "sha": commit,
            "private": found.private,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def tree(self, repository, revision, folder):
        found = self._repository(repository)
        files = found.commits[found.commit_of(revision)]
        return [
            {"type": "file", "path": path, "size": len(self.hub.contents[digest]), "oid": digest}
            for path, digest in files.items()
            if path.startswith(folder)
        ]

    def create_branch(self, repository, name):
        found = self._repository(repository, write=True)
        if name in found.branches:
            raise HubError(409, "Conflict", f"Reference already exists: {name}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        found.branches[name] = found.commit_of(start)
        return {}

    def create_tag(self, repository, revision):
        found = self._repository(repository, write=True)
        found.tags[json.loads(self.body)["tag"]] = found.commit_of(revision)
        return {}

    # ---- Uploads

    def upload_modes(self, repository, revision):
        self._repository(repository, write=True)
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(LARGE_FILES) else "regular" for file in files}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def large_file_batch(self, repository):
        self._repository(repository, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            target = {"href": f"{self.hub.endpoint}/large-files/{item['oid']}", "header": {}}
            missing = item["oid"] not in self.hub.contents
            objects.append({**item, **({"actions": {"upload": target}} if missing else {})})
        return {"transfer": "basic", "objects": objects}

    def upload_large_file(self, digest):
        if self.hub.keep(self.body) != digest:
            raise HubError(400, "BadRequest", "the content is not what was announced")
        return {}

    def commit(self, repository, revision):
        found = self._repository(repository, write=True)
        files = dict(found.commits[found.commit_of(revision)])
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.contents:
                    raise HubError(400, "BadRequest", f"{value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise HubError(501, "NotImplemented", f"the stand-in can't commit {key}")
        commit = found.add_commit(unquote(revision), files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repository}/commit/{commit}"}

    # ---- Downloads

    def resolve(self, repository, revision, path):
        found = self._repository(repository)
        commit = found.commit_of(revision)
        if path not in found.commits[commit]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            return self._answer(404, b"", headers)
        digest = found.commits[commit][path]
        content = self.hub.contents[digest]
        if not path.endswith(LARGE_FILES):
            return self._answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{digest[:40]}"'})
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.storage}/large-files/{digest}",
        }
        return self._answer(302, b"", headers)

    def large_file(self, digest):
        return self._answer(200, self.hub.contents[digest], {"ETag": f'"{digest}"'})
