"""The contact sheet shows every class, what was changed, and what to look at; it needs nothing else."""

import re

import pytest
from PIL import Image

from r1export.data.survey import ClassSurvey, Survey, Thumbnail
from r1export.report.contact_sheet import class_table, write_contact_sheet

PICTURE = Thumbnail(Image.new("RGB", (9, 5)), "cat/<b>.png", ("rotated by EXIF orientation",))
CAT = ClassSurvey(
    "cat", 2, 1, ((9, 5), (30, 20)), {"RGB": 2}, {"rotated by EXIF orientation": 1}, ("cat/2.png: broken",), (PICTURE,)
)
SURVEY = Survey(
    "pets", (CAT, ClassSurvey("dog", 0, 1, None, {}, {}, (), ())), (("a.png", "b.png"),), ("left out: x.heic",)
)


def test_the_table_has_a_row_for_every_class() -> None:
    assert [list(row) for row in class_table(SURVEY).rows] == [
        ["cat", "2", "1", "9x5 to 30x20", "RGB 2", "1 rotated by EXIF orientation", "1"],
        ["dog", "0", "1", "-", "-", "-", "0"],
    ]


@pytest.fixture
def page(tmp_path) -> str:
    write_contact_sheet(SURVEY, tmp_path / "sheet.html")
    return (tmp_path / "sheet.html").read_text(encoding="utf-8")


def test_pictures_are_inside_the_page_with_what_was_changed(page) -> None:
    assert re.findall(r'src="([^"]{20})', page) == ["data:image/webp;base"]
    assert "cat/&lt;b&gt;.png" in page
    assert "<figcaption>rotated by EXIF orientation</figcaption>" in page
    assert not re.search(r"https?://|<script", page)


def test_what_needs_a_look_is_listed(page) -> None:
    for line in ("cat/2.png: broken", "identical in train and test: a.png and b.png", "left out: x.heic"):
        assert line in page
