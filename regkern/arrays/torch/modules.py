"""What PyTorch's modules train, and what tells whether that is the same still."""

from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter

from torch import Tensor
from torch.nn import DataParallel, Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# What wrappers call the module inside: names that are nobody's else, those of `torch.compile`, FSDP, activation
# checkpoints and Fabric; and names that a program's own modules may have as well.
_INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_INNER_OR_OWN = {"module", "_module"}
_WRAPPERS = DataParallel, DistributedDataParallel, AveragedModel

_CONTENTS = attrgetter("_parameters", "_modules")
_REQUIRES_GRAD = attrgetter("requires_grad")


def trained(model: Module) -> list[tuple[str, Tensor]]:
    """Return the parameters that require a gradient, by their names in the module that wrappers have inside.

    A plain tensor in a parameter's place, as `torch.func.functional_call` puts it there, is trained by its caller.
    """
    named = [(name, x) for name, x in model.named_parameters() if x.requires_grad or not isinstance(x, Parameter)]
    if any(part in _INNER or part in _INNER_OR_OWN for name, _ in named for part in name.split(".")):
        wrapped = _wrapped(model)
        named = [(_without(wrapped, name), x) for name, x in named]
    return named


def _wrapped(model: Module) -> set[str]:
    """Return the paths of modules that are the inside of a wrapper.

    An only child that is called "module" is that from the root on down to the first module that has more: other
    libraries' wrappers look so.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wrapped = {""}
    for path in list(modules)[1:]:  # parents come first
        parent, _, own = path.rpartition(".")
        outer = modules[parent]
        if own in _INNER or (own in _INNER_OR_OWN and (isinstance(outer, _WRAPPERS) or _only(outer, parent, wrapped))):
            wrapped.add(path)
    return wrapped


def _only(outer: Module, path: str, wrapped: set[str]) -> bool:
    parts = path.split(".") if path else []
    from_root = all(".".join(parts[: i + 1]) in wrapped for i in range(len(parts)))
    return from_root and len(outer._modules) == 1 and not outer._parameters


def _without(wrapped: set[str], name: str) -> str:
    """Return a parameter's name without the parts that stand for the inside of a wrapper."""
    *parts, last = name.split(".")
    kept = [part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped]
    return ".".join([*kept, last])


def look(model: Module) -> Callable[[], Iterable[object]]:
    """Return a function that gives what tells whether `trained` would yield the same parameters.

    That is what each module holds, and which parameters require a gradient: a fifth of the time that `trained` takes.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    if not all(type(each) is dict for module in modules for each in _CONTENTS(module)):  # of TorchScript
        return lambda: [x for _, x in trained(model)]

    def held() -> Iterable[object]:
        contents = map(dict.values, chain.from_iterable(map(_CONTENTS, modules)))
        return chain(chain.from_iterable(contents), map(_REQUIRES_GRAD, parameters))

    return held
