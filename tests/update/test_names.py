"""Names of files and parameters: whatever matches stays in its folder and on its line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1export.errors import InputError
from r1export.update.names import NAME, PARAMETER, PATH, PRINTABLE, TEXT, check_paths

PIECES = st.sampled_from(
    ["a", "b.c", "..", ".", "", "/", "\\", "\n", "\r", "\x00", "\u2028", "\x85", "%2e", "~", "C:", " ", "é"]
)


@given(st.from_regex(PATH, fullmatch=True) | st.lists(PIECES, max_size=12).map("".join))
def test_a_path_that_matches_lies_in_its_folder(path: str) -> None:
    if PATH.fullmatch(path):
        assert (Path("/store/base") / path).resolve().is_relative_to("/store/base")
        assert not any(part.startswith(".") for part in path.split("/"))
        assert path.isascii()
        assert path.isprintable()
        assert len(path) <= 200


@pytest.mark.parametrize("pattern", [NAME, TEXT, PARAMETER, PATH, PRINTABLE])
@pytest.mark.parametrize("tail", ["\n", "\r\n", "\x00", "\u2028", "\x85", "\x1b[31m", "\u202e", "\ud800"])
def test_no_name_ends_in_a_control_character(pattern, tail: str) -> None:
    assert pattern.fullmatch("a")
    assert not pattern.fullmatch(f"a{tail}")
    assert not pattern.fullmatch(f"a{tail}b")


@pytest.mark.parametrize(
    "paths",
    [["a", "A"], ["a", "a/b"], ["A/b", "a"], ["con"], ["x/NUL.txt"], ["a."], ["a./b"], ["update.r1u"], ["a", "a"]],
)
def test_names_that_cannot_stand_side_by_side_everywhere_are_refused(paths: list[str]) -> None:
    with pytest.raises(InputError, match=r"the list: "):
        check_paths(paths, "the list")


def test_ordinary_names_are_fine() -> None:
    check_paths(["visual.onnx", "classes/a.json", "classes/a.safetensors", "console/nullable.txt"], "the list")
