"""What is in a module of PyTorch: what is trained, under the names of the module that wrappers have inside."""

import copy
import re

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel

import regkern as rk
from tests.test_penalty_torch import PENALTY, small, twice


def frozen():
    model = small()
    model[0].requires_grad_(False)
    return model


def test_frozen_parameters_are_no_part_of_a_model():
    model = frozen()
    assert list(PENALTY.per_tensor(model)) == ["2.weight", "2.bias"]
    expected = 0.5 * sum(x.square().sum() for x in model[2].parameters())
    assert PENALTY(model).item() == PENALTY.bind(model).value().item() == pytest.approx(expected.item(), rel=1e-6)
    before = [x.clone() for x in model.parameters()]
    PENALTY.bind(model).prox_(0.5)
    assert [x.equal(old) for x, old in zip(model.parameters(), before, strict=True)] == [True, True, False, False]
    rest = dict(model.named_parameters())  # of a mapping, its maker says what is in it
    assert list(PENALTY.per_tensor(rest)) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_model_of_frozen_parameters_alone():
    model = frozen()[0]
    with pytest.warns(UserWarning, match="there is no tensor, or none that is trained; no penalty is given"):
        assert rk.Penalty({"*": "l2"})(model) == 0.0


def test_thawed_parameters_are_noticed():
    model = frozen()
    bound = PENALTY.bind(model)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^0\.weight: .* got a new one, or one that is trained now"):
        bound.value()


def test_tensors_that_take_the_parameters_place_in_a_call():
    """They are plain: whether they require a gradient is the caller's affair."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self):
            return PENALTY(self.model)

    loss = Loss()
    values = {name: 2 * x.detach() for name, x in loss.named_parameters()}
    right = PENALTY(values)
    torch.testing.assert_close(torch.func.functional_call(loss, values, ()), right)
    gradients = torch.func.grad(lambda values: torch.func.functional_call(loss, values, ()))(values)
    for name, x in values.items():
        torch.testing.assert_close(gradients[name], x)


class Average(nn.Module):
    """As other libraries wrap a model."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.register_buffer("decay", torch.tensor(0.9))


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "another library's": Average,
    "checkpoint": checkpoint_wrapper,
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "DataParallel of a compiled one": lambda model: nn.DataParallel(compiled(model)),
    "averages of averages of a compiled one": lambda model: Average(AveragedModel(compiled(model))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_module_inside(wrapper):
    rules = {"0.*": rk.L2(0.1), "2.weight": rk.L1(0.1), "*": None}
    model, penalty = small(), rk.Penalty(rules)
    wrapped = WRAPPERS[wrapper](model)
    assert penalty.per_tensor(wrapped) == penalty.per_tensor(model)
    assert list(PENALTY.per_tensor(wrapped)) == [name for name, _ in model.named_parameters()]
    assert penalty(wrapped).item() == penalty.bind(wrapped).value().item() == penalty(model).item()
    parts = nn.ModuleDict({"a": wrapped, "b": nn.Linear(2, 2)})
    if wrapper != "another library's" and not wrapper.startswith("averages"):
        assert list(PENALTY.per_tensor(parts))[:2] == ["a.0.weight", "a.0.bias"]
    bound = penalty.bind(wrapped)
    wrapped.load_state_dict(twice(wrapped), assign=True)
    with pytest.raises(RuntimeError, match=r"^0\.weight: expected what was bound"):
        bound.value()


def test_a_module_of_ones_own_that_is_called_module():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    names = [name for name, _ in Own().named_parameters()]
    assert names[0] == "module.weight"
    assert list(PENALTY.per_tensor(Own())) == names
    assert list(PENALTY.per_tensor(nn.Sequential(Own()))) == [f"0.{name}" for name in names]
    assert list(PENALTY.per_tensor(Average(Own()))) == names

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2, bias=False)

    assert list(PENALTY.per_tensor(nn.Sequential(Block(), Block()))) == ["0.module.weight", "1.module.weight"]


def test_modules_in_a_mapping():
    tree = {"encoder": small(), "heads": [nn.Linear(2, 2, bias=False), nn.DataParallel(nn.Linear(2, 2, bias=False))]}
    names = [f"encoder/{name}" for name, _ in small().named_parameters()] + ["heads/0/weight", "heads/1/weight"]
    assert list(PENALTY.per_tensor(tree)) == names
    bound = PENALTY.bind(tree)
    assert bound.value().item() == pytest.approx(PENALTY(tree).item())
    tree["heads"][1].module.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"^heads/1/weight: expected what was bound"):
        bound.value()


def test_state_dicts_keep_their_names():
    state = compiled(small()).state_dict()
    penalty = rk.Penalty({"0.*": "l2", "*": None})
    with pytest.warns(UserWarning, match=re.escape("the nearest are '_orig_mod.0.weight', '_orig_mod.0.bias'.")):
        assert penalty(state) == 0.0


@pytest.fixture
def group_of_one():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    return fully_shard(
        [fully_shard(layer, mesh=mesh) for layer in model if list(layer.parameters())] and model, mesh=mesh
    )


SHARED = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp2": sharded,
}


@pytest.mark.filterwarnings("ignore")  # of the wrappers' own
@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("wrapper", SHARED)
def test_modules_that_processes_share(wrapper):
    model = small()
    names, right, bound = [name for name, _ in model.named_parameters()], PENALTY(model).item(), PENALTY.bind(model)
    wrapped = SHARED[wrapper](model)
    assert list(PENALTY.per_tensor(wrapped)) == names
    assert PENALTY(wrapped).item() == pytest.approx(right, rel=1e-5)
    assert PENALTY.bind(wrapped).value().item() == pytest.approx(right, rel=1e-5)
    try:
        found = bound.value().item()
    except RuntimeError as error:
        found = str(error)
    # Another parameter, or the same at another place, or as it was.
    assert found == pytest.approx(right, rel=1e-5) or "bind the penalty again" in found
