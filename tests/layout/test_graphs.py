"""The head of a layout's textual graph: texts of any length, ids of either kind, and the token that ends a text."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from r1export.layout.graphs import accept_texts_, read_graph
from r1export.layout.settings import Texts
from r1export.update.golden_samples import GoldenSamples
from r1export.verify.golden import read_golden


@pytest.fixture(scope="module")
def release(lab):
    return lab.release(1)


@pytest.fixture(scope="module")
def golden(release) -> GoldenSamples:
    return read_golden(release)


@pytest.fixture(scope="module")
def texts(release) -> Texts:
    return Texts.read(release, read_graph(release / "textual.onnx"))


def session_of(release, texts, **options):
    """The graph with its head, in onnxruntime, with the release's weights."""
    model = accept_texts_(read_graph(release / "textual.onnx"), texts, **options)
    path = release / ".head.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()
    return lambda ids: session.run(None, {"input_ids": ids})[0]


def unpadded(row: np.ndarray) -> np.ndarray:
    """CLIP's ids up to the token that ends the text, which is the highest."""
    return row[: row.argmax() + 1][None]


def test_a_text_without_padding_gives_the_embedding_of_the_padded_one(release, golden, texts) -> None:
    run = session_of(release, texts)
    lengths = {unpadded(row).shape[1] for row in golden.input_ids}
    assert len(lengths) > 1
    for row, expected in zip(golden.input_ids, golden.text_embeds, strict=True):
        np.testing.assert_allclose(run(unpadded(row))[0], expected, atol=1e-6)


def test_the_embedding_is_bit_for_bit_that_of_the_release_s_graph(release, golden, texts) -> None:
    session = ort.InferenceSession(release / "textual.onnx", providers=["CPUExecutionProvider"])
    plain = session.run(None, {"input_ids": golden.input_ids})[0]
    assert np.array_equal(session_of(release, texts)(golden.input_ids), plain)


def test_ids_of_32_bits_are_taken_where_a_client_gives_them(release, golden, texts) -> None:
    found = session_of(release, texts, int32=True)(golden.input_ids.astype(np.int32))
    np.testing.assert_allclose(found, golden.text_embeds, atol=1e-6)


def test_a_text_that_is_too_long_fails_and_is_not_cut(release, golden, texts) -> None:
    longer = np.concatenate([golden.input_ids, golden.input_ids[:, -1:]], 1)
    with pytest.raises(Exception, match=r"Add|broadcast|dimension"):
        session_of(release, texts)(longer)


def test_a_text_that_a_client_cut_gets_its_end_back(release, golden, texts) -> None:
    full = next(row for row in golden.input_ids if row[-1] == texts.end_id)
    cut = full.copy()
    cut[-1] = 320  # "a": what stood there before the end was put in its place
    run = session_of(release, texts, end=True)
    assert not np.allclose(session_of(release, texts)(cut[None]), run(cut[None]), atol=1e-3)
    assert np.array_equal(run(cut[None]), run(full[None]))


def test_texts_that_end_by_themselves_stay_as_they_are(release, golden, texts) -> None:
    assert np.array_equal(
        session_of(release, texts, end=True)(golden.input_ids), session_of(release, texts)(golden.input_ids)
    )


@pytest.mark.parametrize("family", ["SigLIP2", "CLIPA", "roberta"])
def test_towers_of_other_families_take_texts_of_any_length(family_run, family) -> None:
    release = next((family_run(family) / "releases").glob("01-*"))
    golden, texts = read_golden(release), Texts.read(release, read_graph(release / "textual.onnx"))
    run = session_of(release, texts)
    for row, expected in zip(golden.input_ids, golden.text_embeds, strict=True):
        kept = np.flatnonzero(row != texts.pad_id)
        short = row[kept[0] :] if texts.left else row[: kept[-1] + 1]
        np.testing.assert_allclose(run(short[None])[0], expected, atol=1e-5)
