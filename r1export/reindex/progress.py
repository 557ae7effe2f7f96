"""Progress on disk: after `kill -9` the job resumes where it was, and gives bit-identical vectors.

.OUT.progress/vectors.f32    rows of float32, NaN for an image without a vector
             skipped.jsonl  one [row, reason] per line
             progress.json  number of completed rows, and the job
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from r1export.errors import InputError
from r1export.update.atomic_io import make_folder, read_regular, remove, write_json
from r1export.update.names import DIGEST
from r1export.update.strict_json import parse_json

RECORD_SECONDS = 2.0  # interval of syncs
MAX_BYTES = 1 << 16


@dataclass
class Progress:
    """The rows of one job, appended batch by batch; `rows` counts those that are safe or will be with the next record."""

    folder: Path
    job: str
    dimension: int
    rows: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    recorded: float = 0.0

    @classmethod
    def open(cls, out: Path, job: str, dimension: int) -> Progress:
        """Open the progress of `job` for the file `out`; that of another job is removed. Raises OSError."""
        progress = cls(out.with_name(f".{out.name}.progress"), job, dimension)
        rows = progress._recorded_rows()
        if not rows:
            remove(progress.folder)
        make_folder(progress.folder)
        progress._cut(rows)
        return progress

    def append(self, values: np.ndarray, skipped: dict[int, str]) -> None:
        """Add rows (k, D); `skipped` are those of them, by their number in the whole job, that are NaN."""
        with (self.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([row, reason]) + "\n" for row, reason in skipped.items())
        with (self.folder / "vectors.f32").open("ab") as file:
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
        self.skipped |= skipped
        self.rows += len(values)
        if time.monotonic() - self.recorded > RECORD_SECONDS:
            self.record()

    def record(self) -> None:
        """Sync all rows, then record their number."""
        for name in ("skipped.jsonl", "vectors.f32"):
            with (self.folder / name).open("ab") as file:
                os.fsync(file.fileno())
        write_json(self.folder / "progress.json", {"job": self.job, "rows": self.rows})
        self.recorded = time.monotonic()

    def values(self) -> np.ndarray:
        """All rows (n, D), mapped from the file."""
        if not self.rows:
            return np.zeros((0, self.dimension), np.float32)
        path = self.folder / "vectors.f32"
        return np.memmap(path, "<f4", "r", shape=(self.rows, self.dimension))

    def remove(self) -> None:
        remove(self.folder)

    def _recorded_rows(self) -> int:
        """The number of synced rows of this job; 0 if there is no progress, or that of another job."""
        path = self.folder / "progress.json"
        try:
            fields = parse_json(read_regular(path, MAX_BYTES), str(path), MAX_BYTES)
            return fields.integer("rows") if fields.text("job", DIGEST) == self.job else 0
        except (InputError, OSError):
            return 0

    def _cut(self, rows: int) -> None:
        """Truncate what was appended after the last record."""
        with (self.folder / "vectors.f32").open("ab") as file:
            safe = min(rows, file.tell() // (4 * self.dimension))
            file.truncate(safe * 4 * self.dimension)
        self.rows = safe
        lines = self.folder / "skipped.jsonl"
        if lines.is_file():
            found = [json.loads(line) for line in lines.read_text("utf-8").splitlines() if line.endswith("]")]
            self.skipped = {row: reason for row, reason in found if row < safe}
            lines.write_text("".join(json.dumps([*pair]) + "\n" for pair in self.skipped.items()), "utf-8")
