"""The faults that are tried, and how each ended: benchmarks/faults.json, and the table in docs/reliability.md.

PFT_TEST_HOST=HOST python benchmarks/faults.py

It runs tests/test_faults.py, each test of which is a fault; HOST is what tests/host/make_host.py made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "reliability.md"
HEADINGS = ("where", "fault", "end")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = [sys.executable, "-m", "pytest", "-q", "tests/test_faults.py", f"--junitxml={report}"]
        subprocess.run(tests, cwd=HERE.parent, check=False)
        rows = rows_of(ElementTree.parse(report))
    tried = [row for row in rows if row["result"] != "not tried"]
    survived = sum(row["result"] == "survived" for row in tried)
    result = {"tried": len(tried), "survived": survived, "lost": len(tried) - survived, "faults": rows}
    (HERE / "faults.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    lines = [f"{len(tried)} tried, {survived} survived, {len(tried) - survived} lost.", ""]
    lines += [f"| {' | '.join([*HEADINGS, 'result'])} |", "|" + "---|" * 4]
    lines += [f"| {' | '.join(row.values())} |" for row in rows]
    text, mark = DOCUMENT.read_text("utf-8"), "<!-- faults -->\n"
    before, _, after = text.split(mark)
    DOCUMENT.write_text(mark.join([before, "\n".join(lines) + "\n", after]), "utf-8")
    print("\n".join(lines))


def rows_of(report: ElementTree.ElementTree[ElementTree.Element]) -> list[dict[str, str]]:
    """One for each test that stands for a fault."""
    rows = []
    for case in report.iter("testcase"):
        told = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        if "fault" in told:
            skipped, bad = case.find("skipped") is not None, any(case.find(x) is not None for x in ("failure", "error"))
            told["result"] = "not tried" if skipped else "lost" if bad else "survived"
            rows.append(told)
    return rows


if __name__ == "__main__":
    main()
