"""The value: the sum of |cosine| over the upper triangle of the Gram matrix, or over a rectangle of another's."""

import numpy as np
from numba import prange

from regkern.kernels.cpu.compile import inner
from regkern.kernels.cpu.gram.atomics import take_ticket
from regkern.kernels.cpu.gram.panels import make_pack_panel
from regkern.kernels.cpu.gram.product import micro_kernel_ir, triangle_sum_ir
from regkern.kernels.cpu.gram.tiles import GROUP, KC, MAX_WORKERS, group_size
from regkern.kernels.cpu.gram.workspace import aligned, keep_alive

# Parts of the triangle that are summed alone: many to a thread, and their sums take no space to speak of.
MAX_TASKS = 4096


def make_value(vec, tile):
    """Make ``value(d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride)``: a sum of |cosine|.

    Over all pairs of one of the n rows of x and one of the m rows of y; where m is 0, over the pairs within x.
    """
    nr, size, spare, accumulator = tile.vectors * vec.lanes, vec.size, vec.spare, vec.accumulator
    pack_panel, task_sum = make_pack_panel(vec, nr, tile.mr), _make_task_sum(vec, tile)

    def value(d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride):
        count, y_count = (n + nr - 1) // nr, (m + nr - 1) // nr
        workspace = np.empty((count + y_count) * nr * d + spare, accumulator)
        norms = np.empty((count + y_count) * 2 * nr, accumulator)
        panels, scales = aligned(workspace), norms.ctypes.data
        for p in prange(count + y_count):
            target, scale = panels + p * nr * d * size, scales + p * 2 * nr * size
            if p < count:
                first = p * nr
                pack_panel(x + first * row_stride, min(nr, n - first), d, row_stride, depth_stride, target, scale)
            else:
                first = (p - count) * nr
                rows = min(nr, m - first)
                pack_panel(y + first * y_row_stride, rows, d, y_row_stride, y_depth_stride, target, scale)
        right, columns = panels, n
        group = group_size(count)
        side = (count + group - 1) // group
        tiles = side * (side + 1) // 2
        if m > 0:
            right, columns = panels + count * nr * d * size, m
            group = group_size(min(count, y_count))
            side = (count + group - 1) // group
            tiles = side * ((y_count + group - 1) // group)
        tasks = min(tiles, MAX_TASKS)
        sums, counter = np.zeros(tasks), np.zeros(1, np.int64)
        tickets = counter.ctypes.data
        workers = min(tasks, MAX_WORKERS)
        for _ in prange(workers):
            t = take_ticket(tickets)
            while t < tasks:
                start, stop = t * tiles // tasks, (t + 1) * tiles // tasks
                sums[t] = task_sum(panels, n, right, columns, d, m == 0, group, start, stop)
                t = take_ticket(tickets)
        total = 0.0
        for t in range(tasks):
            total += sums[t]
        keep_alive(workspace, norms, counter)
        return total

    return value


def _make_task_sum(vec, tile):
    nr, spare, accumulator = tile.vectors * vec.lanes, vec.spare, vec.accumulator
    macro_tile_sum = _make_macro_tile_sum(vec, tile)

    @inner(vec.tag)
    def task_sum(left, n, right, m, d, triangle, group, start, stop):
        """Macro tiles start to stop, numbered along the columns of the upper triangle, or of the rectangle."""
        count, columns = (n + nr - 1) // nr, (m + nr - 1) // nr
        buffer = np.empty((GROUP * GROUP if d > KC else 1) * nr * nr + spare, accumulator)
        if triangle:
            j = int((np.sqrt(8.0 * start + 1.0) - 1.0) / 2.0)
            j += (j + 1) * (j + 2) // 2 <= start  # the root may be off by one
            j -= j * (j + 1) // 2 > start
            i = start - j * (j + 1) // 2
        else:
            side = (count + group - 1) // group
            j = start // side
            i = start - j * side
        total = 0.0
        for _ in range(start, stop):
            i0, j0 = i * group, j * group
            i1, j1 = min(i0 + group, count), min(j0 + group, columns)
            total += macro_tile_sum(left, n, right, m, d, triangle, i0, i1, j0, j1, aligned(buffer))
            i += 1
            if (i > j) if triangle else (i1 == count):
                i, j = 0, j + 1
        keep_alive(buffer)
        return total

    return task_sum


def _make_macro_tile_sum(vec, tile):
    mr, w, size = tile.mr, vec.lanes, vec.size
    nr = tile.vectors * w
    micro_kernel, triangle_sum = _make_micro_kernel(vec, tile, nr), triangle_sum_ir(vec, mr, nr)

    @inner(vec.tag)
    def pair_sum(rows, columns, diagonal, a, b, kc, c, first, last):
        """One panel pair over kc steps of depth; once they are the last, the absolute sum of its dot products."""
        total = 0.0
        vectors = (columns + w - 1) // w
        for r in range(0, rows, mr):
            v = r // w if diagonal else 0  # the first vector with a column above the diagonal
            tile_c = c + (r * nr + v * w) * size
            keep = diagonal or not last
            s = micro_kernel(vectors - v, 1, 0, a + r * size, b + v * w * size, kc, tile_c, not first, keep)
            if last:
                total += triangle_sum(tile_c, vectors - v, r - v * w) if diagonal else s
        return total

    @inner(vec.tag)
    def macro_tile_sum(left, n, right, m, d, triangle, i0, i1, j0, j1, c):
        """The absolute sum over pairs with i in the left panels i0 to i1 and j in the right panels j0 to j1.

        In a triangle, both are the same panels, and of its pairs those with i < j count.
        """
        total = 0.0
        for k in range(0, d, KC):
            kc = min(KC, d - k)
            for j in range(j0, j1):
                for i in range(i0, min(i1, j + 1) if triangle else i1):
                    slot = (j - j0) * GROUP + i - i0 if d > KC else 0
                    total += pair_sum(
                        min(nr, n - i * nr),
                        min(nr, m - j * nr),
                        triangle and i == j,
                        left + (i * d + k) * nr * size,
                        right + (j * d + k) * nr * size,
                        kc,
                        c + slot * nr * nr * size,
                        k == 0,
                        k + kc == d,
                    )
        return total

    return macro_tile_sum


def _make_micro_kernel(vec, tile, nr):
    """The micro kernel for 1 to tile.vectors vectors: tiles at the right edge and on the diagonal need fewer."""
    kernels = [micro_kernel_ir(vec, tile.mr, v, nr, 1, nr) for v in range(1, tile.vectors + 1)]

    def choose(narrower, vectors, widest):
        @inner(f"{vec.tag}_{vectors}")
        def micro_kernel(width, panels, jump, a, b, k, c, accumulate, keep):
            if width >= vectors:
                return widest(panels, jump, a, b, k, c, accumulate, keep)
            return narrower(width, panels, jump, a, b, k, c, accumulate, keep)

        return micro_kernel

    one = kernels[0]

    @inner(vec.tag)
    def chosen(width, panels, jump, a, b, k, c, accumulate, keep):
        return one(panels, jump, a, b, k, c, accumulate, keep)

    for vectors, kernel in enumerate(kernels[1:], 2):
        chosen = choose(chosen, vectors, kernel)
    return chosen
