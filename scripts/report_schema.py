"""Write r1export/report/report.schema.json from the types of a report. Run it after a change of r1export/verify/results/."""

from __future__ import annotations

import json
from pathlib import Path

from r1export.report.json_format import json_schema

SCHEMA = Path(__file__).parents[1] / "r1export" / "report" / "report.schema.json"

if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    print(f"{SCHEMA}: {SCHEMA.stat().st_size} bytes")
