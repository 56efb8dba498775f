"""Factors, identifiers and configs: every row of the contract."""

import copy
import json
import pickle
import re

import numpy as np
import pytest

import regkern as rk

CLASSES = {"l1": rk.L1, "l2": rk.L2, "factor": rk.OrthogonalRegularizer}

GOOD_FACTORS = [
    0,
    1,
    0.0,
    0.1,
    1e-300,
    1e300,
    np.float32(0.1),
    np.float64(0.1),
    np.float16(0.5),
    np.int32(3),
    np.uint8(2),
]
BAD_FACTORS = [
    True,
    np.bool_(True),
    "0.1",
    float("nan"),
    float("inf"),
    -float("inf"),
    np.float32("nan"),
    -1,
    -1e-30,
    np.int8(-1),
    10**400,
    [0.1],
    np.array([0.1]),
    np.array(True),
    np.array(0.1j),
    np.array(-0.1),
    np.array(np.nan),
    0.1j,
    np.complex64(1),
    object(),
]


@pytest.mark.parametrize("value", GOOD_FACTORS, ids=repr)
@pytest.mark.parametrize("name", CLASSES)
def test_a_factor_is_a_python_float_kept_exactly(name, value):
    kept = CLASSES[name](value).get_config()[name]
    assert type(kept) is float
    assert kept == float(value)


@pytest.mark.parametrize("value", BAD_FACTORS)
@pytest.mark.parametrize("name", CLASSES)
def test_bad_factors_are_named(name, value):
    with pytest.raises(ValueError, match="expected a non-negative float") as error:
        CLASSES[name](value)
    assert f"argument {name}:" in str(error.value)
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_bad_factors_of_l1l2_are_named(name):
    with pytest.raises(ValueError, match=rf"argument {name}: expected a non-negative float\. Received: {name}=-1"):
        rk.L1L2(**{name: -1})


def test_a_factor_set_later_is_checked_and_nothing_changes():
    regularizer = rk.L2(0.5)
    with pytest.raises(ValueError, match="expected a non-negative float"):
        regularizer.l2 = -1
    assert regularizer.l2 == 0.5


def test_none_means_the_default():
    assert rk.L1(None).l1 == 0.01
    assert rk.L2(None).l2 == 0.01
    assert rk.L1L2(None, None).get_config() == {"l1": 0.0, "l2": 0.0}


def test_defaults():
    assert rk.L1().get_config() == {"l1": 0.01}
    assert rk.L2().get_config() == {"l2": 0.01}
    assert rk.L1L2().get_config() == {"l1": 0.0, "l2": 0.0}
    assert rk.l1_l2().get_config() == {"l1": 0.01, "l2": 0.01}
    assert rk.OrthogonalRegularizer().get_config() == {"factor": 0.01, "mode": "rows"}
    assert (rk.l1, rk.l2, rk.orthogonal_regularizer) == (rk.L1, rk.L2, rk.OrthogonalRegularizer)


@pytest.mark.parametrize("cls", [rk.L1, rk.L2])
def test_the_old_spelling(cls):
    regularizer = cls(l=0.3)
    assert list(regularizer.get_config().values()) == [0.3]
    assert "l" not in regularizer.get_config()
    with pytest.raises(TypeError, match="unexpected keyword argument 'factor'"):
        cls(factor=0.3)


@pytest.mark.parametrize("cls", [rk.L1L2, rk.OrthogonalRegularizer])
def test_other_keywords(cls):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        cls(l=0.3)


IDENTIFIERS = {
    "l1": "L1(l1=0.01)",
    "L1": "L1(l1=0.01)",
    "l2": "L2(l2=0.01)",
    "L2": "L2(l2=0.01)",
    "l1l2": "L1L2(l1=0.0, l2=0.0)",
    "L1L2": "L1L2(l1=0.0, l2=0.0)",
    "l1_l2": "L1L2(l1=0.01, l2=0.01)",
    "orthogonal_regularizer": "OrthogonalRegularizer(factor=0.01, mode='rows')",
    "OrthogonalRegularizer": "OrthogonalRegularizer(factor=0.01, mode='rows')",
}


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_string_identifiers(identifier):
    assert repr(rk.get(identifier)) == IDENTIFIERS[identifier]
    assert repr(rk.deserialize(identifier)) == IDENTIFIERS[identifier]


