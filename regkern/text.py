"""How names and numbers are spelled for people: in tables, pictures and errors."""

import functools
import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    """Return the text with control characters, terminal escapes and the like spelled as Python escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes: wide characters take two, combining ones none.

    Examples:
        >>> width("層.w")
        4
    """
    if text.isascii():
        return len(text)
    return sum(map(_width, text))


@functools.cache
def _width(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me", "Cf") or unicodedata.combining(c):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def padded(text: str, columns: int, right: bool = False) -> str:
    """Fill a text with spaces to so many columns of a terminal, on its left if it is to end at the right edge."""
    characters = columns if text.isascii() else columns - width(text) + len(text)
    return text.rjust(characters) if right else text.ljust(characters)


def elided(text: str, columns: int) -> str:
    """Shorten a name to so many columns of a terminal by its middle: its start and its end say most."""
    if width(text) <= columns:
        return text
    kept = max(columns - 1, 0)
    tail = kept * 3 // 5
    end = _start(text[::-1], tail)[::-1]
    return f"{_start(text, kept - tail)}…{end}"


def _start(text: str, columns: int) -> str:
    """Return as much of a text's start as fits."""
    if text.isascii():
        return text[:columns]
    for i, c in enumerate(text):
        columns -= _width(c)
        if columns < 0:
            return text[:i]
    return text


def quoted(text: str) -> str:
    """Quote a text for a shell, always.

    Examples:
        >>> print(quoted("x[0]=none"))
        'x[0]=none'
    """
    return "'" + text.replace("'", "'\"'\"'") + "'"


def number(value: float, digits: int = 5) -> str:
    """Spell a number with so many digits, and an exponent as short as it can be.

    Examples:
        >>> number(1234567.0)
        '1.2346e6'
    """
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def share(part: int, whole: int) -> str:
    """Spell a percentage, which is 0% or 100% of none or all alone.

    Examples:
        >>> share(1, 8), share(1, 10**6), share(10**6 - 1, 10**6), share(0, 0)
        ('12.5%', '<0.01%', '>99.9%', '0%')
    """
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.01:
        return "<0.01%"
    return ">99.9%" if 99.9 < percent < 100 else f"{percent:.3g}%"


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML; all but the first column are aligned to the right.

    Examples:
        >>> html_table(["a"], [["<"]])
        '<table><tr><th>a</th></tr><tr><td>&lt;</td></tr></table>'
    """
    import html  # notebooks alone need it

    def line(cells: Sequence[str], tag: str) -> str:
        right = ' style="text-align: right"'
        return "".join(f"<{tag}{right * (i > 0)}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))

    lines = [line(headers, "th"), *(line(row, "td") for row in rows)]
    return f"<table>{''.join(f'<tr>{cells}</tr>' for cells in lines)}</table>"


def seconds(time: float) -> str:
    """Spell a time.

    Examples:
        >>> seconds(0.0125)
        '12.5 ms'
    """
    if time < 1e-3:
        return f"{time * 1e6:.3g} µs"
    return f"{time * 1e3:.3g} ms" if time < 1 else f"{time:.3g} s"


def decimal(nbytes: int) -> str:
    """Spell a number of bytes, in powers of 1000.

    Examples:
        >>> decimal(999), decimal(1_234_567)
        ('999 B', '1.2 MB')
    """
    if nbytes < 1000:
        return f"{nbytes} B"
    size, units = float(nbytes), iter(("kB", "MB", "GB", "TB", "PB"))
    while size >= 999.95:
        size, unit = size / 1000, next(units)
    return f"{size:.1f} {unit}"
