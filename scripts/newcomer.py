"""Follow README and the tutorial word for word in a fresh clone with a fresh environment, and write what happened.

    python scripts/newcomer.py --write                    # clones into a temporary folder, installs, runs; docs/transcript.md
    python scripts/newcomer.py --clone FOLDER             # in a clone that is there, whatever is installed in it
    python scripts/newcomer.py --skip ./scripts/test      # leave a command out; the transcript says so

Runs every command of every `sh` block in one bash session per page. A server (`r1export serve`) is stopped with Ctrl-C after its
page was fetched. Exit code 1 if any command fails.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tutorial.md")
TRANSCRIPT = ROOT / "docs/transcript.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.S | re.M)
END = "\x1e"  # ends the output of a command; no program prints it
PATIENCE = 180  # seconds until the page of a server has to be there
SHOWN = 40  # lines of output in the transcript, at most


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code (None: left out), seconds, stdout and stderr as one text."""

    command: str
    code: int | None
    seconds: float = 0.0
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.code not in (0, None)


def commands(page: str) -> list[str]:
    """The commands of a page in Markdown, in order."""
    return [command for block in BLOCK.findall(page) for command in split_commands(block)]


def split_commands(script: str) -> list[str]:
    """The commands of a shell script: lines, but a here-document and a line that ends with a backslash go on.

    >>> split_commands("cat > f <<'EOF'\\na\\nEOF\\nls \\\\\\n  f\\n")
    ["cat > f <<'EOF'\\na\\nEOF", 'ls \\\\\\n  f']
    """
    found: list[str] = []
    until = ""
    for line in script.splitlines():
        goes_on = bool(until) or (bool(found) and found[-1].endswith("\\"))
        if not goes_on and (not line.strip() or line.startswith("#")):
            continue
        if goes_on:
            found[-1] += f"\n{line}"
            until = "" if line == until else until
        else:
            found.append(line)
            until = heredoc[1] if (heredoc := re.search(r"<<'?(\w+)'?", line)) else ""
    return found


class Shell:
    """One bash session in a folder, as a newcomer has it: no environment is active."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        clean = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "VIRTUAL_ENV") and not k.startswith("R1EXPORT_")
        }
        self.process = subprocess.Popen(
            ["bash", "--norc"],
            cwd=folder,
            env=clean,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_hear_interrupts,
        )

    def run(self, command: str) -> Outcome:
        start = time.monotonic()
        code, output = self._serve(command) if command.startswith("r1export serve") else self._send(command)
        return Outcome(command, code, time.monotonic() - start, output)

    def _send(self, text: str) -> tuple[int, str]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{text}\nprintf '{END}%d\\n' $?\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            before, end, code = line.partition(END)
            lines.append(before)
            if end:
                return int(code), "".join(lines)
        return self.process.wait(), "".join(lines)  # the shell ended: `exit` or `set -e`

    def _serve(self, text: str) -> tuple[int, str]:
        """Start a server, fetch its page, stop it as Ctrl-C does: 0 if the page came and the server ended well."""
        port = re.search(r"--port (\d+)", text)
        with TemporaryDirectory() as folder:
            process_id = Path(folder) / "pid"
            pages: list[int] = []

            def visit() -> None:
                pages.append(_fetch(f"http://127.0.0.1:{port[1] if port else 8000}/"))
                os.kill(int(process_id.read_text()), signal.SIGINT)

            visitor = Thread(target=visit)
            visitor.start()
            code, output = self._send(f"sh -c 'echo $$ > {process_id}; exec {text}'")
            visitor.join()
        return code or int(pages[0] == 0), f"{output}(stopped with Ctrl-C; the page has {pages[0]} bytes)\n"

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def _hear_interrupts() -> None:
    """Ctrl-C ends what the shell runs, also where this script is a background job, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _fetch(url: str) -> int:
    """Bytes of a page, once there is one; 0 if it never comes."""
    for _ in range(PATIENCE):
        try:
            with urlopen(url, timeout=5) as response:
                return len(response.read())
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    return 0


