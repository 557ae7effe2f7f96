"""What the server gives and what it refuses, asked for over a socket."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from device.steps import in_this_process
from running import r1export

from r1export.device import install
from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.update.atomic_io import sha256_file
from r1export.update.release_manifest import Release, ReleaseManifest
from r1export.web import server as web
from r1export.web.source import Opened, Served, open_source


@pytest.fixture(autouse=True)
def _runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run here, so that these tests do without npm."""
    folder = tmp_path_factory.mktemp("vendor")
    for name in web.VENDOR:
        (folder / name).write_bytes(b"runtime")
    monkeypatch.setattr(web, "VENDORED", folder)


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()


def ask(url: str, path: str, method: str = "GET", hosts: tuple[str, ...] | None = None) -> Answer:
    """One request, sent as it is written here: nothing is made tidy on the way."""
    server = urlsplit(url).netloc
    with closing(http.client.HTTPConnection(server, timeout=10)) as connection:
        connection.putrequest(method, "/", skip_host=True)
        connection._buffer[0] = f"{method} {path} HTTP/1.1".encode("latin-1")
        for host in (server,) if hosts is None else hosts:
            connection.putheader("Host", host)
        connection.endheaders()
        return Answer(connection.getresponse())


def current(url: str) -> str:
    return json.loads(ask(url, "/state.json").body)["sha256"]


def test_every_file_of_the_page_is_served_with_its_type(lab, serve) -> None:
    url = serve(lab.release(1))
    assert {path.name for path in web.FOLDER.iterdir()} == set(web.PAGE)
    for name in web.PAGE:
        answer = ask(url, f"/{name}")
        assert (answer.status, answer.body) == (200, (web.FOLDER / name).read_bytes())
    assert ask(url, "/").body == (web.FOLDER / "index.html").read_bytes()
    types = {
        path: ask(url, path).headers["Content-Type"]
        for path in ("/", "/page.js", *(f"/vendor/{n}" for n in web.VENDOR))
    }
    assert types["/"] == "text/html; charset=utf-8"
    assert types["/page.js"] == types["/vendor/ort.wasm.min.mjs"] == "text/javascript; charset=utf-8"
    assert types["/vendor/ort-wasm-simd-threaded.wasm"] == "application/wasm"


def test_the_files_of_a_release_are_those_of_its_manifest_and_the_manifest(lab, serve) -> None:
    url, release = serve(lab.release(1)), Release.read(lab.release(1))
    assert current(url) == release.manifest_sha256
    for name in ("manifest.json", *release.manifest.files):
        answer = ask(url, f"/release/{release.manifest_sha256}/{quote(name)}")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/octet-stream")
        assert answer.body == (release.path / name).read_bytes()
    assert (release.path / "README.md").is_file()
    assert ask(url, f"/release/{release.manifest_sha256}/README.md").status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/..", "/../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "//etc/passwd", "/etc/passwd", "/vendor/", "/vendor/../server.py",
        "/vendor/.version", "/page/index.html", "/index.html/", "/?x", "/page.js?x", "/state.json/", "/state", "*", "http://127.0.0.1/page.js",
        "/release/", "/release/{}", "/release/{}/", "/release/{}/.", "/release/{}/..", "/release/{}/../manifest.json", "/release/{}//etc/passwd",
        "/release/{}/%2fetc%2fpasswd", "/release/{}/classes/../manifest.json", "/release/{}/..%2frelease/manifest.json", "/release/{}/manifest.json%00",
        "/release/{}/classes", "/release/{}/C:%5cx", "/release/{}/manifest.json?x", "/release/" + "0" * 64 + "/manifest.json", "/RELEASE/{}/manifest.json",
    ],
)  # fmt: skip
def test_a_path_that_is_not_in_the_table_does_not_exist(lab, serve, path: str) -> None:
    url = serve(lab.release(1))
    assert ask(url, path.format(current(url))).status == 404


def test_the_safe_headers_go_with_every_answer(lab, serve) -> None:
    url = serve(lab.release(1))
    answers = [
        ask(url, "/"),
        ask(url, "/nothing"),
        ask(url, "/", "POST"),
        ask(url, "/", hosts=("evil.example",)),
        ask(url, "/state.json"),
    ]
    assert [answer.status for answer in answers] == [200, 404, 405, 421, 200]
    for answer in answers:
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Python" not in answer.headers["Server"]
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self' 'wasm-unsafe-eval';")
        assert "unsafe-inline" not in policy
        assert "'unsafe-eval'" not in policy


def test_a_name_that_somebody_else_made_to_point_here_is_refused(lab, serve) -> None:
    url = serve(lab.release(1))
    port = urlsplit(url).port
    good = [f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}"]
    bad = [
        f"evil.example:{port}",
        "127.0.0.1",
        "localhost",
        f"127.0.0.1.evil.example:{port}",
        f"127.0.0.1:{port + 1}",
        f"0.0.0.0:{port}",
        "",
    ]
    assert [ask(url, "/", hosts=(host,)).status for host in good] == [200] * len(good)
    for path in ("/", "/state.json", f"/release/{current(url)}/manifest.json"):
        assert [ask(url, path, hosts=(host,)).status for host in bad] == [421] * len(bad)
        assert ask(url, path, hosts=()).status == 421
        assert ask(url, path, hosts=(good[0], bad[0])).status == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_nothing_can_be_changed(lab, serve, method: str) -> None:
    answer = ask(serve(lab.release(1)), "/state.json", method)
    assert (answer.status, answer.headers["Allow"], answer.headers["Connection"]) == (405, "GET, HEAD", "close")


