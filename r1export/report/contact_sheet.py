"""A contact sheet: the images of a task by class, the changes made by decoding, and unreadable images."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

from PIL import Image

from r1export.data.survey import ClassSurvey, Survey
from r1export.report.table import Table
from r1export.report.write import environment
from r1export.update.atomic_io import write_file


def class_table(survey: Survey) -> Table:
    """One row per class: counts, stored sizes and modes, changes made by decoding, number of unreadable images."""
    columns = ("Class", "Train", "Test", "Sizes", "Modes", "Changed", "Refused")
    return Table(columns, [_row(each) for each in survey.classes])


def _row(found: ClassSurvey) -> list[str]:
    small, large = found.sizes or ((0, 0), (0, 0))
    sizes = [f"{width}x{height}" for width, height in dict.fromkeys((small, large))] if found.sizes else ["-"]
    modes = ", ".join(f"{mode} {count}" for mode, count in found.modes.items())
    changes = ", ".join(f"{count} {change}" for change, count in found.changes.items())
    return [
        found.name, str(found.train), str(found.test), " to ".join(sizes), modes or "-", changes or "-",
        str(len(found.refused)),
    ]  # fmt: skip


def write_contact_sheet(survey: Survey, file: Path) -> None:
    """Write one self-contained HTML page with embedded thumbnails."""
    page = environment("html").get_template("contact_sheet.html.j2").render(
        survey=survey, table=class_table(survey), source=_data_url
    )  # fmt: skip
    write_file(file, page.encode())


def _data_url(image: Image.Image) -> str:
    data = BytesIO()
    image.save(data, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
