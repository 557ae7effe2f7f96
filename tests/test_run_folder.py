"""What a run says of itself is read strictly: a figure that is missing or impossible is named, with what to do."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1export.errors import InputError
from r1export.run_folder import RunFolder, RunMetrics, RunRecord, read_json, read_value
from r1export.update.atomic_io import json_bytes, write_json
from r1export.update.release_manifest import BaseModel
from r1export.verify.results import Probe

METRICS = RunMetrics(
    tasks=("digits", "arrows"),
    zero_shot=(0.25, 0.5),
    accuracy=((0.75, 0.5), (0.5, 1.0)),
    zero_shot_avg=0.375,
    transfer=0.5,
    avg=0.6875,
    last=0.75,
    forgetting=(0.25, 0.0),
    probe=Probe(name="photos", values=(0.5, 0.5, 0.25)),
)
RECORD = RunRecord("0.1.0", 7, BaseModel("tiny", "0" * 64, None), {"torch": "2.9"}, "2026-01-01T00:00:00+00:00")
FOLDED = replace(RECORD, base=BaseModel("tiny", "0" * 64, None, 1, "1" * 64, 2e-7))


@pytest.mark.parametrize("value", [METRICS, RECORD, FOLDED])
def test_what_was_written_is_read(value, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", value.to_json())
    assert read_value(type(value), tmp_path / "x.json", "") == value


def test_accuracies_after_a_task_are_by_name_and_zero_shot_is_the_start() -> None:
    assert METRICS.after(0) == {"digits": 0.25, "arrows": 0.5}
    assert METRICS.after(2) == {"digits": 0.5, "arrows": 1.0}


@pytest.mark.parametrize("member", METRICS.to_json())
@pytest.mark.parametrize("value", [True, "0.5", 1.5, -1, {}, [[0.5, "x"]], ["a", 1]])
def test_a_member_that_cannot_be_is_named(member: str, value: object, tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", METRICS.to_json() | {member: value})
    with pytest.raises(InputError, match=rf"metrics\.json: corrupted: .*{member}") as caught:
        RunFolder(tmp_path).metrics()
    assert "train the run first" in caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [{"tasks": []}, {"accuracy": [[0.5, 0.5]]}, {"accuracy": [[0.5], [0.5]]}, {"zero_shot": [0.5]}, {"forgetting": []},
     {"probe": {"name": "photos", "values": [0.5]}}],
)  # fmt: skip
def test_accuracies_of_another_number_of_tasks_are_refused(change: dict, tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", METRICS.to_json() | change)
    with pytest.raises(InputError, match="accuracies"):
        RunFolder(tmp_path).metrics()


def test_missing_and_unknown_members_are_named(tmp_path: Path) -> None:
    document = METRICS.to_json()
    del document["avg"], document["last"]
    write_json(tmp_path / "metrics.json", document)
    with pytest.raises(InputError, match="missing keys: avg, last"):
        RunFolder(tmp_path).metrics()
    write_json(tmp_path / "metrics.json", METRICS.to_json() | {"more": 1})
    with pytest.raises(InputError, match="corrupted: more"):
        RunFolder(tmp_path).metrics()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff", b'{"a": "\\ud800"}', b"[" * 100_000]
)
def test_a_file_without_a_json_object_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.json: corrupted: ") as caught:
        read_json(tmp_path / "x.json", "write it again")
    assert caught.value.remedy == "write it again"
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "gone.json", "write it again")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path / "folder.json", "write it again")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@given(st.sampled_from(sorted(METRICS.to_json())), JSON)
def test_any_value_in_any_place_is_read_as_it_is_or_refused_as_bad_input(member: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.json"
        path.write_text(json.dumps(METRICS.to_json() | {member: value}), encoding="utf-8")
        try:
            metrics = RunFolder(Path(folder)).metrics()
        except InputError:
            return
        assert read_value(RunMetrics, path, "") == metrics
        assert json.loads(json_bytes(metrics.to_json())) == json.loads(path.read_text(encoding="utf-8"))
