"""The micro kernel, and what is done with a finished tile of dot products."""

from llvmlite import ir
from numba.core import cgutils

from regkern.kernels.cpu.gram.vectors import ABS, DOUBLE, I64, RAW, emitter


def micro_kernel_ir(vec, rows, vectors, nr, a_row, a_step):
    """Multiply into rows x vectors accumulators: ``(panels, jump, a, b, k, c, accumulate, keep) -> float64``.

    The depth is `panels` times k steps; the left operand goes on `jump` bytes further in each panel, the right one is
    contiguous. a_row and a_step are the left operand's strides in entries; the right operand and c have rows of nr
    entries. accumulate adds the tile at c; keep stores the tile there and returns 0, otherwise its absolute sum
    returns.
    """
    size, width = vec.size, vec.size * vec.lanes

    def body(b, panels, jump, a, right, k, c, accumulate, keep):
        acc = vec.zeros(b, rows * vectors)
        places = [r * nr * size + j * width for r in range(rows) for j in range(vectors)]
        with b.if_then(b.icmp_signed("!=", accumulate, I64(0))):
            for place in places:  # here long before its use, as in BLIS
                vec.prefetch(b, b.add(c, I64(place)))
        with cgutils.for_range(b, panels) as panel:
            a_panel = b.add(a, b.mul(panel.index, jump))
            b_panel = b.add(right, b.mul(b.mul(panel.index, k), I64(nr * size)))
            with cgutils.for_range(b, k) as step:
                a_k = b.add(a_panel, b.mul(step.index, I64(a_step * size)))
                b_k = b.add(b_panel, b.mul(step.index, I64(nr * size)))
                columns = [vec.load(b, b_k, j * width) for j in range(vectors)]
                for r in range(rows):
                    entry = vec.splat(b, vec.load(b, a_k, r * a_row * size, vec.scalar))
                    for j, column in enumerate(columns):
                        cell = acc[r * vectors + j]
                        b.store(vec.call(b, "fmuladd", entry, column, b.load(cell)), cell)
        with b.if_then(b.icmp_signed("!=", accumulate, I64(0))):
            for cell, place in zip(acc, places, strict=True):
                b.store(b.fadd(b.load(cell), vec.load(b, c, place)), cell)
        result = cgutils.alloca_once_value(b, DOUBLE(0.0))
        with b.if_else(b.icmp_signed("!=", keep, I64(0))) as (then, otherwise):
            with then:
                for cell, place in zip(acc, places, strict=True):
                    vec.store(b, b.load(cell), c, place)
            with otherwise:
                b.store(vec.total(b, [vec.folded(b, b.load(cell)) for cell in acc]), result)
        return b.load(result)

    return emitter(f"gram_micro_{vec.tag}_{rows}x{vectors}_{a_row}", DOUBLE, 8, body)


def triangle_sum_ir(vec, rows, nr):
    """The absolute sum of c[r, j] over j > r + offset, for diagonal tiles: ``(c, vectors, offset) -> float64``."""
    lane = ir.Constant(ir.VectorType(I64, vec.lanes), list(range(vec.lanes)))

    def body(b, c, vectors, offset):
        (acc,) = vec.zeros(b, 1)
        with cgutils.for_range(b, I64(rows)) as row, cgutils.for_range(b, vectors) as column:
            place = b.add(b.mul(row.index, I64(nr)), b.mul(column.index, I64(vec.lanes)))
            v = vec.load(b, b.add(c, b.mul(place, I64(vec.size))))
            bound = b.sub(b.add(row.index, offset), b.mul(column.index, I64(vec.lanes)))
            above = b.icmp_signed(">", lane, vec.splat(b, bound))
            v = b.select(above, vec.folded(b, v), vec.constant(0.0))
            b.store(b.fadd(b.load(acc), v), acc)
        return vec.total(b, [b.load(acc)])

    return emitter(f"gram_triangle_{vec.tag}", DOUBLE, 3, body)


def signs_ir(vec, nr):
    """Replace the NR x NR tile at c by half of what is summed's derivatives (all of it for ABS: the signs).

    Their transpose is written to t: ``(c, t, diagonal) -> float64``, the sum over the tile. With diagonal set, entries
    with equal indices count as zero, or of raw rows as what they are beyond 1.
    """
    lane = ir.Constant(ir.VectorType(I64, vec.lanes), list(range(vec.lanes)))
    one, zero, minus = (vec.constant(v) for v in (1.0, 0.0, -1.0))

    def body(b, c, t, diagonal):
        (acc,) = vec.zeros(b, 1, vec.wide)
        blocks, step = I64(nr // vec.lanes), I64(vec.lanes)
        with cgutils.for_range(b, blocks) as bi, cgutils.for_range(b, blocks) as bj:
            i, j = b.mul(bi.index, step), b.mul(bj.index, step)
            source = b.add(c, b.mul(b.add(b.mul(i, I64(nr)), j), I64(vec.size)))
            target = b.add(t, b.mul(b.add(b.mul(j, I64(nr)), i), I64(vec.size)))
            on_diagonal = b.and_(b.icmp_signed("!=", diagonal, I64(0)), b.icmp_signed("==", i, j))
            on_diagonal = vec.splat(b, on_diagonal)
            magnitudes, signs = [], []
            for r in range(vec.lanes):
                v = vec.load(b, source, r * nr * vec.size)
                self_pair = b.and_(on_diagonal, b.icmp_signed("==", lane, vec.constant(r, lane.type)))
                v = b.select(self_pair, b.fsub(v, one) if vec.fold == RAW else zero, v)
                magnitudes.append(vec.folded(b, v))
                negative = b.select(b.fcmp_ordered("<", v, zero), minus, v)  # 0 and NaN stay as they are
                signs.append(b.select(b.fcmp_ordered(">", v, zero), one, negative) if vec.fold == ABS else v)
                vec.store(b, signs[-1], source, r * nr * vec.size)
            for r, v in enumerate(vec.transpose(b, signs)):
                vec.store(b, v, target, r * nr * vec.size)
            while len(magnitudes) > 1:
                magnitudes = [b.fadd(x, y) for x, y in zip(magnitudes[::2], magnitudes[1::2], strict=True)]
            b.store(b.fadd(b.load(acc), vec.widest(b, magnitudes[0])), acc)
        return vec.total(b, [b.load(acc)])

    return emitter(f"gram_signs_{vec.tag}", DOUBLE, 3, body)
