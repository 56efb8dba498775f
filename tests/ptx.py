"""An interpreter of PTX: all threads of a grid in lock step by NumPy, those furthest behind first.

It runs what the compiler made of a kernel, over the host's own memory. Loads and stores are checked for alignment, and
for their bounds where `Memory` knows the arrays; barriers and shuffles for the threads that must take part; shared
memory for what was written before it is read. What it does not know raises NotImplementedError.
"""

import ctypes
import re
from collections import Counter
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.ptx_arithmetic import ARITHMETIC

WARP = 32
_FIRST = 1 << 12  # the lowest address; what lies below is never memory
_SPACE = np.frombuffer((ctypes.c_uint8 * ((1 << 47) - _FIRST)).from_address(_FIRST), np.uint8)
_TYPES = {f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)}
_TYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
_TYPES |= {f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
_TYPES |= {"bf16": np.dtype(ml_dtypes.bfloat16), "pred": np.dtype(bool)}


class DeviceError(RuntimeError):
    """What a device would answer with an error, or with what is not defined."""


class Memory:
    """The arrays that a kernel may reach.

    Args:
        arrays: what may be read and written; all memory of the process where it is None.
        read_only: what may only be read.
    """

    def __init__(self, arrays=None, read_only=()):
        self._writable, self._readable = (
            None if arrays is None else _regions(chosen) for chosen in (arrays, [*(arrays or ()), *read_only])
        )

    def load(self, address, dtype, count):
        """Return `count` elements for each address."""
        return self._elements(address, dtype, count, self._readable, "load")[_places(address, dtype, count)]

    def store(self, address, values):
        """Write a row of elements to each address."""
        dtype, count = values.dtype, values.shape[1]
        self._elements(address, dtype, count, self._writable, "store")[_places(address, dtype, count)] = values

    def _elements(self, address, dtype, count, regions, what):
        size = dtype.itemsize * count
        if (address % np.uint64(size)).any():
            raise DeviceError(f"a {what} of {size} bytes at an address that is not a multiple of them")
        if (address < _FIRST).any():
            raise DeviceError(f"a {what} by a null pointer")
        if regions is not None:
            starts, ends = regions
            region = np.searchsorted(starts, address, "right") - 1
            if (region < 0).any() or (address + np.uint64(size) > ends[region]).any():
                raise DeviceError(f"a {what} of {size} bytes out of bounds")
        return _SPACE.view(dtype)


def _regions(arrays):
    bounds = sorted(np.lib.array_utils.byte_bounds(each) for each in arrays if each.size)
    starts, ends = np.array(bounds, np.uint64).reshape(-1, 2).T
    return starts, np.maximum.accumulate(ends)


def _places(address, dtype, count):
    first = ((address - np.uint64(_FIRST)) // np.uint64(dtype.itemsize)).astype(np.int64)
    return first[:, None] + np.arange(count)


@dataclass(frozen=True)
class Instruction:
    """One statement: ``@guard operation.modifiers operands``."""

    text: str
    operation: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    unless: bool

    @property
    def type(self):
        """The last of the types that it names."""
        return self.modifiers[-1]


class Kernel:
    """A kernel's code, from its PTX."""

    def __init__(self, ptx):
        self.registers, self.shared, self.labels, self.code, self.shared_bytes = {}, {}, {}, [], 0
        ptx = re.sub(r"//[^\n]*", "", ptx)
        for align, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", ptx):
            self.shared[name] = -(-self.shared_bytes // int(align)) * int(align)
            self.shared_bytes = self.shared[name] + int(size)
        head, body = re.search(r"\.entry\s+\w+\((.*?)\)\s*(?:\.\w+[^{]*)?\{(.*)\}", ptx, re.DOTALL).groups()
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        body = re.sub(r"\{\s*((?:\.reg\s+\.\w+\s+%\w+;\s*)+)((?:[^{}]|\{[^{}]*\})*)\}", self._scope, body)
        for kind, prefix, count in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;", body):
            self.registers |= {f"{prefix}{i}": _TYPES[kind] for i in range(int(count))}
        for name, statement in re.findall(r"(\$\w+):|([^;{}\s](?:[^;{}]|\{[^;]*\})*;)", body):
            if name:
                self.labels[name] = len(self.code)
            elif not statement.startswith("."):
                self.code.append(_instruction(" ".join(statement.rstrip(";").split())))

    def _scope(self, found):
        """Give registers that are declared in a block of their own names that no others have."""
        text = found[2]
        for kind, name in re.findall(r"\.reg\s+\.(\w+)\s+%(\w+);", found[1]):
            own = f"%scope{found.start()}_{name}"
            self.registers[own] = _TYPES[kind]
            text = re.sub(rf"%{name}\b", own, text)
        return text


def _instruction(text):
    guard, rest = re.match(r"(?:@(!?%\w+)\s+)?(.*)", text).groups()
    name, _, operands = rest.partition(" ")
    operation, *modifiers = name.split(".")
    split = tuple(each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", operands))
    unless = guard is not None and guard.startswith("!")
    return Instruction(text, operation, tuple(modifiers), split, guard and guard.lstrip("!"), unless)


class Machine:
    """One launch of a kernel.

    Args:
        kernel: what runs.
        memory: what it may reach.
        blocks, threads: the grid.
        arguments: the parameters' values, addresses for pointers.

    Attributes:
        executed: how often each instruction ran, for all threads that were there together.
        last_block_first: whether the last of the blocks takes the first ticket, where they count who has come.
    """

    last_block_first = False

    def __init__(self, kernel, memory, blocks, threads, arguments):
        self.kernel, self.memory, self.blocks, self.threads = kernel, memory, blocks, threads
        self.parameters = dict(zip(kernel.parameters, arguments, strict=True))
        count = blocks * threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), blocks)
        self.block = np.repeat(np.arange(blocks, dtype=np.uint32), threads)
        self.special = {
            "%tid.x": self.thread,
            "%ctaid.x": self.block,
            "%ntid.x": np.full(count, threads, np.uint32),
            "%nctaid.x": np.full(count, blocks, np.uint32),
            "%laneid": self.thread % np.uint32(WARP),
        }
        self.registers = {}
        self.at = np.zeros(count, np.int64)  # the next instruction; beyond the last, the thread has ended
        self.waiting, self.vote = np.zeros((2, count), bool)
        self.shared = np.zeros((blocks, max(8, -(-kernel.shared_bytes // 8) * 8)), np.uint8)
        # Of each byte of shared memory: after how many barriers it was written and read last, and by which warp.
        self.barriers = np.ones(blocks, np.int64)
        self.wrote, self.read = (np.zeros((2, *self.shared.shape), np.int64) for _ in range(2))
        self.executed = Counter()

    def run(self):
        """Run all threads to their ends."""
        end = len(self.kernel.code)
        with np.errstate(all="ignore"):
            while (self.at < end).any():
                place = np.where(self.waiting, end, self.at)
                first = place.min()
                if first == end:
                    raise DeviceError("threads that wait at a barrier for ever")
                here = place == first
                self._step(self.kernel.code[first], slice(None) if here.all() else np.flatnonzero(here))
                self.executed[first] += 1

    def _step(self, instruction, active):
        self.at[active] += 1
        if instruction.guard is not None:
            taken = self.registers[instruction.guard][active] != instruction.unless
            if not taken.all():
                active = np.arange(len(self.at))[active][taken]
                if not len(active):
                    return
        if instruction.operation == "bra":
            self.at[active] = self.kernel.labels[instruction.operands[0]]
        elif instruction.operation in ("ret", "exit"):
            self.at[active] = len(self.kernel.code)
        elif instruction.operation in ("bar", "barrier"):
            self._barrier(instruction, active)
        elif instruction.operation in _SPECIAL:
            _SPECIAL[instruction.operation](self, instruction, active)
        elif instruction.operation in ARITHMETIC:
            self._arithmetic(instruction, active)
        else:
            raise NotImplementedError(instruction.text)

    def _arithmetic(self, instruction, active):
        target, *operands = instruction.operands
        kind = instruction.type
        values = [self.value(each, kind, active) for each in operands]
        self.set(target, active, ARITHMETIC[instruction.operation](_TYPES[kind], instruction.modifiers, *values))

    def _barrier(self, instruction, active):
        self.waiting[active] = True
        votes = instruction.modifiers == ("red", "or", "pred")
        if votes:
            self.vote[active] = self.value(instruction.operands[2], "pred", active)
        for block in np.unique(self.block[active]):
            threads = slice(block * self.threads, (block + 1) * self.threads)
            if self.waiting[threads].all():
                if np.ptp(self.at[threads]):
                    raise DeviceError("threads at different barriers")
                self.waiting[threads] = False
                self.barriers[block] += 1
                if votes:
                    self.set(instruction.operands[0], threads, np.full(self.threads, self.vote[threads].any()))
            elif (self.at[threads] == len(self.kernel.code)).any():
                raise DeviceError("a barrier without all threads")

    def value(self, operand, kind, active):
        """Return an operand's value in each active thread, or one for all."""
        dtype = _TYPES[kind]
        if operand.startswith("%"):
            stored = self.special.get(operand)
            stored = self.registers[operand] if stored is None else stored
            if stored.dtype.itemsize > dtype.itemsize:
                return stored[active].astype(f"u{dtype.itemsize}").view(dtype)
            return stored[active].view(dtype) if stored.dtype != dtype else stored[active]
        if operand[:2] in ("0d", "0f"):
            bits = {"d": np.uint64, "f": np.uint32}[operand[1]](int(operand[2:], 16))
            return bits.view({"d": np.float64, "f": np.float32}[operand[1]]).astype(dtype)
        number = self.kernel.shared[operand] if operand in self.kernel.shared else int(operand, 0)
        if kind == "pred":
            return np.bool_(number)
        bits = 8 * dtype.itemsize
        return np.array(number & ((1 << bits) - 1), f"u{dtype.itemsize}").view(dtype)[()]

    def set(self, register, active, values):
        """Write a register of the active threads."""
        register = register.split("|")[0]
        if register == "_":
            return
        stored = self.registers.get(register)
        if stored is None:
            stored = self.registers[register] = np.zeros(len(self.at), self.kernel.registers[register])
        values = np.asarray(values)
        if values.dtype.itemsize < stored.dtype.itemsize:
            values = values.astype(f"u{stored.dtype.itemsize}")  # a load of fewer bits than the register has
        stored[active] = values.view(stored.dtype) if values.dtype != stored.dtype else values

    def address(self, operand, active):
        """Return the address that ``[register+offset]`` names in each active thread."""
        base, sign, offset = re.fullmatch(r"\[([^\]+-]+)(?:\+?(-?)(\d+))?\]", operand).groups()
        start = np.broadcast_to(self.value(base.strip(), "u64", active), self.at[active].shape)
        return start + np.uint64(int(f"{sign or ''}{offset or 0}") & ((1 << 64) - 1))


def _vector(instruction, operand):
    count = next((int(each[1:]) for each in instruction.modifiers if each in ("v2", "v4")), 1)
    names = [each.strip() for each in operand.strip("{}").split(",")]
    assert len(names) == count
    return names


def _load(machine, instruction, active):
    target, source = instruction.operands
    dtype = _TYPES[instruction.type]
    if "param" in instruction.modifiers:
        value = machine.parameters[source.strip("[]")]
        machine.set(target, active, np.array(value, np.float64 if dtype.kind == "f" else np.int64).view(dtype))
        return
    names, address = _vector(instruction, target), machine.address(source, active)
    if "shared" in instruction.modifiers:
        block, places = _shared(machine, instruction, address, dtype.itemsize * len(names), active, machine.wrote)
        if not machine.wrote[0, block, places].all():
            raise DeviceError(f"shared memory that is read before it is written: {instruction.text}")
        values = machine.shared[block, places].view(dtype)
        _touch(machine, machine.read, block, places, active)
    else:
        values = machine.memory.load(address, dtype, len(names))
    for i, name in enumerate(names):
        machine.set(name, active, np.ascontiguousarray(values[:, i]))


def _store(machine, instruction, active):
    target, source = instruction.operands
    address, shape = machine.address(target, active), machine.at[active].shape
    columns = [machine.value(name, instruction.type, active) for name in _vector(instruction, source)]
    values = np.stack([np.broadcast_to(each, shape) for each in columns], axis=1)
    if "shared" in instruction.modifiers:
        size = values.itemsize * values.shape[1]
        for touched in (machine.wrote, machine.read):
            block, places = _shared(machine, instruction, address, size, active, touched)
        machine.shared[block, places] = np.ascontiguousarray(values).view(np.uint8)
        _touch(machine, machine.wrote, block, places, active)
    else:
        machine.memory.store(address, values)


def _warps(machine, active):
    return machine.thread[active][:, None] // np.uint32(WARP)


def _touch(machine, touched, block, places, active):
    touched[0, block, places], touched[1, block, places] = machine.barriers[block], _warps(machine, active)


def _shared(machine, instruction, address, size, active, touched):
    """Return where addresses lie in shared memory, of which no other warp may have touched any since a barrier."""
    if (address % np.uint64(size)).any() or (address + np.uint64(size) > machine.kernel.shared_bytes).any():
        raise DeviceError(f"not a place in shared memory: {instruction.text}")
    block, places = machine.block[active][:, None], address.astype(np.int64)[:, None] + np.arange(size)
    barriers, warp = touched[:, block, places]
    if ((barriers == machine.barriers[block]) & (warp != _warps(machine, active))).any():
        raise DeviceError(f"no barrier since another warp touched shared memory: {instruction.text}")
    return block, places


def _move(machine, instruction, active):
    target, source = instruction.operands
    kind = instruction.type
    if "{" not in instruction.text:
        machine.set(target, active, machine.value(source, kind, active))
        return
    half = {"b64": "b32", "b32": "b16"}[kind]
    bits = 4 * _TYPES[kind].itemsize
    if target.startswith("{"):
        value = machine.value(source, kind, active)
        for i, name in enumerate(target.strip("{}").split(",")):
            machine.set(name.strip(), active, (value >> np.array(bits * i, value.dtype)).astype(_TYPES[half]))
    else:
        low, high = (machine.value(each.strip(), half, active) for each in source.strip("{}").split(","))
        machine.set(target, active, low.astype(_TYPES[kind]) | high.astype(_TYPES[kind]) << bits)


def _convert(machine, instruction, active):
    *_, to, source = instruction.modifiers
    value = machine.value(instruction.operands[1], source, active)
    assert value.dtype.kind != "f" or _TYPES[to].kind != "i", "a rounding to integers"
    machine.set(instruction.operands[0], active, value.astype(_TYPES[to]))


def _compare(machine, instruction, active):
    target, left, right, *combined = instruction.operands
    relation, kind = instruction.modifiers[0], instruction.type
    x, y = machine.value(left, kind, active), machine.value(right, kind, active)
    names = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    names |= {"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "hi": np.greater}
    unordered = np.isnan(x) | np.isnan(y) if kind.startswith("f") else False
    if relation in ("nan", "num"):
        found = unordered if relation == "nan" else ~unordered
    else:
        found = names[relation[:2]](x, y) & ~np.asarray(unordered) | (unordered if len(relation) == 3 else False)
    if combined:
        other = machine.value(combined[0].lstrip("!"), "pred", active) != combined[0].startswith("!")
        found = {"and": np.logical_and, "or": np.logical_or}[instruction.modifiers[1]](found, other)
    machine.set(target, active, found)


def _select(machine, instruction, active):
    target, *values, condition = instruction.operands
    chosen = machine.value(condition, "pred", active)
    machine.set(target, active, np.where(chosen, *(machine.value(each, instruction.type, active) for each in values)))


def _shuffle(machine, instruction, active):
    assert instruction.modifiers == ("sync", "down", "b32"), instruction.text
    target, source, offset, bound, mask = instruction.operands
    for operand, expected in ((bound, WARP - 1), (mask, 0xFFFFFFFF)):
        assert (machine.value(operand, "u32", active) == expected).all(), instruction.text
    threads = np.arange(len(machine.at))[active]
    if (
        len(threads) % WARP
        or (threads.reshape(-1, WARP) != threads[::WARP, None] // WARP * WARP + np.arange(WARP)).any()
    ):
        raise DeviceError("a shuffle of a warp that is not whole")
    value = machine.value(source, "b32", active).reshape(-1, WARP)
    further = np.broadcast_to(machine.value(offset, "u32", active), value.size).reshape(-1, WARP).astype(np.int64)
    lanes = np.arange(WARP) + further
    lanes = np.where(lanes < WARP, lanes, np.arange(WARP))
    machine.set(target, active, np.take_along_axis(value, lanes, axis=1).ravel())


def _shift(machine, instruction, active):
    target, source, count = instruction.operands
    value = machine.value(source, instruction.type, active)
    bits = 8 * value.itemsize
    count = np.asarray(machine.value(count, "u32", active), np.int64)
    within = np.minimum(count, bits - 1).astype(value.dtype)
    shifted = value << within if instruction.operation == "shl" else value >> within
    filled = instruction.operation == "shr" and value.dtype.kind == "i"  # with the sign, however far
    machine.set(target, active, np.where((count < bits) | filled, shifted, value.dtype.type(0)))


def _insert_bits(machine, instruction, active):
    target, field_, whole, start, length = instruction.operands
    bits, whole = (machine.value(each, instruction.type, active) for each in (field_, whole))
    mask = whole.dtype.type(((1 << int(length)) - 1) << int(start))
    machine.set(target, active, whole & ~mask | bits << whole.dtype.type(int(start)) & mask)


def _take_ticket(machine, instruction, active):
    """Count up at one address, one thread after the other, and start again after a bound."""
    assert instruction.modifiers == ("acq_rel", "gpu", "global", "inc", "u32"), instruction.text
    target, source, bound = instruction.operands
    address, dtype, before = machine.address(source, active), np.dtype(np.uint32), []
    bounds = np.broadcast_to(machine.value(bound, "u32", active), address.shape)
    order = slice(None, None, -1) if machine.last_block_first else slice(None)
    for each, last in zip(address[order, None], bounds[order], strict=True):
        found = machine.memory.load(each, dtype, 1)
        machine.memory.store(each, np.where(found >= last, dtype.type(0), found + dtype.type(1)))
        before.append(found[0, 0])
    machine.set(target, active, np.array(before, dtype)[order])


_SPECIAL = {
    "atom": _take_ticket,
    "ld": _load,
    "st": _store,
    "mov": _move,
    "cvt": _convert,
    "setp": _compare,
    "selp": _select,
}
_SPECIAL |= {"shfl": _shuffle, "shl": _shift, "shr": _shift, "bfi": _insert_bits}
