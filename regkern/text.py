"""How names and numbers are spelled for people: in tables, pictures and errors."""

from collections.abc import Sequence


def printable(text: str) -> str:
    """Return the text with control characters, terminal escapes and the like spelled as Python escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def elided(text: str, length: int) -> str:
    """Shorten a name to so many characters by its middle: its start and its end say most."""
    if len(text) <= length:
        return text
    kept = max(length - 1, 0)
    tail = kept * 3 // 5
    return f"{text[: kept - tail]}…{text[len(text) - tail :]}"


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
