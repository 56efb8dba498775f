"""Reports as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regkern
from regkern.diff import Change, Changes
from regkern.rows import Report, Row
from regkern.rules import Rules
from regkern.tables import View
from regkern.text import printable


def as_json(rules: Rules, reports: Mapping[Path, Report], view: View) -> dict[str, Any]:
    """Return reports as JSON can hold them; `regkern report --help` says what null and strings mean."""
    return {
        "regkern": regkern.__version__,
        "rules": {glob: regkern.serialize(regularizer) for glob, regularizer in rules.regularizers.items()},
        "files": [_file(path, report, view) for path, report in reports.items()],
    }


def _file(path: Path, report: Report, view: View) -> dict[str, Any]:
    shown = "layers" if view.layers else "tensors"
    return {
        "file": str(path),
        "bytes": report.file_bytes,
        "metadata": report.metadata,
        "dtypes": {
            dtype: {"tensors": tensors, "size": size, "nbytes": nbytes}
            for dtype, (tensors, size, nbytes) in report.dtypes.items()
        },
        shown: [valid(dataclasses.asdict(row)) for row in view.rows(report.weights)],
        "state": [valid(dataclasses.asdict(row)) for row in view.rows(report.state)],
        "totals": valid(dataclasses.asdict(report.totals)),
        "seconds": report.seconds,
        "sums_seconds": report.sums_seconds,
        "sums_gb_per_s": report.gb_per_s,
        "comparison": [
            valid({"by": way.name, "seconds": way.seconds, "largest_relative_difference": way.difference})
            for way in report.comparison
        ],
    }


def valid(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinities: they become the strings that Python's float, and JavaScript's Number, take."""
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}

    def one(value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return names.get(value, "NaN")

    return {key: one(value) for key, value in values.items()}


def as_csv(reports: Mapping[Path, Report], view: View) -> str:
    """Return a line for each row, and a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = [field.name for field in dataclasses.fields(Row)]
    writer.writerow(["file", *fields])
    for path, report in reports.items():
        for row in [*view.rows(report.weights), *view.rows(report.state)]:
            values = dataclasses.asdict(row) | {"shape": "x".join(map(str, row.shape))}
            cells = [str(path), *(values[field] for field in fields)]
            writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def changes_as_json(first: Path, second: Path, changes: Changes, rows: Sequence[Change]) -> dict[str, Any]:
    """Return a difference as JSON can hold it."""
    totals = dataclasses.asdict(changes.totals)
    return {
        "regkern": regkern.__version__,
        "a": str(first),
        "b": str(second),
        "tensors": [valid(dataclasses.asdict(row)) for row in rows],
        "only_in_a": changes.only_first,
        "only_in_b": changes.only_second,
        "totals": valid({key: value for key, value in totals.items() if key not in ("name", "shape", "dtype")}),
    }
