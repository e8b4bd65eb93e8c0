"""draw_kernels.py - the pictures of docs/performance.md: panels and micro-kernels, the block of
rows of an expert, blocks dealt to threads.

    draw_kernels.py FOLDER        writes kernels_panels.svg, kernels_block.svg, kernels_threads.svg

Sizes follow the rules of src/cpu/ffn_rows.c and ffn_rows_backward.c for f32 on AVX-512, shape a of
bench_shapes.py and two threads. The constants below are those of the sources.
"""

import os
import sys

import bench_shapes

TILE_M, VEC, PANEL, GROUP, LANES = 14, 16, 32, 128, 32
PANEL_BYTES, BLOCK_BYTES = 28 * 1024, 1200 * 1024
MAX_ROWS, LEFT_K = 13 * 14, 128
LEFT_GROUP = (GROUP - (VEC - TILE_M)) // TILE_M * TILE_M
THREADS, CLASSES, MOST = 2, 8, 16

INK, SOFT, PAPER = "#222222", "#777777", "#ffffff"
W1, W3, W2, ROWS, LEFT = "#9ecae1", "#fdd0a2", "#a1d99b", "#dadaeb", "#f7c6d0"
SHADES = ["#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef", "#deebf7", "#f3f8fd"]


class Drawing:
    def __init__(self, width, height):
        self.size, self.parts = (width, height), []

    def rect(self, x, y, w, h, fill=PAPER, stroke=INK, thick=1):
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="{thick}"/>'
        )

    def text(self, x, y, words, size=12, anchor="start", fill=INK, weight="normal"):
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{fill}" font-weight="{weight}">{words}</text>'
        )

    def lines(self, x, y, words, size=11, anchor="start", fill=INK):
        for i, line in enumerate(words):
            self.text(x, y + i * (size + 3), line, size, anchor, fill)

    def arrow(self, x, y, to_x, to_y, color=INK):
        self.parts.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{color}" '
            f'stroke-width="1.4" marker-end="url(#tip)"/>'
        )

    def line(self, x, y, to_x, to_y, color=SOFT, dash="4 3"):
        self.parts.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{color}" '
            f'stroke-width="1" stroke-dasharray="{dash}"/>'
        )

    def save(self, folder, name):
        width, height = self.size
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" font-family="DejaVu Sans, Arial, sans-serif">\n'
                '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" '
                f'fill="{INK}"/></marker></defs>\n'
                f'<rect width="{width}" height="{height}" fill="{PAPER}"/>\n'
            )
            file.write("\n".join(self.parts) + "\n</svg>\n")


# ---- panels and the two kernels ------------------------------------------------------------------


def draw_layouts(d):
    d.text(20, 24, "Panels: 32 columns, each of their rows contiguous", 14, weight="bold")
    d.text(20, 48, "W1 [D,F] by rows", 12)
    for i in range(4):
        d.rect(20 + i * 40, 56, 40, 96, W1)
    d.lines(20, 168, ["a row of 32 columns, then a", "jump to the next row"], 11, fill=SOFT)
    d.arrow(188, 104, 222, 104)
    d.text(232, 48, "in panels: one after the other in memory", 12)
    for i in range(4):
        x = 232 + i * 68
        d.rect(x, 56, 54, 96, W1)
        d.arrow(x + 27, 66, x + 27, 144)
        if i < 3:
            d.arrow(x + 54, 140, x + 68, 68, SOFT)
    words = ["a row: 128 bytes, two lines; D rows: one panel;", "columns beyond F are 0"]
    d.lines(232, 168, words, 11, fill=SOFT)
    d.text(540, 48, "gated: W1 and W3 share a panel", 12)
    for i in range(3):
        x = 540 + i * 68
        d.rect(x, 56, 27, 96, W1)
        d.rect(x + 27, 56, 27, 96, W3)
    words = ["16 gate columns, then the same 16 of up:", "a tile has both factors of h"]
    d.lines(540, 168, words, 11, fill=SOFT)
    d.text(790, 48, "W2 [F,O]", 12)
    for i in range(2):
        d.rect(790 + i * 68, 56, 54, 96, W2)
    d.lines(790, 168, ["the same, of its own", "columns"], 11, fill=SOFT)


