"""Regularizers that are registered, in scopes or functions, as configs name them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import regkern as rk
from regkern.regularizers import PenaltyRegularizer


class Custom(rk.Regularizer):
    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, x):
        return self.strength * x.max()

    def get_config(self):
        return {"strength": self.strength}


@rk.register_keras_serializable(package="Tests")
class Registered(Custom):
    pass


@rk.register_keras_serializable("Tests", name="renamed")
def registered_function(x):
    return x.min()


def plain_function(x):
    return x.min()


@pytest.mark.parametrize("legacy", [False, True])
def test_custom_objects(legacy):
    config = rk.serialize(Custom(2.0), use_legacy_format=legacy)
    with pytest.raises(ValueError, match="registered by register_keras_serializable"):
        rk.deserialize(config)
    assert rk.deserialize(config, custom_objects={"Custom": Custom}).strength == 2.0
    with rk.CustomObjectScope({"Custom": Custom}):
        assert rk.deserialize(config).strength == 2.0
        assert rk.get("Custom").strength == 1.0
        with (scope := rk.custom_object_scope({"Inner": Custom})), scope:
            assert rk.get("Custom").strength == rk.get("Inner").strength
    with pytest.raises(ValueError, match="Could not interpret"):
        rk.get("Custom")


@pytest.mark.parametrize("legacy", [False, True])
def test_registered_objects(legacy):
    config = rk.serialize(Registered(3.0), use_legacy_format=legacy)
    assert "Tests>Registered" in config.values()
    again = rk.deserialize(config)
    assert type(again) is Registered
    assert again.strength == 3.0
    assert rk.deserialize(rk.serialize(registered_function, use_legacy_format=legacy)) is registered_function
    assert rk.get("Tests>renamed") is registered_function


def test_custom_objects_by_other_names():
    assert rk.deserialize("plain", custom_objects={"plain": plain_function}) is plain_function
    config = {"class_name": "Custom", "config": {}, "registered_name": "package>Custom"}
    assert type(rk.deserialize(config, custom_objects={"package>Custom": Custom})) is Custom


def test_custom_objects_with_and_without_from_config():
    class Percent(Custom):
        @classmethod
        def from_config(cls, config):
            return cls(config["strength"] / 100)

    class Bare:
        def __init__(self, strength):
            self.strength = strength

    for cls, strength in ((Percent, 0.5), (Bare, 50)):
        config = {"class_name": "custom", "config": {"strength": 50}}
        assert rk.deserialize(config, custom_objects={"custom": cls}).strength == strength


def test_a_config_without_a_config():
    """Keras refuses it too, for its own classes and for those that were registered."""
    for config in ({"class_name": "L2"}, {"class_name": "custom"}, {"class_name": "Tests>Registered"}):
        for call in (rk.get, rk.deserialize, lambda config: rk.Penalty({"*": config})):
            with pytest.raises(ValueError, match="Could not interpret regularizer identifier"):
                call(config)
    with pytest.raises(ValueError, match="Could not interpret regularizer identifier"):
        rk.deserialize({"class_name": "custom"}, custom_objects={"custom": Custom})


def test_functions():
    config = rk.serialize(plain_function)
    assert config == {
        "module": "builtins",
        "class_name": "function",
        "config": "plain_function",
        "registered_name": "function",
    }
    assert rk.deserialize(config, custom_objects={"plain_function": plain_function}) is plain_function
    assert rk.serialize(plain_function, use_legacy_format=True) == "plain_function"


def test_a_subclass_of_a_built_in_is_not_taken_for_it():
    class L2(rk.L2):
        pass

    config = rk.serialize(L2(0.5))
    assert config["module"] is None
    with pytest.raises(ValueError, match="Could not interpret"):
        rk.deserialize(config)
    assert type(rk.deserialize(config, custom_objects={"L2": L2})) is L2


def test_registering_needs_a_config():
    with pytest.raises(ValueError, match=r"does not have a get_config\(\) method"):
        rk.register_keras_serializable()(type("Bare", (), {}))


def test_scopes_belong_to_their_thread():
    with rk.CustomObjectScope({"Custom": Custom}), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(rk.get, "Custom")
    with pytest.raises(ValueError, match="Could not interpret"):
        elsewhere.result()


def test_a_scope_can_be_entered_again():
    scope = rk.CustomObjectScope({"Custom": Custom})
    with scope:
        with scope:
            assert rk.get("Custom").strength == 1.0
        assert rk.get("Custom").strength == 1.0
    with pytest.raises(ValueError, match="Could not interpret"):
        rk.get("Custom")


def test_a_function_by_its_class_name():
    assert rk.deserialize({"class_name": "total", "config": {}}, custom_objects={"total": np.sum}) is np.sum


def test_registered_names():
    """Registered inside of a test, not at import."""

    @rk.register_keras_serializable()
    class Own(rk.Regularizer):
        def get_config(self):
            return {}

    @rk.register_keras_serializable("package", "other")
    class Named(Own):
        pass

    for cls, name in ((Own, "Custom>Own"), (Named, "package>other")):
        assert rk.serialize(cls())["registered_name"] == name
        assert type(rk.get(name)) is type(rk.deserialize(rk.serialize(cls()))) is cls

    @rk.register_keras_serializable()
    def needs_no_config(x):
        return 1.0

    assert rk.get("Custom>needs_no_config") is needs_no_config
    with pytest.raises(ValueError, match=r"^Cannot register a class that does not have a get_config\(\) method\.$"):
        rk.register_keras_serializable()(type("Bare", (), {}))


def test_a_penalty_without_a_formula_says_what_it_lacks():
    class Mine(PenaltyRegularizer):
        pass

    with pytest.raises(NotImplementedError, match=r"^Mine: expected a property `_terms`, its formula; got none\.$"):
        Mine()(np.ones(3))
