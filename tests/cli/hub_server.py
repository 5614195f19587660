"""A fake of the Hugging Face hub's HTTP API on 127.0.0.1, which keeps what is committed."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, READER = "hf_good", "hf_reader"
LFS = re.compile(r".*\.(safetensors|model|jsonl)")


class Hub:
    """The fake: what it was asked for, and what it has.

    repos: {id: {"private", "kind", "branches": {name: {path: bytes}}}}. commits: (id, branch, summary, paths). fail: the status with which
    it answers uploads from now on, or once.
    """

    def __init__(self):
        self.repos, self.commits, self.blobs, self.fail, self.lock = {}, [], {}, None, threading.RLock()
        self.gone = self.once = False
        self.held = threading.Event()  # uploads wait while it is not set
        self.held.set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self):
        self.held.set()
        self.gone = True
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo, branch="main"):
        return self.repos[repo]["branches"][branch]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, code, value=None):
        body = json.dumps({} if value is None else value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        if self.path.startswith("/api/whoami-v2"):
            role = {f"Bearer {TOKEN}": "write", f"Bearer {READER}": "read"}.get(self.headers.get("Authorization"))
            user = {"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token", "accessToken": {"role": role}}}
            return self.answer(200, user) if role else self.answer(401, {"error": "bad"})
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/?]+).*", self.path):
            files = self.hub.files(match[1], match[2])
            return self.answer(200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files])
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", self.path):
            return self.file(self.hub.files(match[1], match[2])[match[3]])
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/.*)?", self.path):
            known = match[1] in self.hub.repos
            return self.answer(200, {"id": match[1], "sha": "0" * 40, "siblings": []}) if known else self.answer(404, {"error": "none"})
        return self.answer(404, {"error": self.path})

    do_HEAD = do_GET

    def file(self, data):
        self.send_response(200)
        headers = {"Content-Length": len(data), "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def handle_one_request(self):
        if self.hub.gone:  # a connection that was kept open is of no use, either
            self.close_connection = True
        else:
            super().handle_one_request()

    def do_PUT(self):
        self.hub.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200)

    def do_POST(self):
        raw = self.body()
        hub, path = self.hub, self.path
        if hub.gone:
            self.close_connection = True
            return None
        if path.startswith("/api/repos/create"):
            return self.create(json.loads(raw))
        if path.startswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/branch/([^/]+)", path):
            hub.repos[match[1]]["branches"].setdefault(match[2], {})
            return self.answer(200)
        hub.held.wait(30)
        if hub.fail is not None:
            status, hub.fail = hub.fail, None if hub.once else hub.fail
            return self.answer(status, {"error": "out of order"})
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/preupload/([^/?]+).*", path):
            files = [
                {"path": one["path"], "uploadMode": "lfs" if LFS.fullmatch(one["path"]) else "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(raw)["files"]
            ]
            return self.answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(raw)["objects"]
            actions = [one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}} for one in wanted]
            return self.answer(200, {"transfer": "basic", "objects": actions})
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/commit/([^/?]+).*", path):
            return self.commit(match[1], match[2], [json.loads(line) for line in raw.splitlines()])
        return self.answer(404, {"error": path})

    def create(self, asked):
        owner = asked.get("organization") or "me"
        name = f"{owner}/{asked['name']}"
        if owner != "me" or self.headers.get("Authorization") == f"Bearer {READER}":
            return self.answer(403, {"error": "no right"})
        with self.hub.lock:
            there = name in self.hub.repos
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.repos.setdefault(name, {"private": private, "kind": asked.get("type", "model"), "branches": {"main": {}}})
        return self.answer(409 if there else 200, {"url": f"{self.hub.url}/{name}", "error": "exists"})

    def commit(self, repo, branch, lines):
        hub = self.hub
        with hub.lock:
            files, paths, summary = hub.repos[repo]["branches"][branch], [], ""
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    summary = value["summary"]
                    continue
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                    continue
                assert line["key"] in ("file", "lfsFile"), line
                files[value["path"]] = base64.b64decode(value["content"]) if line["key"] == "file" else hub.blobs[value["oid"]]
                paths.append(value["path"])
            hub.commits.append((repo, branch, summary, paths))
            number = f"{len(hub.commits):040x}"
        place = "" if hub.repos[repo]["kind"] == "model" else "datasets/"
        self.answer(200, {"commitUrl": f"{hub.url}/{place}{repo}/commit/{number}", "commitOid": number, "success": True})
