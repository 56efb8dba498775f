"""Weights that a layer makes of what is trained: parametrized, pruned and adapted ones.

Rules and `prox_` mean what is trained; a penalty of the weight that the layer multiplies by is one of a mapping.
"""

import numpy as np
import pytest

import regkern as rk

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

RULES = {"*bias": None, "*": rk.L2(0.5)}


def l2(*arrays):
    return sum(0.5 * float(np.square(x.detach().numpy().astype(np.float64)).sum()) for x in arrays)


def number(x):
    return x.detach().item()


def test_a_parametrized_weight():
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(5, 3))
    originals = [layer.parametrizations.weight.original0, layer.parametrizations.weight.original1]
    assert number(rk.Penalty(RULES)(layer)) == pytest.approx(l2(*originals))
    effective = rk.Penalty({"*": rk.L1(0.1)})({"weight": layer.weight})
    assert number(effective) == pytest.approx(0.1 * number(layer.weight.detach().abs().sum()))
    effective.backward()
    found = [x.grad.clone() for x in originals]
    for x in originals:
        x.grad = None
    (0.1 * layer.weight.abs().sum()).backward()
    for x, gradient in zip(originals, found, strict=True):
        torch.testing.assert_close(x.grad, gradient)


def test_a_pruned_weight():
    """The original keeps the elements that are masked: a penalty of it counts what the layer does not read."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    assert list(rk.Penalty(RULES).per_tensor(layer)) == ["weight_orig"]
    masked = layer.weight_orig * layer.weight_mask
    effective = rk.Penalty(RULES)({"weight": masked})
    assert number(effective) == pytest.approx(l2(masked))
    assert number(effective) < number(rk.Penalty(RULES)(layer))
    effective.backward()
    torch.testing.assert_close(layer.weight_orig.grad, masked.detach())
    prune.remove(layer, "weight")
    assert number(rk.Penalty(RULES)(layer)) == pytest.approx(number(effective))


class LowRank(nn.Module):
    """``W + B A``, of which B and A are trained."""

    def __init__(self, rows, columns, rank):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rank, columns)), nn.Parameter(torch.randn(rows, rank))

    def forward(self, weight):
        return weight + self.b @ self.a


def test_an_adapted_weight():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", LowRank(4, 6, 2))
    layer.parametrizations.weight.original.requires_grad = False
    adapter = layer.parametrizations.weight[0]
    penalty = rk.Penalty(RULES)
    assert list(penalty.per_tensor(layer)) == ["parametrizations.weight.0.a", "parametrizations.weight.0.b"]
    assert number(penalty(layer)) == pytest.approx(l2(adapter.a, adapter.b))
    update = rk.Penalty({"*": rk.L2(0.5)})({"update": adapter.b @ adapter.a})
    assert number(update) == pytest.approx(l2(adapter.b @ adapter.a))
    update.backward()
    torch.testing.assert_close(adapter.a.grad, adapter.b.T @ (adapter.b @ adapter.a))
    whole = rk.Penalty({"*": rk.L2(0.5)})({"weight": layer.weight})
    assert number(whole) == pytest.approx(l2(layer.weight))


@pytest.mark.slow
def test_an_adapted_module_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
    names = [f"base_model.model.0.lora_{each}.default.weight" for each in "AB"]
    assert list(rk.Penalty({"*lora_*": rk.L2(0.5), "*": None}).per_tensor(net)) == names
    assert list(rk.Penalty({"@layer=Linear": rk.L2(0.5)}).per_tensor(net)) == names
    layer = net.base_model.model[0]
    update = layer.get_delta_weight("default")
    assert number(rk.Penalty({"*": rk.L2(0.5)})({"update": update})) == pytest.approx(l2(update))
