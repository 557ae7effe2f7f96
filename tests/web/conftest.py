"""A small real run, devices, and Chromium."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from device.steps import in_this_process
from running import Lab, r1export

from r1export.device import install, provision
from r1export.web import server as web
from r1export.web.source import Source, open_source

ROOT = Path(__file__).parents[2]
RECIPE = (
    '[base]\nmodel = "builtin:world"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n'
    '[[tasks]]\nname = "arrows"\nsource = "builtin:arrows"\n[data]\nshots = 4\ntest_limit = 24\n'
    "[train]\niterations = 6\nlearning_rate = 5e-3\n[pool]\nalpha = 12.0\n[verify]\nsamples = 8\nimages = 12\n"
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A run of two tasks."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "recipe.toml").write_text(RECIPE)
    for command in (("train", folder / "recipe.toml", "--out", folder / "run"), ("export", folder / "run")):
        done = r1export(*command)
        assert done.returncode == 0, done.output
    return Lab.of(folder / "run")


@pytest.fixture
def release(lab: Lab, tmp_path: Path) -> Path:
    """A copy of a release that a test may spoil."""
    return Path(shutil.copytree(lab.release(1), tmp_path / "release"))


@pytest.fixture(params=["slot", "overlay"])
def store(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Path:
    """A device at the base release, once in each mode."""
    provision.init(tmp_path / "store", lab.release(0), [lab.public], mode=request.param, health="none")
    return tmp_path / "store"


@pytest.fixture
def apply(lab: Lab) -> Callable[[Path], install.Outcome]:
    """Installs the lab's update on a device."""
    return lambda store: install.apply(store, lab.update, run=in_this_process)


@contextmanager
def _serving(source: Source) -> Iterator[str]:
    with web.Server(source, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def serving() -> Callable[[Source], AbstractContextManager[str]]:
    """A server on a free port for a source while a block runs; its URL."""
    return _serving


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Serves a release or a store until the test ends, and gives its URL."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(_serving(open_source(path)))


@contextmanager
def _command(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "r1export", "serve", *map(str, arguments), "--port", "0", "--json"]

    def hear_interrupts() -> None:  # which a shell's background jobs, and so what they start, ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        try:
            yield json.loads(process.stdout.readline())["url"], process
        finally:
            process.kill()


@pytest.fixture
def command() -> Callable[..., AbstractContextManager[tuple[str, subprocess.Popen[str]]]]:
    """`r1export serve` as a process while a block runs: its URL, and the process."""
    return _command


def missing() -> str:
    """What a browser test lacks here and how to get it; empty if nothing."""
    if not (web.VENDORED / web.VENDOR[0]).is_file() or not (ROOT / "node_modules/playwright-core").is_dir():
        return "no onnxruntime-web or no playwright-core: python scripts/vendor_web.py --test, which needs npm"
    if shutil.which("node") is None:
        return "no node: apt install nodejs, or from nodejs.org"
    return "" if CHROMIUM else "no chromium, chromium-browser or google-chrome on the PATH: apt install chromium"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Chromium through playwright-core; `do` names a method of its page, or a verb of bridge.mjs."""

    def __init__(self) -> None:
        command = ["node", Path(__file__).with_name("bridge.mjs"), str(CHROMIUM)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def do(self, name: str, *values: Any) -> Any:
        self.process.stdin.write(json.dumps({"do": name, "with": values}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the bridge to the browser ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Skips where parts are missing, unless R1EXPORT_BROWSER=required says that they must not be."""
    if lack := missing():
        assert os.environ.get("R1EXPORT_BROWSER") != "required", lack
        pytest.skip(lack)
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """A fresh page of a desktop's size."""
    chromium.do("open", {"viewport": {"width": 1200, "height": 900}})
    return chromium
