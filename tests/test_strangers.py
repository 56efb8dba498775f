"""Configs from strangers: `deserialize` imports nothing that they name, and calls nothing that is not registered."""

import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regkern as rk

EXAMPLES = int(os.environ.get("REGKERN_FUZZ_EXAMPLES", "300"))

CALLED: list[object] = []


@rk.register_keras_serializable(package="Strangers")
class Known(rk.Regularizer):
    def __init__(self, strength=1.0):
        CALLED.append(strength)
        self.strength = strength

    def get_config(self):
        return {"strength": self.strength}


ALLOWED = (rk.Regularizer, Known)
# Names as attackers and as Keras write them, of modules that are and are not loaded.
NAMES = st.one_of(
    st.sampled_from(
        [
            *(
                "L1",
                "l2",
                "L1L2",
                "l1_l2",
                "OrthogonalRegularizer",
                "Regularizer",
                "Known",
                "Strangers>Known",
                "function",
            ),
            *("os.system", "system", "eval", "exec", "builtins", "__import__", "Popen", "subprocess", "os", "posix"),
            *("this", "antigravity", "turtle", "keras.regularizers", "regkern.regularizers", "tf_keras", "Lambda"),
            *("__lambda__", "__tensor__", "__class__", "__init__", "__reduce__", "Custom>L1", "regkern>L2", "a.b", ""),
        ]
    ),
    st.text(max_size=12),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["l1", "l2", "l", "factor", "mode", "leading_axes", "strength", "self", "cls", "__class__"])
    | NAMES,
    st.floats(0, 1) | VALUES,
    max_size=3,
)
CONFIGS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {"class_name": NAMES | VALUES},
        optional={
            "config": ARGUMENTS | VALUES,
            "module": NAMES | VALUES,
            "registered_name": NAMES | VALUES,
            "build_config": VALUES,
            "compile_config": VALUES,
            "fn": NAMES,
        },
    ),
)
# What Python raises for arguments that a registered class does not take, and regkern for the rest.
REFUSED = (ValueError, TypeError)


@pytest.fixture(scope="module", autouse=True)
def events():
    """Notice every import of a module, every program that is started and every file that is opened."""
    seen: list[tuple[str, object]] = []
    watching = [True]
    wanted = ("import", "exec", "compile", "open", "os.", "subprocess.", "socket.", "ctypes.", "marshal.", "pickle.")

    def hook(event, arguments):
        if watching[0] and event.startswith(wanted):
            seen.append((event, arguments[:1]))

    sys.addaudithook(hook)
    yield seen
    watching[0] = False


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(config=CONFIGS)
@pytest.mark.parametrize("load", [rk.deserialize, rk.get], ids=["deserialize", "get"])
def test_a_strangers_config_is_a_regularizer_or_an_error(events, load, config):
    if callable(config):
        return
    modules, before = set(sys.modules), len(events)
    try:
        result = load(config)
    except REFUSED:
        result = None
    assert events[before:] == []
    assert set(sys.modules) == modules
    assert result is None or isinstance(result, ALLOWED)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(rules=st.dictionaries(NAMES, CONFIGS, max_size=3), count_tied=st.booleans() | VALUES)
def test_a_penalty_from_a_strangers_config(rules, count_tied):
    modules = set(sys.modules)
    try:
        penalty = rk.Penalty.from_config({"rules": rules, "count_tied": count_tied})
    except REFUSED:
        return
    finally:
        assert set(sys.modules) == modules
    assert all(each is None or isinstance(each, ALLOWED) for each in penalty.rules.regularizers.values())


def test_only_a_config_that_names_it_calls_what_is_registered():
    CALLED.clear()
    rk.deserialize({"class_name": "L2", "config": {"l2": 0.5}, "module": "tests.test_strangers"} | {"module": None})
    assert CALLED == []
    rk.deserialize({"class_name": "Known", "config": {"strength": 2.0}, "registered_name": "Strangers>Known"})
    assert CALLED == [2.0]


@pytest.mark.parametrize("name", ["eval", "print", "open", "__import__"])
def test_functions_of_python_are_not_known(name):
    for config in (name, {"class_name": "function", "config": name, "module": "builtins"}):
        with pytest.raises(ValueError, match="Could not interpret"):
            rk.deserialize(config)