def follow(folder: Path, page: str, skip: Sequence[str]) -> Iterator[Outcome]:
    """Run the commands of a page; ends after one that fails, as a newcomer would."""
    shell = Shell(folder)
    try:
        for command in commands((folder / page).read_text(encoding="utf-8")):
            left_out = command.startswith(tuple(skip))
            outcome = Outcome(command, None) if left_out else shell.run(command)
            print(f"{page}: {title(outcome)}", file=sys.stderr, flush=True)
            yield outcome
            if outcome.failed:
                print(outcome.output, file=sys.stderr)
                return
    finally:
        shell.close()


def title(outcome: Outcome) -> str:
    """One line: the command, how it ended, how long it took."""
    ended = "left out" if outcome.code is None else f"exit code {outcome.code}, {outcome.seconds:.0f} s"
    return f"{_first_line(outcome)}: {ended}"


def transcript(pages: dict[str, list[Outcome]], where: str) -> str:
    """docs/transcript.md: a table of times, then every command with its output. `where` says what they ran in."""
    ran = [outcome for outcomes in pages.values() for outcome in outcomes if outcome.code is not None]
    minutes = sum(outcome.seconds for outcome in ran) / 60
    left_out = sum(map(len, pages.values())) - len(ran)
    parts = [
        "# Transcript",
        f"Written by `scripts/newcomer.py`, which follows README and the [tutorial](tutorial.md) word for word, in {where}.\n"
        f"{date.today()}, {os.cpu_count()} CPU cores, load average {os.getloadavg()[2]:.0f} (15 minutes): {len(ran)} commands, "
        f"{sum(o.failed for o in ran)} failed, {left_out} left out, {minutes:.0f} minutes.",
    ]
    for page, outcomes in pages.items():
        parts.append(f"## {'README' if page == 'README.md' else 'Tutorial'}")
        rows = [
            f"| `{_first_line(o)}` | {'left out' if o.code is None else o.code} | {o.seconds:.1f} |" for o in outcomes
        ]
        parts.append("\n".join(["| command | exit code | seconds |", "|---|---|---|", *rows]))
        parts += [f"```text\n$ {o.command}\n{_shortened(o.output)}```" for o in outcomes if o.code is not None]
    return "\n\n".join(parts) + "\n"


def _first_line(outcome: Outcome) -> str:
    return re.sub(r"\s+#.*", "", outcome.command.splitlines()[0])


def _shortened(output: str) -> str:
    lines = [line.rstrip() for line in output.splitlines()]
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN // 4], f"... {len(lines) - SHOWN} lines ...", *lines[-SHOWN * 3 // 4 :]]
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def fresh_clone() -> Iterator[Path]:
    """A clone of the committed state in a temporary folder."""
    with TemporaryDirectory(prefix="newcomer-") as folder:
        clone = Path(folder) / "r1export"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        yield clone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clone", type=Path, help="a clone to run in, instead of a fresh one")
    parser.add_argument("--page", choices=PAGES, action="append", help="this page only; repeatable")
    parser.add_argument(
        "--skip", action="append", default=[], help="leave out commands that begin with this; repeatable"
    )
    parser.add_argument("--write", action="store_true", help=f"write {TRANSCRIPT.relative_to(ROOT)} after each command")
    options = parser.parse_args()
    where = (
        "a fresh clone with a fresh environment"
        if options.clone is None
        else "a clone with an environment that was there"
    )
    pages: dict[str, list[Outcome]] = {}
    with fresh_clone() if options.clone is None else nullcontext(options.clone.resolve()) as clone:
        for page in options.page or PAGES:
            for outcome in follow(clone, page, options.skip):
                pages.setdefault(page, []).append(outcome)
                if options.write:
                    TRANSCRIPT.write_text(transcript(pages, where).replace(str(clone), "~/r1export"), encoding="utf-8")
    sys.exit(any(outcome.failed for outcomes in pages.values() for outcome in outcomes))


if __name__ == "__main__":
    main()
