"""Reports and differences as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
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


def as_json(values: Any) -> str:
    """Return values as text.

    JSON has no NaN and no infinities: they become the strings that Python's float, and JavaScript's Number, take.
    """
    return json.dumps(_valid(values), indent=2, allow_nan=False)


def _valid(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _valid(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(each) for each in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")


def of_reports(rules: Rules, reports: Mapping[Path, Report], view: View) -> dict[str, Any]:
    """Return what JSON holds of reports; `regkern report --help` says what null and strings mean."""
    return {
        "regkern": regkern.__version__,
        "rules": {glob: regkern.serialize(regularizer) for glob, regularizer in rules.regularizers.items()},
        "files": [_file(path, report, view) for path, report in reports.items()],
    }


def _file(path: Path, report: Report, view: View) -> dict[str, Any]:
    return {
        "file": str(path),
        "bytes": report.file_bytes,
        "metadata": report.metadata,
        "dtypes": {
            dtype: {"tensors": tensors, "size": size, "nbytes": nbytes}
            for dtype, (tensors, size, nbytes) in report.dtypes.items()
        },
        "layers" if view.layers else "tensors": list(map(_fields, view.rows(report.weights))),
        "state": list(map(_fields, view.rows(report.state))),
        "totals": _fields(report.totals),
        "seconds": report.seconds,
        "sums_seconds": report.sums_seconds,
        "sums_gb_per_s": report.gb_per_s,
        "comparison": [
            {"by": way.name, "seconds": way.seconds, "largest_relative_difference": way.difference}
            for way in report.comparison
        ],
    }


def _fields(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def as_csv(reports: Mapping[Path, Report], view: View) -> str:
    """Return a line for each row, and a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *(field.name for field in dataclasses.fields(Row))])
    for path, report in reports.items():
        for row in [*view.rows(report.weights), *view.rows(report.state)]:
            cells = [str(path), *(_fields(row) | {"shape": "x".join(map(str, row.shape))}).values()]
            writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def of_changes(first: Path, second: Path, changes: Changes, rows: Sequence[Change]) -> dict[str, Any]:
    """Return what JSON holds of a difference."""
    totals = _fields(changes.totals)
    return {
        "regkern": regkern.__version__,
        "a": str(first),
        "b": str(second),
        "tensors": list(map(_fields, rows)),
        "only_in_a": changes.only_first,
        "only_in_b": changes.only_second,
        "totals": {key: value for key, value in totals.items() if key not in ("name", "shape", "dtype")},
    }
