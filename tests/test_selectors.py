"""Rules by rank, by the kind of layer, and for what weight decay is left off."""

import json

import numpy as np
import pytest

import regkern as rk
from regkern.rules import RuleError

L2 = rk.L2(0.5)


def named(rules, tree):
    """The names that the first of the rules takes."""
    return list(rk.Penalty({rules: L2, "*": None}).per_tensor(tree))


MAPPING = {
    "embed": np.ones((4, 3)),
    "attention": {"kernel": np.ones((2, 3, 4)), "bias": np.ones((2, 3))},
    "scale": np.ones(3),
    "temperature": np.ones(()),
}


def test_ranks_of_a_mapping():
    assert named("@rank>=2", MAPPING) == ["embed", "attention/kernel", "attention/bias"]
    assert named("@rank=3", MAPPING) == ["attention/kernel"]
    assert named("@rank<2", MAPPING) == ["scale", "temperature"]
    assert named("@rank<=0", MAPPING) == ["temperature"]
    assert named("@rank>1", MAPPING) == named("@rank>=2", MAPPING)
    assert named("@no_decay", MAPPING) == ["attention/bias", "scale", "temperature"]


def test_the_first_rule_counts():
    penalty = rk.Penalty({"@no_decay": None, "embed": rk.L1(1.0), "@rank>=2": L2})
    assert penalty(MAPPING) == 12.0 + 0.5 * 24
    bound = penalty.bind(MAPPING)
    assert bound.value() == penalty(MAPPING)
    assert penalty.unused(MAPPING) == []
    assert rk.Penalty({"@rank=7": None, "@rank=2": None, "x": None}).unused(MAPPING) == ["@rank=7", "x"]
    again = rk.Penalty.from_config(json.loads(json.dumps(penalty.get_config())))
    assert again(MAPPING) == penalty(MAPPING)
    with pytest.warns(UserWarning, match="rule '@rank=7' matches no name"):
        rk.Penalty({"@rank=7": L2, "*": None})(MAPPING)


@pytest.mark.parametrize("rule", ["@rank", "@rank~2", "@rank>=x", "@layer", "@layer=", "@nodecay", "@"])
def test_rules_that_are_none(rule):
    with pytest.raises(RuleError, match=r"expected '@rank>=2' .* or '@no_decay'"):
        rk.Penalty({rule: L2})
    assert named("[@]x", {"@x": np.ones(2), "x": np.ones(2)}) == ["@x"]


def test_modules_of_torch():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm((2, 6, 6)), nn.Flatten(), nn.Linear(72, 3))
    net = nn.DataParallel(net)
    assert named("@layer=Conv*", net) == ["0.weight", "0.bias"]
    assert named("@layer=Linear", {"net": net}) == ["net/3.weight", "net/3.bias"]
    assert named("@no_decay", net) == ["0.bias", "1.weight", "1.bias", "3.bias"]
    net.module[3].weight.requires_grad = False
    assert named("@rank>=2", net) == ["0.weight", "1.weight", "1.bias"]
    penalty = rk.Penalty({"@no_decay": None, "@layer=Conv*": L2, "*": None})
    compiled = torch.compile(lambda tree: penalty(tree) + 0.0, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(net), penalty(net))
    compiled(net).backward()
    assert net.module[0].weight.grad is not None
    assert net.module[0].bias.grad is None
    net.module[3].weight.requires_grad = True  # as it is when the graph is made anew
    penalty = rk.Penalty({"@no_decay": None, "@rank>=2": L2})
    torch.testing.assert_close(compiled(net), penalty(net))
    with pytest.raises(Exception, match=r"expected globs, or a module, where torch.compile traces"):
        compiled({"x": torch.ones(2)})


def test_modules_whose_class_was_replaced():
    """Parametrizations and fully_shard make classes of their own; rules mean those that the program wrote."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    from torch.nn.utils import parametrizations

    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), parametrizations.orthogonal(nn.Linear(4, 4)))
    names = ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    assert named("@layer=Linear", net) == [*names, "1.bias", "1.parametrizations.weight.original"]
    alone = parametrizations.weight_norm(nn.Conv1d(3, 4, 2))
    assert len(named("@layer=Conv1d", alone)) == 3
    assert rk.Penalty({"@layer=Par*": L2, "*": None}).unused(net) == ["@layer=Par*"]


def test_models_of_keras():
    keras = pytest.importorskip("keras")
    layers = keras.layers
    net = keras.Sequential([keras.Input((6, 4)), layers.LSTM(5)])
    net = keras.Sequential([keras.Input((6, 4)), net, layers.BatchNormalization(), layers.Dense(2)])
    assert [name.split("/")[-1] for name in named("@layer=LSTM*", net)] == ["kernel", "recurrent_kernel", "bias"]
    assert [name.split("/")[-1] for name in named("@no_decay", net)] == ["bias", "gamma", "beta", "bias"]
    assert [name.split("/")[-1] for name in named("@layer=*Norm*", net)] == ["gamma", "beta"]


def test_modules_of_jax():
    nnx, equinox, jax = (pytest.importorskip(name) for name in ("flax.nnx", "equinox", "jax"))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)

    assert named("@layer=Linear", Net(nnx.Rngs(0))) == ["dense/bias", "dense/kernel"]
    assert named("@no_decay", Net(nnx.Rngs(0))) == ["dense/bias", "norm/bias", "norm/scale"]
    net = equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    assert named("@layer=Linear", net) == [f"layers/{i}/{name}" for i in (0, 1) for name in ("weight", "bias")]
    assert named("@no_decay", {"net": net}) == ["net/layers/0/bias", "net/layers/1/bias"]
