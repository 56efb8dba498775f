"""The value: the sum of |cosine| over the upper triangle of the Gram matrix, or over a rectangle of another's."""

from typing import Any

import numpy as np

from regkern.kernels.cpu.compile import part
from regkern.kernels.cpu.gram import workspace as ws
from regkern.kernels.cpu.gram.product import micro_kernel_ir, triangle_sum_ir
from regkern.kernels.cpu.gram.tiles import GROUP, KC, group_size
from regkern.kernels.cpu.gram.workspace import aligned, buffer_of
from regkern.kernels.cpu.team import launch
from regkern.kernels.cpu.words import (
    allocate,
    free,
    load_double,
    load_float,
    load_word,
    load_words,
    store_double,
    store_words,
)

# Parts of the triangle that are summed alone: many to a thread, and their sums take no space to speak of.
MAX_TASKS = 4096
# Elements that are packed, and multiply-adds, in a ns: about, of float32 with AVX-512 (two cores of Ice Lake).
PACKED, MULTIPLIED = 1, 32


@part
def sum_pairs(record, d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride, width):
    """Return whether there was memory, and a sum of what products are folded to.

    Over all pairs of one of the n rows of x and one of the m rows of y; where m is 0, over the pairs within x, and
    half of it over the diagonal where rows stay as they are.
    """
    nr, size = load_word(record + ws.ENTRIES), load_word(record + ws.ENTRY_BYTES)
    count, y_count = (n + nr - 1) // nr, (m + nr - 1) // nr
    group = group_size(min(count, y_count) if m > 0 else count)
    side = (count + group - 1) // group
    tiles = side * ((y_count + group - 1) // group) if m > 0 else side * (side + 1) // 2
    tasks = min(tiles, MAX_TASKS)
    panel, scales = nr * d * size, 2 * nr * size
    buffer = aligned((GROUP * GROUP if d > KC else 1) * nr * nr * size)
    job = allocate(ws.JOB + (count + y_count) * (panel + scales) + width * buffer + 8 * tasks + 3 * ws.CACHE_LINE)
    if job == 0:
        return False, 0.0
    panels = aligned(job + ws.JOB)
    buffers = aligned(panels + (count + y_count) * panel)
    store_words(job + ws.BUFFERS, (buffers, buffer))
    sums = buffers + width * buffer
    norms = sums + 8 * tasks
    pack, right, columns = load_word(record + ws.PACK), panels, n
    if m > 0:
        right, columns = panels + count * panel, m
        store_words(job + ws.MATRIX, (y, m, d, y_row_stride, y_depth_stride, right, norms + count * scales, 0))
        launch(pack, job, y_count, 4, m * d // PACKED, width)
    store_words(job + ws.MATRIX, (x, n, d, row_stride, depth_stride, panels, norms, 0))
    launch(pack, job, count, 4, n * d // PACKED, width)
    store_words(job + ws.TILES, (right, columns, m == 0, group, tiles, tasks, sums))
    work = (n * m * d if m > 0 else n * n * d // 2) // MULTIPLIED
    launch(load_word(record + ws.SUM_TILES), job, tasks, 1, work, width)
    total = 0.0
    for t in range(tasks):
        total += load_double(sums + 8 * t)
    if m == 0 and load_word(record + ws.RAW) != 0:
        for i in range(n):  # half of what the diagonal adds, as of pairs one half is looked at
            place = norms + i // nr * scales + (nr + i % nr) * size
            beyond = (load_double(place) if size == 8 else np.float64(load_float(place))) - 1.0
            total += 0.5 * beyond * beyond
    free(job)
    return True, total


def make_sum_tiles(vec: Any, tile: Any) -> Any:
    """Make the task that adds up macro tiles."""
    task_sum = _make_task_sum(vec, tile)

    def sum_tiles(job, worker, first, last):
        _, n, d, _, _, panels, _, _ = load_words(job + ws.MATRIX, 8)
        right, m, triangle, group, tiles, tasks, sums = load_words(job + ws.TILES, 7)
        buffer = buffer_of(job, worker)
        for t in range(first, last):
            start, stop = t * tiles // tasks, (t + 1) * tiles // tasks
            total = task_sum(panels, n, right, m, d, triangle != 0, group, start, stop, buffer)
            store_double(sums + 8 * t, total)
        return 0

    return sum_tiles


def _make_task_sum(vec, tile):
    nr = tile.vectors * vec.lanes
    macro_tile_sum = _make_macro_tile_sum(vec, tile)

    @part
    def task_sum(left, n, right, m, d, triangle, group, start, stop, buffer):
        """Macro tiles start to stop, numbered along the columns of the upper triangle, or of the rectangle."""
        count, columns = (n + nr - 1) // nr, (m + nr - 1) // nr
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
            total += macro_tile_sum(left, n, right, m, d, triangle, i0, i1, j0, j1, buffer)
            i += 1
            if (i > j) if triangle else (i1 == count):
                i, j = 0, j + 1
        return total

    return task_sum


def _make_macro_tile_sum(vec, tile):
    mr, w, size = tile.mr, vec.lanes, vec.size
    nr = tile.vectors * w
    micro_kernel, triangle_sum = _make_micro_kernel(vec, tile, nr), triangle_sum_ir(vec, mr, nr)

    @part
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

    @part
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
        @part
        def micro_kernel(width, panels, jump, a, b, k, c, accumulate, keep):
            if width >= vectors:
                return widest(panels, jump, a, b, k, c, accumulate, keep)
            return narrower(width, panels, jump, a, b, k, c, accumulate, keep)

        return micro_kernel

    one = kernels[0]

    @part
    def chosen(width, panels, jump, a, b, k, c, accumulate, keep):
        return one(panels, jump, a, b, k, c, accumulate, keep)

    for vectors, kernel in enumerate(kernels[1:], 2):
        chosen = choose(chosen, vectors, kernel)
    return chosen
