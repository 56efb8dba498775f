"""Which regularizer a tensor gets: ordered rules over names, of which the first that matches wins."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from regkern.selectors import is_selector, select
from regkern.serialization import get

_EXPECTED = "expected 'GLOB=none' or 'GLOB=IDENTIFIER:factor=value,...', as in '*kernel*=l1_l2:l1=1e-5,l2=1e-4'"


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob)


# As `torch.compiler.assume_constant_result` marks what a graph takes as known: it cannot trace `fnmatch`.
_matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


class RuleError(ValueError):
    """A rule that does not parse, or that cannot be applied to a tensor; the text is one sentence."""


class Rules:
    """Ordered rules: globs over names and, for each, a regularizer or None, which means no penalty.

    Globs are those of `fnmatch.fnmatchcase`: ``*`` matches anything, dots and slashes included; case counts. A name
    always matches the glob that is spelled as it is, brackets or not.

    Args:
        regularizers: globs and their regularizers, in the order in which they are tried.
        exact: globs that are names: they match these alone.
        selected: the names that selectors mean, which match these alone.

    Examples:
        >>> import regkern as rk
        >>> rules = Rules({"*bias*": None, "*": rk.L2(1e-4)})
        >>> rules.find("dense.bias"), rules.find("dense.kernel")
        (('*bias*', None), ('*', L2(l2=0.0001)))
    """

    def __init__(
        self,
        regularizers: Mapping[str, Any],
        exact: Iterable[str] = (),
        selected: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.regularizers = dict(regularizers)
        self._exact = frozenset(exact)
        self._selected = selected or {}

    def among(self, names: Iterable[str], selected: Mapping[str, Collection[str]] | None = None) -> Rules:
        """Return the rules for tensors of these names: a glob that is one of them is that tensor's, and no glob.

        Args:
            names: the tensors' names.
            selected: for each rule that is a selector, the names that it means.

        Examples:
            >>> rules = Rules({"x[0]": None, "*": "l2"}).among(["x[0]", "x0"])
            >>> rules.find("x[0]"), rules.find("x0")
            (('x[0]', None), ('*', 'l2'))
        """
        return Rules(self.regularizers, self.regularizers.keys() & set(names), selected)

    def of_file(self, tensors: Iterable[Any]) -> Rules:
        """Return the rules for what a file holds: names and shapes tell what selectors mean, but for no exact name.

        Args:
            tensors: tensors with names and shapes.
        """
        named = {tensor.name: tensor for tensor in tensors}
        return self.among(named, select(self.regularizers.keys() - named.keys(), (), named))

    def find(self, name: str) -> tuple[str | None, Any]:
        """Return the first glob that matches the name, and its regularizer; (None, None) where none does."""
        for glob, regularizer in self.regularizers.items():
            if glob in self._selected:
                if name in self._selected[glob]:
                    return glob, regularizer
            elif name == glob or (glob not in self._exact and _matches(name, glob)):
                return glob, regularizer
        return None, None

    def unused(self, names: Iterable[str]) -> list[str]:
        """Return the globs that no name falls to: they match none, or an earlier rule takes all that they match."""
        used = {self.find(name)[0] for name in names}
        return [glob for glob in self.regularizers if glob not in used]

    def __str__(self) -> str:
        rules = (f"{glob} = {regularizer or 'none'}" for glob, regularizer in self.regularizers.items())
        return "; ".join(rules)


def selected(tensors: Iterable[Any], only: Iterable[str], exclude: Iterable[str]) -> set[str]:
    """Return the names that a glob of `only` matches, or all without one, and none of `exclude`.

    Args:
        tensors: what a file holds, as for `Rules.of_file`.
        only: globs, or selectors; none stand for all.
        exclude: globs, or selectors.

    Raises:
        RuleError: one is neither.
    """
    tensors = list(tensors)
    for glob in (*only, *exclude):
        _check_selector(glob)
    taken = Rules(dict.fromkeys(only or ("*",), True)).of_file(tensors)
    left = Rules(dict.fromkeys(exclude, True)).of_file(tensors)
    return {tensor.name for tensor in tensors if taken.find(tensor.name)[1] and not left.find(tensor.name)[1]}


def parse_rules(texts: Iterable[str]) -> Rules:
    """Parse rules as the command line spells them; of two rules with the same glob, the first wins.

    Raises:
        RuleError: one does not parse.
    """
    regularizers: dict[str, Any] = {}
    for text in texts:
        glob, regularizer = parse_rule(text)
        regularizers.setdefault(glob, regularizer)
    return Rules(regularizers)


def parse_rule(text: str) -> tuple[str, Any]:
    """Parse one rule.

    Args:
        text: ``GLOB=IDENTIFIER``, ``GLOB=IDENTIFIER:keyword=value,...`` or ``GLOB=none``. The identifier is one that
            `regkern.get` takes; keywords that are left out have the identifier's defaults. Globs may have "=": the
            first one that an identifier follows counts.

    Returns:
        The glob and the regularizer, or None for "none".

    Raises:
        RuleError: the rule has another form, or the regularizer does not take what it says.

    Examples:
        >>> parse_rule("*kernel*=l1_l2:l1=1e-5,l2=1e-4")
        ('*kernel*', L1L2(l1=1e-05, l2=0.0001))
    """
    glob, regularizer = _split(text)
    if not (glob and regularizer):
        raise RuleError(f"rule {text!r}: {_EXPECTED}.")
    _check_selector(glob)
    if regularizer.lower() == "none":
        return glob, None
    identifier, colon, keywords = regularizer.partition(":")
    try:
        defaults = get(identifier.strip())
        parameters = signature(type(defaults)).parameters.values()
        expected = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
        arguments = _keywords(keywords, expected) if colon else {}
        return glob, type(defaults).from_config({**defaults.get_config(), **arguments})
    except (ValueError, TypeError) as error:
        raise RuleError(f"rule {text!r}: {error}") from error


def _check_selector(rule: str) -> None:
    """Refuse what begins as a selector and is none, or one that no file can answer."""
    try:
        of_layers = is_selector(rule) and rule.startswith("@layer")
    except ValueError as error:
        raise RuleError(str(error)) from error
    if of_layers:
        raise RuleError(
            f"rule {rule!r}: expected a glob, '@rank>=2' or '@no_decay'; got one by the classes of layers, which "
            "weight files do not hold; write a glob over names, such as '*conv*'."
        )


def _split(text: str) -> tuple[str, str]:
    """Split a rule at the first "=" that an identifier follows; if none does, at the first that a word follows."""
    at, found = text.find("="), -1
    words = [text.find("=")]
    while at >= 0 and found < 0:
        identifier = text[at + 1 :].partition(":")[0].strip()
        if _known(identifier):
            found = at
        elif identifier.isidentifier():
            words.append(at)
        at = text.find("=", at + 1)
    split = found if found >= 0 else words[1] if len(words) > 1 else words[0]
    return (text[:split].strip(), text[split + 1 :].strip()) if split >= 0 else ("", "")


def _known(identifier: str) -> bool:
    if identifier.lower() == "none":
        return True
    try:
        return bool(identifier) and get(identifier) is not None
    except (ValueError, TypeError):
        return False


def _keywords(text: str, expected: Collection[str]) -> dict[str, float | str]:
    arguments: dict[str, float | str] = {}
    for part in text.split(","):
        keyword, equals, value = (piece.strip() for piece in part.partition("="))
        if not (keyword and equals and value) or keyword in arguments:
            raise ValueError(f"{_EXPECTED}, each keyword once; got {part!r}.")
        if keyword not in expected:
            raise ValueError(f"expected keywords among {', '.join(expected)}; got {keyword!r}.")
        arguments[keyword] = _value(value)
    return arguments


def _value(text: str) -> float | str:
    """Read a number, an integer where it is one, for an axis; or a word, which the regularizer judges."""
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text