def draw_sums(d, x, y, words):
    d.text(x, y - 8, words, 12)
    for i in range(14):
        for v in range(2):
            d.rect(x + v * 55, y + i * 8.5, 55, 8.5, "#efedf5")


def draw_right(d, y):
    d.text(20, y, "right: forward and dW; vectors lie across columns", 14, weight="bold")
    d.text(34, y + 26, "rows [k][14]", 12)
    d.rect(34, y + 34, 84, 120, ROWS)
    d.rect(34, y + 74, 84, 10, "#807dba")
    d.text(146, y + 26, "panel [k][32]", 12)
    d.rect(146, y + 34, 110, 120, W1)
    for v in range(2):
        d.rect(146 + v * 55, y + 74, 55, 10, "#3182bd")
    d.text(28, y + 83, "p", 12, "end")
    d.arrow(268, y + 44, 268, y + 146)
    d.arrow(284, y + 94, 308, y + 94)
    draw_sums(d, 320, y + 34, "14 x 32 sums: 28 registers")
    words = [
        "step p: 2 loads of the panel, 14 numbers spread, 28 multiply-adds:",
        "14 cycles on two units; meanwhile two lines are asked for that come soon",
    ]
    d.lines(20, y + 172, words, 11, fill=SOFT)


def draw_left(d, y, x):
    d.text(x, y, "left: dX; vectors lie across rows", 14, weight="bold")
    d.text(x, y + 26, "14 lines of a panel", 12)
    d.rect(x, y + 34, 110, 120, W2)
    d.rect(x, y + 60, 110, 50, "#74c476")
    d.rect(x + 52, y + 60, 7, 50, "#006d2c")
    d.text(x + 56, y + 124, "p", 12, "middle")
    d.arrow(x + 8, y + 142, x + 104, y + 142)
    d.text(x + 144, y + 26, "lanes [k][32 rows]", 12)
    d.rect(x + 144, y + 34, 110, 120, ROWS)
    for v in range(2):
        d.rect(x + 144 + v * 55, y + 74, 55, 10, "#807dba")
    d.text(x + 138, y + 83, "p", 12, "end")
    d.arrow(x + 264, y + 94, x + 288, y + 94)
    draw_sums(d, x + 300, y + 34, "14 columns x 32 rows")
    words = [
        "the sum runs along a line and on in the next panel: the same weights,",
        "read where they are; what comes out is turned",
    ]
    d.lines(x, y + 172, words, 11, fill=SOFT)


def draw_panels():
    d = Drawing(960, 430)
    draw_layouts(d)
    d.line(20, 206, 940, 206)
    draw_right(d, 232)
    draw_left(d, 232, 516)
    return d


# ---- a block of rows -----------------------------------------------------------------------------


