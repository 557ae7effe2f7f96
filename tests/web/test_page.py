"""The page in a real browser, against onnxruntime's CPU provider on the same release and the same pixels."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from device.steps import in_this_process
from families import FAMILIES
from PIL import ExifTags, Image, PngImagePlugin
from running import reseal

from r1export.data.images import decode
from r1export.device import install
from r1export.export.preprocess import write_preprocess
from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors, write_tensors
from r1export.update.release_manifest import GoldenGate, ReleaseManifest, manifest_digest
from r1export.web import server as web
from r1export.web.source import Served, release_source

SETTLED = "#versions > li:first-child .badge:is(.pass, .fail)"
CLOSE = 1e-4  # of unit-norm embeddings: kernels of another build may add up in another order, which gives some 1e-7


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than high, so that it is scaled and cropped, with a gamma that browsers would apply to what they show."""
    y, x = np.mgrid[0:120, 0:161]
    disc = (x - 90) ** 2 + (y - 50) ** 2 < 1600
    pixels = np.stack([x * 255 // 161, np.where(disc, 220, y * 255 // 120), disc * 200], -1).astype(np.uint8)
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", (100_000).to_bytes(4, "big"))
    path = tmp_path_factory.mktemp("picture") / "disc.png"
    Image.fromarray(pixels).save(path, pnginfo=info)
    return path


def answer_of_onnxruntime(release: Path, picture: Path, task: str) -> tuple[np.ndarray, dict[str, float]]:
    """The embedding (D,) and the logit of each class."""

    def run(graph: str, **feeds: np.ndarray) -> np.ndarray:
        return ort.InferenceSession(release / graph, providers=["CPUExecutionProvider"]).run(None, feeds)[0]

    pixels = run("preprocess.onnx", image=np.asarray(decode(picture, str(picture)).image))
    embeds = read_tensors(release / "classes" / f"{task}.safetensors")["class_embeds"]
    logits = run("classify.onnx", pixel_values=pixels, class_embeds=embeds)[0]
    classes = json.loads((release / "classes" / f"{task}.json").read_text())["classes"]
    return run("visual.onnx", pixel_values=pixels)[0], dict(zip(classes, logits.tolist(), strict=True))


def settle(browser, url: str) -> str:
    """Open the page and wait for the verdict on the version that is served."""
    browser.do("page.goto", url)
    browser.do("page.waitForSelector", SETTLED)
    return browser.do("page.innerText", SETTLED)


def classify(browser, picture: Path) -> None:
    browser.do("page.setInputFiles", "#file", str(picture))
    browser.do("page.waitForSelector", "#answer:not([hidden])")


def lines(browser) -> list[tuple[str, str]]:
    """Verdict and name of each version that the page has tested, newest first."""
    code = '[...document.querySelectorAll("#versions > li")].map(li => [li.querySelector(".badge").innerText, li.querySelector(".name").innerText])'
    return [(verdict, name) for verdict, name in browser.do("evaluate", code)]


def saved(browser) -> dict:
    return json.loads(Path(browser.do("download", "#save")).read_text())


def test_the_golden_test_passes_and_the_release_is_shown(browser, lab, serve) -> None:
    release, manifest = lab.release(2), json.loads((lab.release(2) / "manifest.json").read_text())
    assert settle(browser, serve(release)) == "Pass"
    assert browser.do("page.innerText", "h1") == release.name
    detail = browser.do("page.innerText", "#versions .detail")
    assert "8 golden samples" in detail
    assert "same top-1 in 8 of 8" in detail
    assert "3 images through preprocess.onnx: difference up to " in detail
    assert "Prompts: not checked (this page has no tokenizer)." in detail
    text = browser.do("page.innerText", "#tasks") + browser.do("page.innerText", "#facts")
    for task in manifest["tasks"]:
        assert (
            f"{task['name']}\t{task['classes']}\t{'yes' if task['learned'] else 'no'}\t{100 * task['accuracy']:.1f} %"
            in text
        )
    digests = [sha256_file(release / "manifest.json"), manifest["sha256"], manifest["base"]["sha256"]]
    assert all(digest in text for digest in [*digests, *(update["sha256"] for update in manifest["updates"])])
    files = browser.do("page.textContent", "#files")
    assert all(name in files and entry["sha256"] in files for name, entry in manifest["files"].items())
    assert browser.do("evaluate", "crossOriginIsolated") is True
    assert browser.do("problems") == []


def test_a_picture_is_classified_as_by_onnxruntime(browser, lab, serve, picture: Path) -> None:
    settle(browser, serve(lab.release(2)))
    classify(browser, picture)
    for task in ("digits", "arrows"):
        browser.do("page.selectOption", "#task", task)
        found = saved(browser)
        embedding, logits = answer_of_onnxruntime(lab.release(2), picture, task)
        error = np.abs(np.array(found["embedding"]) - embedding).max()
        assert error < CLOSE
        assert (found["task"], found["picture"], found["release"]) == (task, "disc.png", lab.release(2).name)
        scores = {score["name"]: score["logit"] for score in found["scores"]}
        assert found["scores"][0]["name"] == max(logits, key=logits.get)
        assert scores == pytest.approx(logits, abs=100 * CLOSE)  # a logit is up to 100 cosines
        assert sum(score["share"] for score in found["scores"]) == pytest.approx(1)
        best = browser.do("page.innerText", "#bars li:first-child")
        assert best.split("\n") == [found["scores"][0]["name"], f"{100 * found['scores'][0]['share']:.1f} %"]
    assert "161 × 120 pixels: decoded in" in browser.do("page.innerText", "#times")
    assert browser.do("problems") == []


@pytest.mark.parametrize("kind", ["turned by EXIF", "transparent", "a palette with a transparent entry"])
def test_a_picture_is_decoded_as_for_training(browser, lab, serve, picture: Path, tmp_path: Path, kind: str) -> None:
    image, exif, path = Image.open(picture), Image.Exif(), tmp_path / "odd.png"
    if kind == "turned by EXIF":
        exif[ExifTags.Base.Orientation] = 8
        image.save(path, exif=exif)
    elif kind == "transparent":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    else:
        image.quantize(8).save(path, transparency=2)
    settle(browser, serve(lab.release(2)))
    classify(browser, path)
    embedding, _ = answer_of_onnxruntime(lab.release(2), path, "digits")
    error = np.abs(np.array(saved(browser)["embedding"]) - embedding).max()
    plain, _ = answer_of_onnxruntime(lab.release(2), picture, "digits")
    assert error < 0.01 < np.abs(plain - embedding).max()  # levels differ by one where browsers premultiply


@pytest.mark.parametrize("family", FAMILIES)
def test_a_release_of_another_family_answers_as_onnxruntime_does(
    family: str, browser, family_run, serve, picture
) -> None:
    release = family_run(family) / "releases" / "01-digits"
    assert settle(browser, serve(release)) == "Pass"
    classify(browser, picture)
    found, (embedding, logits) = saved(browser), answer_of_onnxruntime(release, picture, "digits")
    assert np.abs(np.array(found["embedding"]) - embedding).max() < CLOSE
    assert {score["name"]: score["logit"] for score in found["scores"]} == pytest.approx(logits, abs=100 * CLOSE)


@pytest.mark.parametrize("file", ["visual.safetensors", "manifest.json"])
def test_a_file_that_was_tampered_with_is_refused_by_digest(browser, release: Path, serve, file: str) -> None:
    url = serve(release)
    if file == "manifest.json":
        replace(ReleaseManifest.read(release), golden=GoldenGate(9, -1)).sealed().write(release)
    else:
        data = bytearray((release / file).read_bytes())
        data[-3] ^= 1
        (release / file).write_bytes(data)
    assert settle(browser, url) == "Refused"
    detail = browser.do("page.innerText", "#versions .detail")
    assert f"{file} is not the released file: SHA-256 {sha256_file(release / file)}" in detail
    assert browser.do("page.isDisabled", "#file")
    assert browser.do("problems") == []


def test_a_manifest_whose_digest_of_itself_does_not_hold_is_refused(browser, release: Path, serving) -> None:
    """Even where the server would vouch for it."""
    path = release / "manifest.json"
    served = release_source(release)()
    path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": 1.'))
    with serving(lambda: Served(sha256_file(path), served.files)) as url:
        assert settle(browser, url) == "Refused"
    assert "(from its self-digest)" in browser.do("page.innerText", "#versions .detail")


def test_the_digest_of_itself_is_python_s_whatever_stands_in_the_manifest(browser, lab, serve) -> None:
    odd = {
        "b": [5e-05, 1e22, 1.0, -0.5, 0, 123456789012, True, None, []],
        "a": {'ü\u2028"\\\n\x01\x7f': '5e-05, "1": é', "": {}},
        "sha256": "x",
    }
    text = json.dumps(odd, indent=2, ensure_ascii=False)
    browser.do("page.goto", serve(lab.release(1)))
    code = """async (text) => { const { sealedContent } = await import("/release.js");
      const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(sealedContent(text)));
      return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join(""); }"""
    assert browser.do("evaluate", code, text) == manifest_digest(odd)


def test_a_release_that_answers_otherwise_than_its_golden_samples_fails(browser, release: Path, serve) -> None:
    golden = read_tensors(release / "golden.safetensors")
    golden["image_embeds"][5, 7] += 2e-4
    write_tensors(release / "golden.safetensors", golden)
    reseal(release)
    assert settle(browser, serve(release)) == "Fail"
    assert "max. difference 2.0e\u20114" in browser.do("page.innerText", "#versions .detail")
    assert browser.do("page.isDisabled", "#file")


def change_golden(release: Path, **tensors: np.ndarray | None) -> None:
    """Replace golden tensors, or take them away."""
    golden = read_tensors(release / "golden.safetensors") | tensors
    write_tensors(release / "golden.safetensors", {name: value for name, value in golden.items() if value is not None})
    reseal(release)


def write_other_preprocess(release: Path, **changes: object) -> None:
    config = json.loads((release / "preprocess.json").read_text())
    write_preprocess(config | changes, release / "preprocess.onnx", opset=19)
    reseal(release)


def change_pixels(release: Path, pixels: np.ndarray, **tensors: np.ndarray) -> None:
    """Other pixel_values, with the answers that they give."""
    visual = ort.InferenceSession(release / "visual.onnx", providers=["CPUExecutionProvider"])
    change_golden(release, pixel_values=pixels, image_embeds=visual.run(None, {"pixel_values": pixels})[0], **tensors)


def plant(release: Path, fault: str) -> None:
    golden = read_tensors(release / "golden.safetensors")
    config, pixels = json.loads((release / "preprocess.json").read_text()), golden["pixel_values"].copy()
    byte = np.float32(config["scale"] / min(config["std"]))
    match fault:
        case "another picture":
            change_golden(release, picture_1=255 - golden["picture_1"])
        case "one byte far off":
            pixels[1, 0, 3, 3] += 3 * byte
            change_pixels(release, pixels)
        case "all bytes a little off":
            change_pixels(release, pixels + 0.4 * byte)
        case "mean":
            write_other_preprocess(release, mean=[0.0, 0.5, 0.5])
        case "filter":
            write_other_preprocess(release, interpolation="bilinear")
        case "size":  # of a grey picture every size has the same pixels
            grey = np.full((9, 9, 3), 128, np.uint8)
            values = (128 * config["scale"] - np.array(config["mean"])) / np.array(config["std"])
            pixels[:3] = values.astype(np.float32)[None, :, None, None]
            change_pixels(release, pixels, picture_0=grey, picture_1=grey, picture_2=grey)
            write_other_preprocess(release, size=[16, 16])


@pytest.mark.parametrize(
    "fault", ["another picture", "one byte far off", "all bytes a little off", "mean", "filter", "size"]
)
def test_a_release_that_prepares_pictures_otherwise_than_the_lab_fails(browser, release: Path, serve, fault) -> None:
    plant(release, fault)
    assert settle(browser, serve(release)) == "Fail"
    detail = browser.do("page.innerText", "#versions .detail")
    assert "same top-1 in 8 of 8" in detail  # the tower itself is sound
    assert "3 images through preprocess.onnx: difference up to " in detail
    assert browser.do("page.isDisabled", "#file")
    assert browser.do("problems") == []


def test_a_release_without_golden_pictures_says_that_none_were_tried(browser, release: Path, serve) -> None:
    change_golden(release, picture_0=None, picture_1=None, picture_2=None, prompts=None)
    assert settle(browser, serve(release)) == "Pass"
    assert "Images: not checked (the release has none" in browser.do("page.innerText", "#versions .detail")


@pytest.mark.parametrize("store", ["slot"], indirect=True)
def test_an_update_is_picked_up_without_a_restart(browser, lab, store: Path, serve, apply, picture: Path) -> None:
    assert settle(browser, serve(store)) == "Pass"
    classify(browser, picture)
    apply(store)
    browser.do("page.waitForSelector", "#versions > li:nth-child(2)")
    browser.do("page.waitForSelector", SETTLED)
    (new, new_name), (old, old_name) = lines(browser)
    assert (new, old) == ("Pass", "Pass")
    assert new_name == f"{lab.release(1).name}current"
    assert old_name.startswith(f"{lab.release(0).name}until ")
    assert browser.do("page.innerText", "h1") == lab.release(1).name
    browser.do("page.waitForSelector", "#before:not(:empty)")  # the picture is classified again, by the new version
    found, (embedding, _) = saved(browser), answer_of_onnxruntime(lab.release(1), picture, "digits")
    assert found["manifest_sha256"] == sha256_file(lab.release(1) / "manifest.json")
    assert np.abs(np.array(found["embedding"]) - embedding).max() < CLOSE
    install.rollback(store, run=in_this_process)
    browser.do("page.waitForSelector", "#versions > li:nth-child(3)")
    browser.do("page.waitForSelector", SETTLED)
    assert lines(browser)[0] == ("Pass", f"{lab.release(0).name}current")
    assert browser.do("problems") == []


@pytest.mark.parametrize("store", ["overlay"], indirect=True)
def test_a_version_that_is_refused_takes_no_pictures_from_the_one_before(
    browser, lab, store: Path, serve, apply, picture: Path
) -> None:
    settle(browser, serve(store))
    classify(browser, picture)
    apply(store)
    weights = store / "base" / "visual.safetensors"  # from which this device derives the others
    weights.chmod(0o644)
    with open(weights, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(bytes(3))
    browser.do("page.waitForSelector", "#versions > li:nth-child(2)")
    browser.do("page.waitForSelector", SETTLED)
    assert [verdict for verdict, _ in lines(browser)] == ["Refused", "Pass"]
    assert browser.do("page.isDisabled", "#file")
    assert browser.do("page.isHidden", "#answer")


@pytest.mark.parametrize("store", ["overlay"], indirect=True)
def test_a_store_that_cannot_be_read_is_said_to_be_so_until_it_can(browser, store: Path, serve) -> None:
    settle(browser, serve(store))
    (store / "current").rename(store / "away")
    browser.do("page.waitForSelector", "#notice:not([hidden])")
    assert "points to no version" in browser.do("page.innerText", "#notice")
    (store / "away").rename(store / "current")
    browser.do("page.waitForSelector", "#notice", {"state": "hidden"})
    assert len(lines(browser)) == 1


def test_what_is_no_picture_is_said_to_be_none(browser, lab, serve, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    settle(browser, serve(lab.release(1)))
    browser.do("page.setInputFiles", "#file", str(tmp_path / "notes.png"))
    browser.do("until", 'document.querySelector("#hint").innerText.includes("is not an image")')
    classify(browser, picture)
    assert browser.do("page.innerText", "#hint") == "disc.png"


def test_a_picture_can_be_dropped_and_pasted(browser, lab, serve, picture: Path) -> None:
    settle(browser, serve(lab.release(1)))
    code = """([event, bytes]) => { const files = new DataTransfer();
      files.items.add(new File([new Uint8Array(bytes)], `${event}.png`, { type: "image/png" }));
      const Type = event === "paste" ? ClipboardEvent : DragEvent;
      const made = new Type(event, { clipboardData: files, dataTransfer: files, bubbles: true, cancelable: true });
      document.body.dispatchEvent(made); return made.defaultPrevented; }"""
    for event in ("drop", "paste"):
        prevented = browser.do("evaluate", code, [event, list(picture.read_bytes())])
        assert prevented or event == "paste"  # else the browser would leave the page for the picture
        browser.do("until", f'document.querySelector("#hint").innerText === "{event}.png"')
        browser.do("page.waitForSelector", "#answer:not([hidden])")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser, lab, serve, picture: Path) -> None:
    settle(browser, serve(lab.release(2)))
    classify(browser, picture)
    reached = []
    for _ in range(4):
        browser.do("page.keyboard.press", "Tab")
        code = """() => { const at = document.activeElement, ring = at.id === "file" ? at.parentElement : at;
          return [at.id || at.tagName, getComputedStyle(ring).outlineStyle]; }"""
        reached.append(tuple(browser.do("evaluate", code)))
    assert reached == [(name, "solid") for name in ("file", "task", "save", "SUMMARY")]
    browser.do("page.keyboard.press", "Enter")
    assert browser.do("page.isVisible", "#files")
    browser.do("page.focus", "#task")
    browser.do("page.keyboard.press", "ArrowUp")
    browser.do("until", 'document.querySelector("#task").value === "digits"')
    lines = 2 * 8 + 1  # eight of ten, and that there are more
    browser.do("until", f'document.querySelector("#bars").innerText.split("\\n").length === {lines}')


def test_nothing_is_lost_on_a_small_screen(browser, lab, serve, picture: Path) -> None:
    settle(browser, serve(lab.release(2)))
    classify(browser, picture)
    browser.do("page.click", "summary")
    code = """() => [document.documentElement.scrollWidth, ...[...document.querySelectorAll("body *:not(.unseen)")]
      .filter((part) => part.getBoundingClientRect().right > innerWidth + 0.5).map((part) => part.tagName + "#" + part.id)]"""
    for width in (320, 360, 800, 1200):
        browser.do("page.setViewportSize", {"width": width, "height": 740})
        assert browser.do("evaluate", code) == [width]


def test_dark_where_the_reader_s_system_is_dark_and_readable_in_both(browser, lab, serve) -> None:
    browser.do("page.goto", serve(lab.release(1)))
    code = """() => ["#about", "#hint", ".badge", ".badge.pass", "dt"].map((one) => document.querySelector(one)).filter(Boolean).map((part) => {
      let ground = part; while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
      return [getComputedStyle(part).color, getComputedStyle(ground).backgroundColor]; })"""
    browser.do("page.waitForSelector", SETTLED)
    for scheme in ("light", "dark"):
        browser.do("page.emulateMedia", {"colorScheme": scheme})
        pairs = browser.do("evaluate", code)
        assert len(pairs) > 3
        for ink, paper in pairs:
            assert contrast(ink, paper) >= 4.5, (scheme, ink, paper)  # WCAG 2.2, 1.4.3
            assert (luminance(paper) < 0.2) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    channels = [int(value) / 255 for value in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(ink: str, paper: str) -> float:
    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


def test_a_page_whose_server_is_gone_says_so_and_goes_on(browser, lab, command, picture: Path) -> None:
    with command(lab.release(1)) as (url, process):
        settle(browser, url)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    browser.do("page.waitForSelector", "#notice:not([hidden])")
    assert "does not respond" in browser.do("page.innerText", "#notice")
    classify(browser, picture)


def test_the_page_is_small_beside_its_runtime() -> None:
    assert sum((web.FOLDER / name).stat().st_size for name in web.PAGE) < 40_000
