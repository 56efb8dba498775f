"""Checkpoints in several files, with an index that says which tensor is in which."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath
from typing import Any

from regkern.text import elided
from regkern.weights.errors import WeightsError, explained
from regkern.weights.formats import check_file, read_file
from regkern.weights.tensors import Tensor, Tensors, in_natural_order

# Bytes of an index: parsed, hostile ones take some thirty times as much memory. Of real ones, 10 MB is a large one.
_LONGEST_INDEX = 1 << 26


def read_index(path: Path, stack: ExitStack) -> Tensors:
    """Return the tensors of all shards, of which each has those that the index says and no others."""
    check_file(path)
    shards: dict[Path, set[str]] = {}
    for name, shard in _weight_map(path).items():
        shards.setdefault(_beside(path, shard), set()).add(name)
    tensors: list[Tensor] = []
    metadata: dict[str, str] = {}
    for shard_path, names in shards.items():
        found = read_file(shard_path, stack)
        there = {tensor.name for tensor in found}
        for name in sorted(names ^ there)[:1]:
            expected, got = ("a tensor", "none") if name in names else ("no tensor", "one")
            raise WeightsError(
                shard_path,
                f"{expected} of the name {elided(name, 100)}, according to {path.name}",
                got,
                "get or save all shards again, or pass them without their index",
            )
        tensors += found
        metadata |= found.metadata
    return Tensors(in_natural_order(tensors), metadata)


def _weight_map(path: Path) -> dict[str, str]:
    expected = 'a JSON object whose "weight_map" gives for each tensor the file that it is in'
    if path.stat().st_size > _LONGEST_INDEX:
        raise WeightsError(path, expected, f"more than {_LONGEST_INDEX >> 20} MiB", "check that it is an index")
    # What does not begin with a brace is no such object, damaged or not.
    kinds = ("text", "unknown") if path.read_bytes().lstrip()[:1] == b"{" else ()
    with explained(path, expected, kinds):
        index = json.loads(path.read_bytes(), object_pairs_hook=_unrepeated)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not (isinstance(names, dict) and names and all(isinstance(shard, str) for shard in names.values())):
        raise WeightsError(path, expected, "JSON of another form", "get or save it again")
    return names


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _beside(index: Path, shard: str) -> Path:
    """Return the path of a shard, which is in the index's folder or below it, whichever system reads it."""
    path = PureWindowsPath(shard)  # knows both separators and drives
    if path.anchor or ".." in path.parts:
        raise WeightsError(
            index, "shards in its own folder", f"the path {elided(shard, 100)!r}", "move them there and correct it"
        )
    return index.parent / shard