def parts_of(n, most):
    """As many equal parts as needed, and the size of the largest."""
    count = -(-n // most)
    return count, -(-n // count)


def kib(numbers):
    return f"{4 * numbers / 1024:.0f} KiB"


def draw_stage(d, x, y, w, fill, head, words, memory=False):
    d.rect(x, y, w, 92, fill, SOFT if memory else INK, 1 if memory else 1.5)
    d.text(x + w / 2, y + 18, head, 12, "middle", weight="bold")
    d.lines(x + w / 2, y + 36, words, 10.5, "middle")


def draw_row(d, y, stages):
    gap, x = 20, 20
    for i, (w, fill, head, words, memory) in enumerate(stages):
        draw_stage(d, x, y, w, fill, head, words, memory)
        x += w
        if i + 1 < len(stages):
            d.arrow(x + 2, y + 46, x + gap - 2, y + 46)
            x += gap


def panel_words(k):
    parts, rows = parts_of(k, PANEL_BYTES // 4 // PANEL)
    return [
        f"a panel: {kib(k * PANEL)}",
        f"in {parts} parts of {kib(rows * PANEL)},",
        "each times all tiles",
    ]


# fmt: off
def forward_stages(s, n):
    return [
        (104, PAPER, "x", ["rows of tokens,", "gathered", kib(n * s.D)], True),
        (112, ROWS, "packed x", ["[D][14] a tile", kib(n * s.D), "once a block"], False),
        (142, W1, "W1 (with W3)", panel_words(s.D), True),
        (126, LEFT, "z, h: a group", [f"{n} x {GROUP}", f"{kib(n * GROUP)} each,",
                                      "bias, activation"], False),
        (112, ROWS, "packed h", ["[F][14] a tile", kib(n * s.F), "filled by groups"], False),
        (142, W2, "W2", panel_words(s.F), True),
        (62, PAPER, "out", [f"{n} rows", kib(n * s.D)], True),
    ]


def backward_stages(s, n):
    return [
        (104, PAPER, "dy", ["rows of tokens,", "times weight", kib(n * s.D)], True),
        (112, ROWS, "packed dz", [f"[D][{LANES}] lanes", kib(n * s.D), "once a block"], False),
        (142, W2, "14 lines of W2", [f"{LEFT_K} of the sum at a time",
                                     f"{kib(TILE_M * LEFT_K)}, times all",
                                     f"{-(-n // LANES)} x {LANES} rows"], True),
        (126, LEFT, "dh: a group", [f"{n} x {LEFT_GROUP}", kib(n * GROUP),
                                    "activation, z1"], False),
        (112, ROWS, "packed dz1", [f"[F][{LANES}] lanes", kib(n * s.F), "(dz3 as much)"], False),
        (142, W1, "14 lines of W1", [f"{LEFT_K} of the sum at a time", "W3's sum beside it,",
                                     "added at the end"], True),
        (62, PAPER, "dx", [f"{n} rows", kib(n * s.D)], True),
    ]
# fmt: on


def draw_block():
    s = bench_shapes.SHAPES["a"]
    n = s.T * s.K // s.E
    most = min(BLOCK_BYTES // 4 // (s.D + s.F), MAX_ROWS) // TILE_M * TILE_M
    tiles, rows = parts_of(n, TILE_M)
    d = Drawing(960, 462)
    head = f"Shape a: D {s.D}, F {s.F}; the {n} rows of an expert are one block (at most {most}), "
    d.text(20, 24, head + f"{tiles} tiles of up to {rows} rows", 14, weight="bold")
    d.text(20, 52, f"forward, GROUP = {GROUP} hidden columns at a time", 12)
    draw_row(d, 62, forward_stages(s, n))
    d.arrow(500, 154, 500, 176)
    words = f"to memory only for a backward: z1, z3 ({kib(n * s.F)} each)"
    d.text(510, 176, words, 11, fill=SOFT)
    d.text(20, 214, f"backward, LEFT_GROUP = {LEFT_GROUP} columns at a time", 12)
    draw_row(d, 224, backward_stages(s, n))
    d.arrow(500, 316, 500, 338)
    d.text(510, 338, f"to memory, for dW: dz1, dz3 ({kib(n * s.F)} each)", 11, fill=SOFT)
    d.text(20, 376, "then all dW, in tiles of up to 364 x 512", 12)
    words = "dW2 = h^T dz, dW1 = x^T dz1: up to 256 rows are packed once a tile, h made anew of z1,"
    d.text(20, 396, words + " x and dz gathered again;", 11)
    words = "a result is stored once, past the caches where 32 MiB and more are set."
    d.text(20, 410, words, 11)
    colors = [(ROWS, "second cache, all the block long"), (LEFT, "a group's lines")]
    colors += [(W1, "weights: read once a block"), (PAPER, "memory")]
    for i, (fill, words) in enumerate(colors):
        d.rect(20 + i * 226, 434, 14, 14, fill)
        d.text(40 + i * 226, 446, words, 11)
    return d


# ---- blocks and threads --------------------------------------------------------------------------


def zipf_rows(shape):
    """Rows of each expert in proportion to 1 / rank; the first has what rounding leaves."""
    whole = sum(1 / r for r in range(1, shape.E + 1))
    rows = [round(shape.T * shape.K / (r * whole)) for r in range(1, shape.E + 1)]
    rows[0] += shape.T * shape.K - sum(rows)
    return rows


def blocks_in_order(shape):
    """(expert, rows, class), as order_experts of ffn_blocks.c has them; the block's limit."""
    rows = zipf_rows(shape)
    limit = min(BLOCK_BYTES // 4 // (shape.D + shape.F), MAX_ROWS) // TILE_M * TILE_M
    limit = min(limit, max(2 * TILE_M, sum(rows) // (8 * THREADS)))
    blocks = []
    for e, n in enumerate(rows):
        count = -(-n // limit)
        size = (n // count * CLASSES - 1) // limit
        rank = CLASSES - 1 - max(0, min(size, CLASSES - 1))
        blocks += [(e, n // count + (i < n % count), rank) for i in range(count)]
    return sorted(blocks, key=lambda block: block[2]), limit


def deal(blocks):
    """Whoever is free first takes the next; (thread, begin, block), time counted in rows."""
    free, next_block = [0.0] * THREADS, 0
    while next_block < len(blocks):
        some = max(1, min(MOST, (len(blocks) - next_block) // (8 * THREADS)))
        thread = free.index(min(free))
        for block in blocks[next_block : next_block + some]:
            yield thread, free[thread], block
            free[thread] += block[1]
        next_block += some


def draw_threads():
    shape = bench_shapes.SHAPES["a"]
    blocks, limit = blocks_in_order(shape)
    d = Drawing(960, 300)
    total = sum(block[1] for block in blocks)
    head = f"Shape a, routing by 1/rank: {shape.E} experts, {total} rows, "
    d.text(20, 24, head + f"{len(blocks)} blocks of at most {limit}", 14, weight="bold")
    words = "the order in which they are taken: eight classes of size, large ones first"
    d.text(20, 50, words + " (numbers are experts)", 12)
    x, scale = 20, 920 / total
    for expert, rows, rank in blocks:
        d.rect(x, 58, rows * scale, 40, SHADES[rank], PAPER)
        if rows * scale > 15:
            d.text(x + rows * scale / 2, 82, str(expert), 10, "middle", PAPER if rank < 4 else INK)
        x += rows * scale
    d.text(20, 132, "what two threads compute: whoever is free takes the next from a counter", 12)
    scale, ends = 880 * THREADS / total, [0.0] * THREADS
    scale *= 0.98
    for thread, begin, (expert, rows, rank) in deal(blocks):
        x, y = 60 + begin * scale, 142 + thread * 52
        d.rect(x, y, rows * scale, 44, SHADES[rank], PAPER)
        if rows * scale > 15:
            d.text(
                x + rows * scale / 2, y + 26, str(expert), 10, "middle", PAPER if rank < 4 else INK
            )
        ends[thread] = begin + rows
    for thread in range(THREADS):
        d.text(20, 168 + thread * 52, f"thr. {thread}", 11)
    d.line(60 + max(ends) * scale, 138, 60 + max(ends) * scale, 244, INK)
    d.lines(
        20,
        266,
        [
            "Lengths are rows. Blocks of one expert are equal within a row; small ones come last.",
            "Neither cut nor order is in the result: an element is one chain in any block.",
        ],
        11,
        fill=SOFT,
    )
    return d


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: draw_kernels.py FOLDER")
    draw_panels().save(sys.argv[1], "kernels_panels.svg")
    draw_block().save(sys.argv[1], "kernels_block.svg")
    draw_threads().save(sys.argv[1], "kernels_threads.svg")


if __name__ == "__main__":
    main()