def test_get():
    instance = rk.L1(0.5)
    assert rk.get(None) is None
    assert isinstance(rk.get(rk.L2), rk.L2)
    assert rk.get(instance) is instance
    assert rk.get(abs) is abs
    assert repr(rk.get({"class_name": "L2", "config": {"l2": 0.5}})) == "L2(l2=0.5)"


NOT_INTERPRETED = [
    "typo",
    "",
    3,
    0.1,
    [rk.L1()],
    {},
    {"config": {}},
    {"class_name": 3, "config": {}},
    {"class_name": "Dense", "config": {}},
    {"class_name": "L2"},
    {"module": "keras.regularizers", "class_name": "L2", "registered_name": None},
    {"class_name": "L2", "l2": 0.5},
    {"class_name": "L2", "config": None},
    {"class_name": "function"},
    {"class_name": "L2", "config": "l2"},
    {"class_name": "os.system", "config": "true"},
    {"module": "os", "class_name": "system", "config": "true", "registered_name": None},
    {"module": "other", "class_name": "L2", "config": {}, "registered_name": None},
    {"module": None, "class_name": "L2", "config": {}, "registered_name": "Other>L2"},
    {"module": None, "class_name": "L2", "config": {}, "registered_name": "L2"},  # as Keras writes a custom L2
    {"class_name": "function", "config": ["a"]},
    {"class_name": "function", "config": 3},
    {"module": "builtins", "class_name": "function", "config": "eval", "registered_name": "function"},
]


@pytest.mark.parametrize("identifier", NOT_INTERPRETED, ids=str)
def test_what_stands_for_nothing(identifier):
    function = isinstance(identifier, dict) and identifier.get("class_name") == "function"
    shown = re.escape(repr(identifier["config"] if function and "config" in identifier else identifier))
    with pytest.raises(ValueError, match=f"^Could not interpret regularizer identifier: {shown}; expected"):
        rk.get(identifier)


BUILT_IN = [rk.L1(0.1), rk.L2(0.2), rk.L1L2(0.1, 0.2), rk.OrthogonalRegularizer(0.3, "columns")]


@pytest.mark.parametrize("regularizer", BUILT_IN, ids=repr)
@pytest.mark.parametrize("legacy", [False, True])
def test_built_in_configs(regularizer, legacy):
    config = rk.serialize(regularizer, use_legacy_format=legacy)
    name = type(regularizer).__name__
    expected = {"class_name": name, "config": regularizer.get_config()}
    if not legacy:
        expected |= {"module": "keras.regularizers", "registered_name": None}
    assert config == expected
    again = rk.deserialize(json.loads(json.dumps(config)), use_legacy_format=legacy)
    assert type(again) is type(regularizer)
    assert again.get_config() == regularizer.get_config()
    assert type(again).from_config(again.get_config()).get_config() == regularizer.get_config()


FAMILY = ["keras.regularizers", "keras.src.regularizers", "tf_keras.regularizers", "regkern.regularizers"]


@pytest.mark.parametrize("module", FAMILY)
@pytest.mark.parametrize("registered_name", [None, "L1L2"])
def test_configs_of_the_family(module, registered_name):
    config = {
        "module": module,
        "class_name": "L1L2",
        "config": {"l1": 0.1, "l2": 0.2},
        "registered_name": registered_name,
    }
    assert repr(rk.get(config)) == "L1L2(l1=0.1, l2=0.2)"


@pytest.mark.parametrize("name", ["l2", "l1", "l1l2", "orthogonal_regularizer"])
def test_lower_case_class_names(name):
    assert type(rk.get({"class_name": name, "config": {}})) is type(rk.get(name))


