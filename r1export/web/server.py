"""A read-only server on 127.0.0.1 for the web page and the files of one version at a time.

    GET /                            the page; /page.js, /vendor/... and what else it is made of
    GET /state.json                  {"sha256": of the current version's manifest.json}, or {"error": reason}
    GET /release/SHA256/PATH         a file of the version with that manifest

Requests are looked up in a table, never joined to a folder path. The bytes of a version are sent unchecked; the page
verifies their digests, as any client has to.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from r1export.errors import R1ExportError, Unsupported
from r1export.web.source import REMEMBERED, Opened, Served, Source

HOST = "127.0.0.1"
FOLDER = Path(__file__).parent / "page"
VENDORED = Path(__file__).parent / "vendor"  # filled by scripts/vendor_web.py
PAGE = (
    "index.html",
    "page.css",
    "icon.svg",
    "page.js",
    "view.js",
    "worker.js",
    "clip.js",
    "picture.js",
    "release.js",
    "safetensors.js",
)
VENDOR = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
# Same-origin only, no inline script, nothing in a frame; the isolation of COOP and COEP is what threads in WASM need.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
SILENCE = 30  # seconds before an idle connection is closed
_RELEASE = re.compile(r"/release/([0-9a-f]{64})/(.+)", re.S)


class Server(ThreadingHTTPServer):
    """Serves the page and whatever `source` says is current."""

    daemon_threads = True

    def __init__(self, source: Source, port: int) -> None:
        """Raises Unsupported if the page's runtime is not installed, or the port is in use."""
        self.source = source
        self.page = page_files()
        self.versions: dict[str, Served] = {}
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise Unsupported(
                f"port {port} of {HOST}: {error.strerror}", "choose another with --port; 0 picks a free one"
            ) from error

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    @property
    def names(self) -> set[str]:
        """Accepted Host headers; any other name could be a DNS rebinding attack."""
        names = {HOST, "localhost"}
        return {f"{name}:{self.server_port}" for name in names} | (names if self.server_port == 80 else set())

    def current(self) -> Served:
        """The current version, whose files are served from now on. Raises R1ExportError if there is none."""
        served = self.source()
        others = {sha256: other for sha256, other in self.versions.items() if sha256 != served.sha256}
        self.versions = {**dict(list(others.items())[1 - REMEMBERED :]), served.sha256: served}
        return served

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client disconnected, or a file could not be read completely: close the connection and continue."""
        if not isinstance(sys.exception(), OSError | R1ExportError):
            super().handle_error(request, client_address)


def page_files() -> dict[str, Path]:
    """Every file of the page by its request path. Raises Unsupported if the runtime is not installed."""
    vendored = {f"/vendor/{name}": VENDORED / name for name in VENDOR}
    if missing := [path.name for path in vendored.values() if not path.is_file()]:
        raise Unsupported(
            f"the page's runtime is not installed: {', '.join(missing)}",
            "run `python scripts/vendor_web.py` in the source tree (requires npm)",
        )
    page = {f"/{name}": FOLDER / name for name in PAGE}
    return {"/": page["/index.html"], **page, **vendored}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "r1export", ""
    timeout = SILENCE

    def do_GET(self) -> None:
        """Answer, or say that there is no such file."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.names:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "ask for 127.0.0.1 or localhost")
        elif self.path == "/state.json":
            self._state()
        elif self.path in self.server.page:
            path = self.server.page[self.path]
            data = path.read_bytes()
            self._send(Opened(len(data), [data]), TYPES[path.suffix])
        else:
            self._release()

    do_HEAD = do_GET

    def _state(self) -> None:
        try:
            status, answer = HTTPStatus.OK, {"sha256": self.server.current().sha256}
        except (R1ExportError, OSError) as error:
            status, answer = HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)}
        data = json.dumps(answer).encode()
        self._send(Opened(len(data), [data]), "application/json", status)

    def _release(self) -> None:
        match = _RELEASE.fullmatch(self.path)
        version = self.server.versions.get(match[1]) if match else None
        open_file = version.files.get(unquote(match[2])) if match and version else None
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(open_file()) if open_file else None
            except OSError:
                opened = None  # removed since, as updates do with old versions
            if opened:
                self._send(opened, "application/octet-stream")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, opened: Opened, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(opened.nbytes))
        self.end_headers()
        if self.command == "HEAD":
            return
        left = opened.nbytes
        for piece in opened.pieces:
            self.wfile.write(piece[:left])
            left -= min(left, len(piece))
        if left:  # the file was truncated while it was read, which the client must notice
            self.close_connection = True

    def _refuse(self) -> None:
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")  # and with it a body that nobody reads
        self.end_headers()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def end_headers(self) -> None:
        """Add the security headers to every response, errors included."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""