def test_head_answers_with_the_length_alone(lab, serve) -> None:
    url = serve(lab.release(1))
    for path in ("/", f"/release/{current(url)}/visual.safetensors"):
        head, whole = ask(url, path, "HEAD"), ask(url, path)
        assert head.body == b""
        assert head.headers["Content-Length"] == whole.headers["Content-Length"] == str(len(whole.body))


def test_a_link_or_a_pipe_that_takes_the_place_of_a_file_is_not_followed(release: Path, serve, tmp_path: Path) -> None:
    url = serve(release)
    shutil.move(release / "classes", tmp_path / "elsewhere")
    (release / "classes").symlink_to(tmp_path / "elsewhere")
    (release / "visual.safetensors").unlink()
    (release / "visual.safetensors").symlink_to("textual.safetensors")
    (release / "golden.safetensors").unlink()
    os.mkfifo(release / "golden.safetensors")
    for name in ("classes/digits.json", "visual.safetensors", "golden.safetensors"):
        assert ask(url, f"/release/{current(url)}/{name}").status == 404
    assert ask(url, f"/release/{current(url)}/textual.onnx").status == 200


def test_a_release_that_does_not_hold_is_refused_before_it_is_served(release: Path) -> None:
    manifest = ReleaseManifest.read(release)
    replace(manifest, name="another").write(release)
    with pytest.raises(CheckFailed, match="self-digest mismatch"):
        open_source(release)
    manifest.write(release)
    with open(release / "visual.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CheckFailed, match=r"visual\.safetensors is damaged"):
        open_source(release)
    done = r1export("serve", release, "--port", 0)
    assert done.returncode == 1
    assert "visual.safetensors is damaged" in done.stderr


def test_what_is_neither_a_release_nor_a_store_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a release nor a device store"):
        open_source(tmp_path)
    assert r1export("serve", tmp_path / "nothing").returncode == 2
    assert r1export("serve", tmp_path, "--port", 70000).returncode == 2


def test_a_damaged_store_is_refused_before_it_is_served(store: Path) -> None:
    weights = store / "base" / "visual.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckFailed, match=r"visual\.safetensors is damaged"):
        open_source(store)


def test_without_its_runtime_the_page_says_how_to_get_it(lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(web, "VENDORED", tmp_path)
    with pytest.raises(Unsupported):
        web.page_files()
    done = r1export("serve", lab.release(1), "--port", 0)
    assert done.returncode == 3
    assert "python scripts/vendor_web.py" in done.stderr


def test_a_port_that_is_taken_is_named(lab, serve) -> None:
    port = urlsplit(serve(lab.release(1))).port
    with pytest.raises(Unsupported, match=f"port {port} .*--port"):
        web.Server(open_source(lab.release(1)), port)


def test_a_store_serves_the_bytes_of_the_lab_before_and_after_an_update_and_a_rollback(
    lab, store: Path, serve, apply
) -> None:
    url, seen = serve(store), []
    for number, step in ((0, None), (1, apply), (0, lambda store: install.rollback(store, run=in_this_process))):
        if step:
            step(store)
        release = Release.read(lab.release(number))
        assert current(url) == release.manifest_sha256
        seen.append(release)
        for version in seen:  # a page that is loading one is not cut off by the next
            for name in ("manifest.json", "visual.safetensors", "classes/digits.safetensors"):
                answer = ask(url, f"/release/{version.manifest_sha256}/{name}")
                assert (answer.status, answer.body) == (200, (version.path / name).read_bytes()), name


def test_a_store_that_cannot_be_read_is_said_to_be_so(store: Path, serve) -> None:
    url = serve(store)
    (store / "current").unlink()
    answer = ask(url, "/state.json")
    assert answer.status == 503
    assert "points to no version" in json.loads(answer.body)["error"]


def test_a_file_that_ends_early_ends_the_connection(lab, store: Path, serve, apply) -> None:
    url = serve(store)
    apply(store)
    weights = (store / "current").resolve() / "visual.safetensors"
    weights = weights if weights.is_file() else store / "base" / "visual.safetensors"
    weights.chmod(0o644)
    path, opened = f"/release/{current(url)}/visual.safetensors", os.open(weights, os.O_RDWR)
    os.ftruncate(opened, 1000)
    os.close(opened)
    try:
        body = ask(url, path).body
    except http.client.IncompleteRead as error:
        body = error.partial
    assert len(body) <= 1000
    assert ask(url, "/state.json").status == 200


def test_a_file_that_became_shorter_while_it_was_read_ends_the_connection(serving) -> None:
    served = Served("0" * 64, {"visual.onnx": lambda: nullcontext(Opened(10, [b"only", b" 8"]))})
    with serving(lambda: served) as url, pytest.raises(http.client.IncompleteRead):
        ask(url, f"/release/{current(url)}/visual.onnx")


def test_the_command_says_where_it_serves_and_ends_with_zero(lab, command) -> None:
    if not (Path(web.__file__).parent / "vendor" / web.VENDOR[0]).is_file():
        pytest.skip("no onnxruntime-web: python scripts/vendor_web.py, which needs npm")
    with command(lab.release(1)) as (url, process):
        assert current(url) == sha256_file(lab.release(1) / "manifest.json")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout.read() == ""
        assert url in process.stderr.read()
