"""Panels: matrices widened, normalised and laid out as the micro kernel reads them, and back."""

from llvmlite import ir
from numba.core import cgutils

from regkern.kernels.cpu.compile import inlined, part
from regkern.kernels.cpu.gram import workspace as ws
from regkern.kernels.cpu.gram.vectors import COVARIANCE, DOUBLE, I64, RAW, emitter
from regkern.kernels.cpu.words import load_words


@inlined
def _vector_blocks(rows, d, row_stride, depth_stride, w, item):
    """How many rows, and what of their depth, move by vectors of w entries of `item` bytes; the rest moves singly."""
    if depth_stride == item:
        return rows // w * w, d // w * w
    if row_stride == item:
        return rows // w * w, d
    return 0, 0


def make_pack_panel(vec, nr, mr):
    """Make ``pack_panel(x, rows, d, row_stride, depth_stride, panel, scales)``."""
    w, size, item = vec.lanes, vec.size, vec.stored_size
    step = max(w, mr)  # both are powers of two
    pack_block, pack_lanes, pack_row = _pack_block(vec, nr), _pack_strided(vec, nr, True), _pack_strided(vec, nr, False)
    zero_row, normalise = _zero_row(vec, nr), _normalise(vec, nr)

    @part
    def pack_panel(x, rows, d, row_stride, depth_stride, panel, scales):
        """Widen, transpose and normalise up to NR rows at address x into the panel at address panel.

        Missing rows are zero up to a whole vector and, for the left operand, a whole tile; further ones are left as
        they are.
        """
        full, whole = _vector_blocks(rows, d, row_stride, depth_stride, w, item)
        for r in range(0, full, w):
            source, target = x + r * row_stride, panel + r * size
            if depth_stride == item:
                for k in range(0, whole, w):
                    pack_block(source + k * item, row_stride, target + k * nr * size)
            else:
                pack_lanes(source, depth_stride, d, target)
        for r in range(rows):
            k = whole if r < full else 0
            if k < d:
                pack_row(x + r * row_stride + k * depth_stride, depth_stride, d - k, panel + (k * nr + r) * size)
        vectors = (rows + w - 1) // w
        for r in range(rows, (rows + step - 1) // step * step):
            zero_row(d, panel + r * size)
        normalise(panel, vectors, d, scales)

    return pack_panel


def make_pack(vec, tile):
    """Make the task that packs panels; those of a gradient are whole, zeros included, and so are its products."""
    nr, size = tile.vectors * vec.lanes, vec.size
    pack_panel = make_pack_panel(vec, nr, tile.mr)

    def pack(job, worker, first, last):
        x, n, d, row_stride, depth_stride, panels, scales, products = load_words(job + ws.MATRIX, 8)
        panel = nr * d * size
        for p in range(first, last):
            if products != 0:
                ws.zero(panels + p * panel, panel)
                ws.zero(products + p * panel, panel)
            rows, source = min(nr, n - p * nr), x + p * nr * row_stride
            pack_panel(source, rows, d, row_stride, depth_stride, panels + p * panel, scales + p * 2 * nr * size)
        return 0

    return pack


def make_unpack_panel(vec, nr):
    """Make ``unpack_panel(panel, rows, d, out, row_stride, depth_stride, accumulate)``."""
    w, size, item = vec.lanes, vec.size, vec.stored_size
    unpack_block = _unpack_block(vec, nr)
    unpack_lanes, unpack_row = _unpack_strided(vec, nr, True), _unpack_strided(vec, nr, False)

    @part
    def unpack_panel(panel, rows, d, out, row_stride, depth_stride, accumulate):
        """The inverse of `pack_panel`, without the scales."""
        full, whole = _vector_blocks(rows, d, row_stride, depth_stride, w, item)
        for r in range(0, full, w):
            source, target = panel + r * size, out + r * row_stride
            if depth_stride == item:
                for k in range(0, whole, w):
                    unpack_block(source + k * nr * size, target + k * item, row_stride, accumulate)
            else:
                unpack_lanes(source, d, target, depth_stride, accumulate)
        for r in range(rows):
            k = whole if r < full else 0
            if k < d:
                target = out + r * row_stride + k * depth_stride
                unpack_row(panel + (k * nr + r) * size, d - k, target, depth_stride, accumulate)

    return unpack_panel


def _pack_block(vec, nr):
    """Pack lanes x lanes entries, contiguous along the depth, into a panel: ``(x, row_stride, panel)``."""

    def body(b, x, row_stride, panel):
        rows = [vec.load_stored(b, b.add(x, b.mul(row_stride, I64(r))), True) for r in range(vec.lanes)]
        for k, v in enumerate(vec.transpose(b, rows)):
            vec.store(b, v, panel, k * nr * vec.size)

    return emitter(f"gram_pack_block_{vec.tag}", ir.VoidType(), 3, body)


def _pack_strided(vec, nr, vector):
    """Pack one row, or one vector of neighbouring rows, at each depth: ``(x, depth_stride, depth, panel)``."""

    def body(b, x, depth_stride, depth, panel):
        with cgutils.for_range(b, depth) as k:
            v = vec.load_stored(b, b.add(x, b.mul(depth_stride, k.index)), vector)
            vec.store(b, v, b.add(panel, b.mul(k.index, I64(nr * vec.size))))

    return emitter(f"gram_pack_{'lanes' if vector else 'row'}_{vec.tag}", ir.VoidType(), 4, body)


def _zero_row(vec, nr):
    """A row of padding: ``(depth, panel)``."""

    def body(b, depth, panel):
        with cgutils.for_range(b, depth) as k:
            vec.store(b, vec.scalar(0.0), b.add(panel, b.mul(k.index, I64(nr * vec.size))))

    return emitter(f"gram_zero_row_{vec.tag}", ir.VoidType(), 2, body)


def _normalise(vec, nr):
    """Scale a panel's first rows to unit length in place, or centre them: ``(panel, vectors, depth, scales)``.

    x / |x| is taken in two products, (x * before) * after. `before` is a power of two, other than 1 only for rows so
    large or small that a square, a norm or its inverse would leave the accumulator's range; `after` is the inverse norm
    of x * before, and 0 for a zero row. Both go to scales[0 : NR] and scales[NR : 2 NR], where the gradient finds them.
    """
    # float32 squares are summed in float64 and only |x| and 1 / |x| must fit; float64 squares must fit as well.
    edge, shift = (2.0**480, 2.0**600) if vec.size == 8 else (2.0**100, 2.0**100)
    row, width = nr * vec.size, vec.size * vec.lanes
    one, wide_zero = vec.constant(1.0), vec.constant(0.0, vec.wide)

    def body(b, panel, vectors, depth, scales):
        with cgutils.for_range(b, vectors) as vector:
            column = b.add(panel, b.mul(vector.index, I64(width)))

            def steps():
                return cgutils.for_range(b, depth)

            def at(k):
                return b.add(column, b.mul(k.index, I64(row)))

            if vec.fold == COVARIANCE:
                (total,) = vec.zeros(b, 1, vec.wide)
                with steps() as k:
                    b.store(b.fadd(b.load(total), vec.widest(b, vec.load(b, at(k)))), total)
                mean = b.fdiv(b.load(total), vec.splat(b, b.sitofp(depth, DOUBLE)))
                with steps() as k:
                    centred = b.fsub(vec.widest(b, vec.load(b, at(k))), mean)
                    vec.store(b, centred if vec.size == 8 else b.fptrunc(centred, vec.type), at(k))
                return
            (largest,), (squares,) = vec.zeros(b, 1), vec.zeros(b, 1, vec.wide)
            with steps() as k:
                v = vec.call(b, "fabs", vec.load(b, at(k)))
                b.store(b.select(b.fcmp_ordered(">", v, b.load(largest)), v, b.load(largest)), largest)
            largest = b.load(largest)
            before = b.select(b.fcmp_ordered("<", largest, vec.constant(1 / edge)), vec.constant(shift), one)
            before = b.select(b.fcmp_ordered(">", largest, vec.constant(edge)), vec.constant(1 / shift), before)
            before = one if vec.fold == RAW else before
            with steps() as k:
                v = vec.widest(b, b.fmul(vec.load(b, at(k)), before))
                b.store(vec.call(b, "fmuladd", v, v, b.load(squares)), squares)
            squares = b.load(squares)
            after = b.fdiv(vec.constant(1.0, vec.wide), vec.call(b, "sqrt", squares))
            after = b.select(b.fcmp_ordered("==", squares, wide_zero), wide_zero, after)
            after = after if vec.size == 8 else b.fptrunc(after, vec.type)
            if vec.fold == RAW:  # rows stay, and their squares are found in the place of the second part
                after = squares if vec.size == 8 else b.fptrunc(squares, vec.type)
            else:
                with steps() as k:
                    vec.store(b, b.fmul(b.fmul(vec.load(b, at(k)), before), after), at(k))
            place = b.add(scales, b.mul(vector.index, I64(width)))
            vec.store(b, before, place)
            vec.store(b, after, place, row)

    return emitter(f"gram_normalise_{vec.tag}", ir.VoidType(), 4, body)


def project_ir(vec, vectors):
    """Turn a panel of v into the gradient, in place: ``(v, u, depth, scales, factor)``.

    factor * (v - (v . u) u) / |x|, with 1 / |x| in the two parts that `_normalise` left in scales; of rows that are no
    unit rows, factor * v. (Sums of centred rows are centred.)
    """
    width = vec.size * vec.lanes

    def body(b, v, u, depth, scales, factor):
        dots = vec.zeros(b, vectors, vec.wide)

        def load(k, j, panel):
            return vec.widest(b, vec.load(b, b.add(panel, b.mul(k.index, I64(vectors * width))), j * width))

        with cgutils.for_range(b, depth) as k:
            for j, cell in enumerate(dots):
                b.store(vec.call(b, "fmuladd", load(k, j, v), load(k, j, u), b.load(cell)), cell)
        factor = vec.splat(b, factor)
        with cgutils.for_range(b, depth) as k:
            for j, cell in enumerate(dots):
                rest = load(k, j, v)
                if vec.unit:
                    rest = b.fsub(rest, b.fmul(b.load(cell), load(k, j, u)))
                    for part in (j + vectors, j):
                        rest = b.fmul(rest, vec.widest(b, vec.load(b, scales, part * width)))
                rest = b.fmul(rest, factor)
                rest = rest if vec.size == 8 else b.fptrunc(rest, vec.type)
                vec.store(b, rest, b.add(v, b.mul(k.index, I64(vectors * width))), j * width)

    return emitter(f"gram_project_{vec.tag}", ir.VoidType(), 4, body, floats=1)


def _unpack_block(vec, nr):
    """Unpack lanes x lanes entries to rows contiguous along the depth: ``(panel, out, row_stride, accumulate)``."""

    def body(b, panel, out, row_stride, accumulate):
        accumulate = b.icmp_signed("!=", accumulate, I64(0))
        columns = [vec.load(b, panel, k * nr * vec.size) for k in range(vec.lanes)]
        for r, v in enumerate(vec.transpose(b, columns)):
            vec.add_stored(b, v, b.add(out, b.mul(row_stride, I64(r))), accumulate)

    return emitter(f"gram_unpack_block_{vec.tag}", ir.VoidType(), 4, body)


def _unpack_strided(vec, nr, vector):
    """One row, or one vector of neighbouring rows, at each depth: ``(panel, depth, out, depth_stride, accumulate)``."""

    def body(b, panel, depth, out, depth_stride, accumulate):
        accumulate = b.icmp_signed("!=", accumulate, I64(0))
        with cgutils.for_range(b, depth) as k:
            place = b.add(panel, b.mul(k.index, I64(nr * vec.size)))
            v = vec.load(b, place, 0, vec.type if vector else vec.scalar)
            vec.add_stored(b, v, b.add(out, b.mul(depth_stride, k.index)), accumulate)

    return emitter(f"gram_unpack_{'lanes' if vector else 'row'}_{vec.tag}", ir.VoidType(), 5, body)
