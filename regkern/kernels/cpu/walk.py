"""How runs, which know elements that follow each other, go over memory of any layout.

Long rows are visited where they lie. Elements that are some bytes apart, and those of short rows, are copied together
first, and what is written there is copied back: as fast as scalar code on them in place, and one function for all
formulas and dtypes of a size.
"""

import functools

from numba import types

from regkern.kernels.cpu import team
from regkern.kernels.cpu.compile import compile_function, inlined, make_call
from regkern.kernels.cpu.lanes import LANES, stack
from regkern.kernels.cpu.words import (
    load_byte,
    load_int,
    load_short,
    load_word,
    load_words,
    store_byte,
    store_int,
    store_short,
    store_word,
)

_INT, PARAMETERS = types.intp, types.UniTuple(types.float64, 4)
# A run over n elements: addresses of x and of out, n, the parameters, the first element's lane, the lanes' address.
RUN = _INT(_INT, _INT, _INT, *PARAMETERS, _INT, _INT)
# A run over n elements of an array: what describes the run; x, out, the layout and its dimensions; which of its
# elements is the first, and n; the parameters; the lanes' address, of which the first element takes the first.
WALK = _INT(*[_INT] * 7, *PARAMETERS, _INT)
call_run, _call_walk = make_call(RUN), make_call(WALK)

# What a run does with out: nothing, write, write where x is, read and write. The last two bring the address of what
# walks: over more operands than x, and over a strip of groups for each chunk.
READS, WRITES, IN_PLACE, ADDS, ANCHORED, GROUPS = range(6)
# Elements that are copied at once, a multiple of LANES.
PACK = 1 << 10
# Elements of rows that are visited where they lie: shorter ones take longer than a copy (measured on Ice Lake).
ROW = 1 << 6
_PLACE, _BYTES = 8 * PACK, 16 * PACK


@inlined
def count_rows(layout, dims):
    """Count the innermost loops of a layout."""
    rows, axis = 1, 0
    while axis < dims - 1:
        rows *= load_word(layout + 8 * axis)
        axis += 1
    return rows


@inlined
def row_offsets(layout, dims, row):
    """Byte offsets, in x and in out, of one run: `row` counts all but the last dimension in C order."""
    x_offset = out_offset = 0
    axis = dims - 2
    while axis >= 0:
        at = layout + 8 * axis
        outer = row // load_word(at) if axis > 0 else 0  # a division takes longer than a short row of a matrix
        index = row - outer * load_word(at)
        x_offset += index * load_word(at + 8 * dims)
        out_offset += index * load_word(at + 16 * dims)
        row = outer
        axis -= 1
    return x_offset, out_offset


@inlined
def _copy(source, source_stride, target, target_stride, n, itemsize):
    """Copy n elements from some bytes apart to others."""
    if itemsize == 4 and source_stride == 8:  # every second one, or real parts: LLVM makes vector code of it
        for i in range(n):
            store_int(target + 4 * i, load_int(source + 8 * i))
    elif itemsize == 4:
        for _ in range(n):
            store_int(target, load_int(source))
            source += source_stride
            target += target_stride
    elif itemsize == 8:
        for _ in range(n):
            store_word(target, load_word(source))
            source += source_stride
            target += target_stride
    elif itemsize == 1:
        for _ in range(n):
            store_byte(target, load_byte(source))
            source += source_stride
            target += target_stride
    else:
        for _ in range(n):
            store_short(target, load_short(source))
            source += source_stride
            target += target_stride


@inlined
def pack(array, out, layout, dims, first, n, packed, itemsize, back):
    """Copy n elements of an array, which is x or out, from the first on, or back to there."""
    length = load_word(layout + 8 * (dims - 1))
    stride = load_word(layout + 8 * (dims - 1) + 8 * dims * (2 if out else 1))
    row = first // length
    start = first - row * length
    while n > 0:
        x_offset, out_offset = row_offsets(layout, dims, row)
        place = array + (out_offset if out else x_offset) + start * stride
        count = length - start if length - start < n else n
        if back:
            _copy(packed, itemsize, place, stride, count, itemsize)
        else:
            _copy(place, stride, packed, itemsize, count, itemsize)
        packed += count * itemsize
        n -= count
        row += 1
        start = 0


def _walk(run, x, out, layout, dims, first, n, p0, p1, p2, p3, lanes):
    p = (p0, p1, p2, p3)
    function, itemsize, kind = load_words(run, 3)
    if kind >= ANCHORED:
        return _call_walk(load_word(run + 24), (run, x, out, layout, dims, first, n, *p, lanes))
    last = layout + 8 * (dims - 1)
    length, x_stride, out_stride = load_word(last), load_word(last + 8 * dims), load_word(last + 16 * dims)
    done = 0
    if x_stride == itemsize and (out_stride == itemsize or kind == READS) and length >= ROW:
        row = first // length
        start = first - row * length
        while done < n:
            x_offset, out_offset = row_offsets(layout, dims, row)
            source, target = x + x_offset + start * itemsize, out + out_offset + start * itemsize
            count = length - start if length - start < n - done else n - done
            call_run(function, (source, target, count, *p, done % LANES, lanes))
            done += count
            row += 1
            start = 0
        return 0
    packed = stack(_BYTES)
    target = packed if kind == IN_PLACE else packed + _PLACE
    while done < n:
        count = n - done if n - done < PACK else PACK
        pack(x, False, layout, dims, first + done, count, packed, itemsize, False)
        if kind == ADDS:
            pack(out, True, layout, dims, first + done, count, target, itemsize, False)
        call_run(function, (packed, target, count, *p, 0, lanes))
        if kind != READS:
            pack(out, True, layout, dims, first + done, count, target, itemsize, True)
        done += count
    return 0


@functools.cache
def load_walk() -> int:
    """Load the function that walks."""
    address = compile_function(_walk, WALK, "walk")
    team.set_word(team.WALK, address)
    return address


@inlined
def walk(run, x, out, layout, dims, first, n, p, lanes):
    """Run over n elements of an array in the order of its layout, from one of them on."""
    itemsize = load_word(run + 8)
    flat = dims == 1 and load_word(layout + 8) == itemsize
    if flat and (load_word(layout + 16) == itemsize or load_word(run + 16) == READS):
        call_run(load_word(run), (x + first * itemsize, out + first * itemsize, n, *p, 0, lanes))
    else:
        function = load_word(team.address() + team.WALK)
        _call_walk(function, (run, x, out, layout, dims, first, n, *p, lanes))
