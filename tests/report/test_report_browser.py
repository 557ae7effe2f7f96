"""The page as a browser shows it: nothing overflows, every picture is seen, the console stays empty."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import pytest
from report.examples import release, run

from r1export.report.write import render_html
from r1export.verify.results import Flip, Verdict

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=4000",
]  # fmt: skip

# The page sits in a frame, because a browser window cannot be made as narrow as a phone.
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe style="border:0" width="{width}" height="900" srcdoc="{page}"></iframe><pre></pre>
<script>
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, root = page.documentElement;
  const word = page.querySelector(".word").getBoundingClientRect();
  const top = page.elementFromPoint(word.x + word.width / 2, word.y + word.height / 2);
  page.querySelectorAll("details").forEach(part => part.open = true);
  const box = part => {{ const r = part.getBoundingClientRect(); return [r.width, r.height]; }};
  const lost = [...page.querySelectorAll("body *")].filter(part => !part.closest(".scroll") && !part.closest("thead")
    && part.getBoundingClientRect().right > root.clientWidth + 1).map(part => part.tagName + "." + part.className);
  document.querySelector("pre").textContent = JSON.stringify({{
    width: root.clientWidth, content: root.scrollWidth, pictures: [...page.querySelectorAll("svg")].map(box), lost: lost,
    verdict: top.closest(".word").innerText, bottom: word.bottom, texts: [...page.querySelectorAll("svg text")].map(t => box(t)[0]),
  }});
}};
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def measured(page: str, width: int, folder: Path) -> dict:
    """What the browser measures of a page of this width, in CSS pixels; an entry on the console fails."""
    path = folder / "frame.html"
    path.write_text(FRAME.format(width=width, page=escape(page)), "utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000",
        "--dump-dom",
        path.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r"<pre>(\{.*?\})</pre>", result.stdout, re.S)
    assert found, f"the browser wrote no measurement (exit {result.returncode}): {result.stderr[-500:]}"
    return json.loads(unescape(found[1]))


def pages() -> dict[str, str]:
    stages = release().parity
    detail = (
        f"the visual tower differs by 3.4e-4, allowed 5.0e-5 at /visual/{'block/' * 20}out_proj. Run `r1export verify`."
    )
    flips = (Flip(sample=3, margin=0.02, before=1, after=2),)
    failed = release(
        parity=replace(stages, total=replace(stages.total, verdict=Verdict.FAIL, detail=detail, flips=flips))
    )
    whole = run(release(), failed, recipe={"note": "x" * 200})
    return {"passed": render_html(release()), "failed": render_html(failed), "run": render_html(whole)}


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize(
    ("name", "verdict", "pictures"), [("passed", "Passed", 5), ("failed", "Failed", 5), ("run", "Failed", 8)]
)
def test_the_page_is_readable_at_this_width(name: str, verdict: str, pictures: int, width: int, tmp_path: Path) -> None:
    seen = measured(pages()[name], width, tmp_path)
    assert seen["width"] == width
    assert seen["content"] <= width, f"the page scrolls sideways because of {seen['lost']}"
    assert seen["lost"] == []
    assert verdict in seen["verdict"]
    assert seen["bottom"] < 400  # the verdict is seen without scrolling
    assert len(seen["pictures"]) == pictures
    assert all(wide >= 300 and high >= 40 for wide, high in seen["pictures"])
    assert all(text > 0 for text in seen["texts"])


def test_the_page_prints_with_every_release_open(tmp_path: Path) -> None:
    page, pdf = tmp_path / "run.html", tmp_path / "run.pdf"
    page.write_text(pages()["run"], "utf-8")
    flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}"]
    subprocess.run([str(CHROMIUM), *flags, page.as_uri()], capture_output=True, timeout=120, check=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) >= 6