@pytest.mark.parametrize("thing", ["l2", 3, np.ones(3)], ids=str)
def test_what_cannot_be_serialized(thing):
    with pytest.raises(ValueError, match="Could not serialize"):
        rk.serialize(thing)


def test_a_legacy_config_with_the_old_spelling():
    assert repr(rk.get({"class_name": "L1", "config": {"l": 0.3}})) == "L1(l1=0.3)"


def test_none_is_serialized_as_none():
    assert rk.serialize(None) is None
    assert rk.deserialize(None) is None


class WithoutConfig(rk.Regularizer):
    def __call__(self, x):
        return x.max()


def test_a_config_without_arguments():
    assert repr(rk.get({"class_name": "L2", "config": {}})) == "L2(l2=0.01)"


def test_the_base_class():
    assert rk.Regularizer()(np.ones(3)) == 0.0
    with pytest.raises(NotImplementedError, match=r"^Regularizer does not implement get_config\(\)$"):
        rk.Regularizer().get_config()
    with pytest.raises(NotImplementedError, match=r"^WithoutConfig does not"):
        rk.serialize(WithoutConfig())
    assert rk.get(WithoutConfig)(np.array([1.0, 2.0])) == 2.0
    assert "WithoutConfig object" in repr(WithoutConfig())


@pytest.mark.parametrize("regularizer", BUILT_IN, ids=repr)
def test_pickling(regularizer):
    x = np.random.default_rng(0).standard_normal((4, 5))
    regularizer(x)
    again = pickle.loads(pickle.dumps(regularizer))
    assert b"ormula" not in pickle.dumps(regularizer)  # a copy of a formula would compile kernels of its own
    assert again(x) == regularizer(x)
    assert again.get_config() == regularizer.get_config()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("regularizer", BUILT_IN, ids=repr)
def test_copies_have_factors_of_their_own(regularizer, duplicate):
    x = np.random.default_rng(0).standard_normal((4, 5))
    before = regularizer(x)
    again = duplicate(regularizer)
    assert again(x) == before
    for name, value in regularizer.get_config().items():
        if isinstance(value, float):
            setattr(again, name, value + 1.0)
    assert again(x) > before
    assert regularizer(x) == before


def test_a_regularizer_is_equal_to_itself_alone():
    """Its factors can be set: an equal one would take its place in caches and sets, and differ later."""
    first, second = rk.L2(0.5), rk.L2(0.5)
    assert first.get_config() == second.get_config()
    assert first != second
    kept = {first: 1, second: 2}
    second.l2 = 0.1
    assert (kept[first], kept[second]) == (1, 2)


def test_choices_that_are_set_later_are_checked():
    regularizer = rk.OrthogonalRegularizer()
    with pytest.raises(ValueError, match="Invalid value for argument `mode`"):
        regularizer.mode = "bogus"
    with pytest.raises(ValueError, match="leading_axes: expected None"):
        regularizer.leading_axes = "bogus"
    assert (regularizer.mode, regularizer.leading_axes) == ("rows", None)


def test_errors_name_what_is_at_fault():
    text = r"^prox: expected .*; got OrthogonalRegularizer; use its gradient\.$"
    with pytest.raises(NotImplementedError, match=text):
        rk.OrthogonalRegularizer().prox(np.ones((2, 2)), 0.1)
    text = r"^outputs: expected a batch on axis 0; got .* dimensions; pass a batch of one\.$"
    with pytest.raises(ValueError, match=text):
        rk.activity_penalty(rk.L2(), np.float32(1.0))


def test_finish_gives_float32_unless_told():
    for regularizer, x in ((rk.L2(0.5), np.ones(3)), (rk.OrthogonalRegularizer(0.5), np.eye(3))):
        assert regularizer.finish(regularizer.partial(x)).dtype == np.float32


def test_a_number_that_cannot_be_shown():
    with pytest.raises(ValueError, match=r"Received: l2=an int of more digits than Python prints$"):
        rk.L2(-(10**5000))
