"""The two HTTP servers of the stand-in, its log of requests, and its permissions."""

from __future__ import annotations

import itertools
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

from tests.hub_stand_in import read_routes, write_routes
from tests.hub_stand_in.answers import Answer, Sending, as_json, refusal, sending
from tests.hub_stand_in.faults import Fault, Faults
from tests.hub_stand_in.repositories import Repositories, Repository

NAME = r"(?P<name>[^/]+/[^/]+?)"
ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", rf"/api/models/{NAME}", read_routes.model_info),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", read_routes.model_info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", read_routes.tree),
    ("POST", rf"/api/models/{NAME}/paths-info/(?P<revision>[^/]+)", read_routes.paths_info),
    ("GET", rf"/api/models/{NAME}/commits/(?P<revision>[^/]+)", read_routes.commits),
    ("GET", rf"/api/models/{NAME}/refs", read_routes.refs),
    ("GET", rf"/api/models/{NAME}/discussions", read_routes.discussions),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", read_routes.resolve),
    ("POST", "/api/repos/create", write_routes.create_repository),
    ("POST", "/api/validate-yaml", write_routes.validate_yaml),
    ("POST", rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", write_routes.create_branch),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", write_routes.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", write_routes.commit),
    ("POST", r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", write_routes.lfs_batch),
    ("PUT", r"/-/lfs/(?P<sha256>[0-9a-f]{64})(?:/(?P<part>\d+))?", write_routes.put_object),
    ("POST", r"/-/lfs/(?P<sha256>[0-9a-f]{64})/complete", write_routes.complete_object),
    ("POST", r"/-/lfs/(?P<sha256>[0-9a-f]{64})/verify", write_routes.verify_object),
)
"""Method, path (only its groups are percent-decoded), function. HEAD is GET without a body."""

WRITING = re.compile(r"/api/(repos|models/.+/(branch|preupload|commit))/|\.git/info/lfs/")


ENDLESS = 200_000
"""Bytes or responses that a fault without end sends, which is more than any client waits for."""


@dataclass
class Request:
    """One request with its response. Header names are in lower case. It is logged before the response is sent, so that
    a client that has the response finds the request in the log."""

    server: str
    method: str
    path: str
    headers: Mapping[str, str]
    status: int
    nbytes_sent: int = 0
    """Bytes of the body that were sent, 0 if the client disconnected."""


@dataclass
class Call:
    """A request that is passed to a route."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode())


@dataclass
class Hub:
    """State and configuration of a stand-in."""

    tokens: dict[str, str] = field(default_factory=dict)
    """User per token. Without tokens, everybody may write. Private and gated repositories always need a token."""
    page_size: int = 1000
    part_nbytes: int | None = None
    """Larger uploads are split into parts of this size."""
    with_cdn: bool = False
    """Redirect readers of LFS files to a second host."""
    verify_endpoint: str | None = None
    """Another host that clients shall ask whether an upload has arrived. None names the stand-in itself."""
    bytes_per_second: float | None = None
    """Speed of each connection that sends a file."""
    repositories: Repositories = field(default_factory=Repositories)
    faults: Faults = field(default_factory=Faults)
    log: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Tracebacks of errors in the stand-in itself."""
    endpoint: str = ""
    cdn_endpoint: str | None = None

    def add_folder(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> Repository:
        """Create a repository from a directory. `Repositories` has more methods."""
        return self.repositories.add_folder(name, folder, private=private, gated=gated)

    def requests(self, route: str) -> list[Request]:
        """Return the requests so far whose `METHOD SERVER/path?query` contains a match of the regular expression."""
        return [one for one in list(self.log) if re.search(route, f"{one.method} {one.server}{one.path}")]

    def token_of(self, call: Call) -> str | None:
        return call.headers.get("authorization", "").removeprefix("Bearer ") or None

    def user_of(self, call: Call) -> str:
        return self.tokens.get(self.token_of(call) or "", "user")

    def answer(self, call: Call) -> Answer:
        """Run the route of a request if the token permits it."""
        token = self.token_of(call)
        if self.tokens and token is not None and token not in self.tokens:
            return as_json(
                {"error": "Invalid credentials in Authorization header"},
                401,
                X_Error_Message="Invalid credentials in Authorization header",
            )
        if self.tokens and token is None and WRITING.search(call.path):
            return as_json({"error": "Unauthorized"}, 401, X_Error_Message="Unauthorized")
        if call.path == "/api/whoami-v2":
            return as_json({"type": "user", "name": self.user_of(call), "orgs": []})
        for method, pattern, route in ROUTES:
            found = re.fullmatch(pattern, call.path)
            if found is None or method != {"HEAD": "GET"}.get(call.method, call.method):
                continue
            named = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
            if "name" not in named:
                return route(self, call, **named)
            repository = self.repositories.by_name.get(named.pop("name"))
            denied = self._denied(repository, token, call)
            return denied or route(self, call, repository, **named)
        return as_json({"error": f"the stand-in has no route {call.method} {call.path}"}, 404)

    def _denied(self, repository: Repository | None, token: str | None, call: Call) -> Answer | None:
        allowed = repository is not None and token is not None and (token in repository.readers)
        if repository is None or (repository.private and not allowed):
            return refusal(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if repository.gated and not allowed and "/resolve/" in call.path:
            message = f"Access to model {repository.name} is restricted and you are not in the authorized list."
            return refusal(401 if token is None else 403, "GatedRepo", message)
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub
    server_name: str

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: requests are logged in `Hub.log`."""

    def _serve(self) -> None:
        split = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, split.path, dict(parse_qsl(split.query)), headers, body)
        faults = self.hub.faults.of(f"{self.command} {self.server_name}{self.path}")
        if self.headers.get("Transfer-Encoding"):
            self._send(as_json({"error": "the stand-in takes no chunked bodies"}, 411), call, [])
            return
        by_kind = {fault.kind: fault for fault in faults}
        if "call" in by_kind and (hook := by_kind["call"].hook) is not None:
            hook()
        if "slow" in by_kind:
            time.sleep(by_kind["slow"].seconds)
        if "drop" in by_kind:
            self._note(call, 0)
            self._hang_up()
            return
        if "status" in by_kind:
            fault = by_kind["status"]
            text = "a fault of the stand-in" + " " * fault.nbytes
            self._send(as_json({"error": text}, fault.status), call, faults)
            return
        answer = read_routes.delivered(self.hub, split.path) if self.server_name == "cdn" else self.hub.answer(call)
        if "lose" in by_kind:
            self._note(call, 0)
            self._hang_up()
            return
        self._send(answer, call, faults)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _note(self, call: Call, status: int) -> Request:
        request = Request(self.server_name, self.command, self.path, call.headers, status)
        self.hub.log.append(request)
        return request

    def _send(self, answer: Answer, call: Call, faults: list[Fault]) -> None:
        outgoing = sending(answer, call.headers.get("range"), faults)
        by_kind = {fault.kind: fault for fault in faults}
        if "status" in by_kind:
            outgoing.headers |= by_kind["status"].headers
        if outgoing.headers.get("Link", "").startswith("<?"):
            outgoing.headers["Link"] = outgoing.headers["Link"].replace("<?", f"<{self.hub.endpoint}{call.path}?")
        request = self._note(call, outgoing.status)
        more = by_kind["wrong_length"].nbytes if "wrong_length" in by_kind else 0
        more += ENDLESS if "trickle" in by_kind else 0
        try:
            self._send_before_headers(by_kind)
            self.send_response(outgoing.status)
            for name, value in outgoing.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(outgoing.nbytes + more))
            self.end_headers()
            if self.command != "HEAD":
                self._send_body(outgoing, by_kind, request)
        except (ConnectionError, TimeoutError):
            request.nbytes_sent = 0
            self._hang_up()
            return
        if request.nbytes_sent < outgoing.nbytes + more and self.command != "HEAD":
            if "stall" in by_kind:
                time.sleep(by_kind["stall"].seconds)
            self._hang_up()

    def _send_before_headers(self, by_kind: Mapping[str, Fault]) -> None:
        for kind, start, again in (
            ("interim", b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            ("trickle_headers", b"HTTP/1.1 200 OK\r\nX-Endless: ", b"x"),
        ):
            if kind in by_kind:
                self.wfile.write(start)
                self._trickle(itertools.repeat(again, ENDLESS), by_kind[kind])

    def _trickle(self, parts: Iterable[bytes], fault: Fault) -> None:
        for part in parts:
            self.wfile.write(part)
            if fault.hook is not None:
                fault.hook()

    def _send_body(self, outgoing: Sending, by_kind: Mapping[str, Fault], request: Request) -> None:
        limit = min((by_kind[kind].nbytes for kind in ("cut", "stall") if kind in by_kind), default=outgoing.nbytes)
        rate, began = self.hub.bytes_per_second, time.monotonic()
        if "trickle" in by_kind:
            body = itertools.chain(b"".join(outgoing.pieces), itertools.repeat(ord(" "), ENDLESS))
            self._trickle((bytes([byte]) for byte in body), by_kind["trickle"])
            return
        for piece in outgoing.pieces:
            part = piece[: limit - request.nbytes_sent]
            request.nbytes_sent += len(part)
            self.wfile.write(part)
            if rate is not None:
                time.sleep(max(0.0, began + request.nbytes_sent / rate - time.monotonic()))
            if request.nbytes_sent >= limit:
                break
        self.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that disconnected. Any other error fails the test at its end."""
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.errors.append(traceback.format_exc())


def _start(hub: Hub, name: str, host: str) -> tuple[_Server, str]:
    handler = type("Handler", (_Handler,), {"hub": hub, "server_name": name})
    server = _Server(("127.0.0.1", 0), handler)
    server.hub = hub
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server, f"http://{host}:{server.server_address[1]}"


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends. Set `endpoint`, and `cdn_endpoint` with another host name."""
    server, hub.endpoint = _start(hub, "hub", "127.0.0.1")
    servers = [server]
    if hub.with_cdn:
        cdn, hub.cdn_endpoint = _start(hub, "cdn", "localhost")
        servers.append(cdn)
    try:
        yield hub
    finally:
        for one in servers:
            one.shutdown()
            one.server_close()
    assert not hub.errors, hub.errors[0]
