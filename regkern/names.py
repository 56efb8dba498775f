"""Globs and the names that they are meant for."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

_SHOWN = 3


def matches_any(glob: str, names: Iterable[str]) -> bool:
    """Whether a glob matches one of the names."""
    return any(name == glob or fnmatchcase(name, glob) for name in names)


def nearest(glob: str, names: Sequence[str]) -> str:
    """Say which names a glob that matches none of them may mean.

    Examples:
        >>> nearest("*wieght", ["head.weight", "head.bias"])
        "the nearest is 'head.weight'"
        >>> nearest("lstm.*", ["head.weight", "head.bias"])
        "the names are 'head.weight', 'head.bias'"
    """
    from difflib import get_close_matches  # here, for an error: an import of regkern does without

    meant = re.sub(r"[*?\[\]!]", "", glob).strip("./")
    parts: dict[str, list[str]] = {}
    for name in names:
        pieces = re.split("([./])", name)  # with what is between them
        ends = ["".join(pieces[i:]) for i in range(0, len(pieces), 2)]
        for part in dict.fromkeys([*ends, *pieces[::2]]):
            parts.setdefault(part, []).append(name)
    close = get_close_matches(meant, parts, n=_SHOWN)
    found = list(dict.fromkeys(name for part in close for name in parts[part]))
    if found:
        return f"the nearest {'is' if len(found) == 1 else 'are'} {_listed(found)}"
    return f"the names are {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
