"""Rules of reports: how they are written, and which falls to a tensor."""

import json

import pytest

import regkern as rk
from regkern.rules import RuleError, parse_rule, parse_rules
from tests.commands import run


@pytest.mark.parametrize(
    ("text", "glob", "expected"),
    [
        ("*=none", "*", None),
        ("*=None", "*", None),
        ("*=l1", "*", rk.L1(0.01)),
        ("*=l2:l2=1e-4", "*", rk.L2(1e-4)),
        (" *kernel* = l1_l2 : l1 = 1e-5 , l2 = 1e-4 ", "*kernel*", rk.L1L2(1e-5, 1e-4)),
        ("*=l1_l2:l1=0.5", "*", rk.L1L2(0.5, 0.01)),
        ("*=L1L2:l1=0.5", "*", rk.L1L2(0.5, 0.0)),
        ("[ab]?=orthogonal_regularizer:factor=0.5,mode=columns", "[ab]?", rk.OrthogonalRegularizer(0.5, "columns")),
    ],
)
def test_rules_parse(text, glob, expected):
    found, regularizer = parse_rule(text)
    assert found == glob
    assert repr(regularizer) == repr(expected)


BAD_RULES = {
    "": "expected 'GLOB=none'",
    "l2": "expected 'GLOB=none'",
    "=l2": "expected 'GLOB=none'",
    "*=": "expected 'GLOB=none'",
    "*=l3": "Could not interpret regularizer identifier: 'l3'",
    "*=l2:": "each keyword once",
    "*=l2:l2": "each keyword once",
    "*=l2:l2=1,l2=2": "each keyword once",
    "*=l2:l3=1": "expected keywords among l2; got 'l3'",
    "*=l2:l2=-1": "expected a non-negative float",
    "*=l2:l2=nan": "expected a non-negative float",
    "*=l2:l2=much": "expected a non-negative float",
    "*=orthogonal_regularizer:mode=diagonals": "Invalid value for argument `mode`",
}


@pytest.mark.parametrize("text", BAD_RULES)
def test_rules_that_do_not_parse(text):
    with pytest.raises(RuleError) as caught:
        parse_rule(text)
    assert BAD_RULES[text] in str(caught.value)
    result = run("report", "--demo", "--rule", text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


def test_the_first_rule_that_matches_wins():
    rules = parse_rules(["*.bias=none", "dense*=l1", "*=l2", "dense*=l2", "*.bias=l2"])
    assert rules.find("dense.bias") == ("*.bias", None)
    assert repr(rules.find("dense.kernel")) == repr(("dense*", rk.L1(0.01)))
    assert rules.find("logits")[0] == "*"
    assert parse_rules(["a=l1"]).find("A") == (None, None)
    assert rules.unused(["dense.kernel"]) == ["*.bias", "*"]


def test_a_rule_that_falls_to_nothing_warns():
    result = run("report", "--demo", "--rule", "conv*=l2", "--rule", "*=l1", "--json")
    assert result.exit_code == 0
    assert result.stderr == (
        "Warning: rule 'conv*' falls to no tensor; a glob matches a whole name, as '*kernel*' does.\n"
    )
    json.loads(result.stdout)


def test_rules_that_are_names():
    rules = parse_rules(["x[0]=none", "a?=l1", "*=l2"]).among(["x[0]", "x0", "a?", "ab"])
    assert [rules.find(name)[0] for name in ("x[0]", "x0", "a?", "ab")] == ["x[0]", "*", "a?", "*"]
    assert parse_rules(["x[0]=l1"]).find("x[0]")[0] == "x[0]"
    assert parse_rules(["*=none", "x[0]=l1"]).among(["x[0]"]).find("x[0]")[0] == "*"  # the order stays


@pytest.mark.parametrize(
    ("text", "glob", "regularizer"),
    [
        ("lr=0.1/w=none", "lr=0.1/w", None),
        ("a=b=c=l2:l2=0.5", "a=b=c", rk.L2(0.5)),
        ("lr=*=l1_l2:l1=1,l2=2", "lr=*", rk.L1L2(1, 2)),
        ("x[=]=None", "x[=]", None),
    ],
)
def test_rules_for_names_with_equals_signs(text, glob, regularizer):
    found = parse_rule(text)
    assert (found[0], repr(found[1])) == (glob, repr(regularizer))


def test_rules_with_equals_signs_that_do_not_parse():
    for text, said in (("lr=0.1/w=l3", "identifier: 'l3'"), ("x=l2:l2=none", "expected a non-negative float")):
        with pytest.raises(RuleError, match=said):
            parse_rule(text)


def test_an_axis_is_an_integer():
    _, regularizer = parse_rule("*=group_lasso:factor=1,mode=1")
    assert repr(regularizer) == repr(rk.GroupLasso(1.0, 1))
    assert type(regularizer.get_config()["factor"]) is float
