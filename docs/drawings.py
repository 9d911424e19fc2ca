"""Data-flow drawings of the losses and kernels, as SVG. docs/generate.py writes them."""

from html import escape
from itertools import pairwise, product
from typing import NamedTuple

WIDTH, GAP, LINE, PAD = 190, 26, 15, 10
FILL = {"memory": "#e8e8e8", "chip": "#d7e8fa", "result": "#dcf2dc"}


class Box(NamedTuple):
    """A box with lines of text. kind: "memory" (main memory), "chip" (only cache or registers) or "result"."""

    text: str
    kind: str = "chip"


Rows = list[list[Box]]


def _height(row: list[Box]) -> int:
    return max(box.text.count("\n") + 1 for box in row) * LINE + 2 * PAD


def _box(box: Box, x: float, y: float, height: int) -> str:
    lines = box.text.split("\n")
    top = y + (height - len(lines) * LINE) / 2 + LINE - 4
    text = "".join(
        f'<text x="{x + WIDTH / 2:g}" y="{top + i * LINE:g}">{escape(line)}</text>' for i, line in enumerate(lines)
    )
    return f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{height}" rx="5" fill="{FILL[box.kind]}"/>{text}'


def flow(rows: Rows) -> str:
    """Return an SVG of rows of boxes, from top to bottom, with arrows between consecutive rows.

    Rows of equal length are linked box by box, a single box to all, and n boxes to the nearest two of n + 1.
    """
    columns = max(map(len, rows))
    width = columns * (WIDTH + GAP) + GAP
    parts, centres, y = [], [], GAP
    for row in rows:
        height = _height(row)
        left = (width - len(row) * (WIDTH + GAP) + GAP) / 2
        parts += [_box(box, left + i * (WIDTH + GAP), y, height) for i, box in enumerate(row)]
        centres.append(([left + i * (WIDTH + GAP) + WIDTH / 2 for i in range(len(row))], y, y + height))
        y += height + GAP
    for (above, _, bottom), (below, top, _) in pairwise(centres):
        if len(above) == len(below):
            pairs = list(zip(above, below, strict=True))
        elif min(len(above), len(below)) == 1:
            pairs = list(product(above, below))
        else:
            pairs = [*zip(above, below, strict=False), *zip(above, below[1:], strict=True)]
        parts += [f'<path d="M{a:g} {bottom:g}L{b:g} {top - 5:g}" marker-end="url(#tip)"/>' for a, b in pairs]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}">\n'
        "<style>text{font:12px sans-serif;text-anchor:middle;fill:#111}"
        "path{stroke:#555;fill:none}rect{stroke:#999}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="3" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L6 3L0 6z" style="fill:#555;stroke:none"/></marker></defs>\n'
        f'<rect width="{width}" height="{y}" rx="8" style="fill:#fff;stroke:none"/>\n{body}\n</svg>\n'
    )


def badges(pairs: list[tuple[str, str]]) -> str:
    """Return an SVG strip of labels and values, in the colours of the usual badges."""
    parts, x = [], 0
    for label, value in pairs:
        fills = ("#555", "#a05a00" if value.startswith("not ") else "#2b6a3c")
        for text, fill in zip((label, value), fills, strict=True):
            width = 7 * len(text) + 12
            parts.append(f'<rect x="{x}" width="{width}" height="20" fill="{fill}"/>')
            parts.append(f'<text x="{x + width / 2:g}" y="14" textLength="{7 * len(text)}">{escape(text)}</text>')
            x += width
        x += 6
    body = "\n".join(parts)
    label = escape("; ".join(f"{label}: {value}" for label, value in pairs), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x - 6} 20" width="{x - 6}" height="20" role="img" '
        f'aria-label="{label}">\n<style>text{{font:11px Verdana,DejaVu Sans,sans-serif;text-anchor:middle;fill:#fff}}'
        f"</style>\n{body}\n</svg>\n"
    )


def memory(text: str) -> Box:
    return Box(text, "memory")


def result(text: str) -> Box:
    return Box(text, "result")


DRAWINGS: dict[str, Rows] = {
    "loss-relation": [
        [memory("student tokens\n(B, N, Ds)"), memory("teacher tokens\n(B, N, Dt)")],
        [
            Box("cosine of every pair\nn x n, of Ds numbers each"),
            Box("cosine of every pair\nn x n, of Dt numbers each"),
        ],
        [Box("difference, squared, averaged")],
        [result("loss")],
    ],
    "loss-manifold": [
        [memory("tokens of a layer of both networks")],
        [
            Box("intra: the patches\nof one image, N x N"),
            Box("inter: one patch position\nacross images, B x B"),
            Box("random: K tokens\nof the whole batch, K x K"),
        ],
        [Box("4 intra + 0.1 inter + 0.2 random")],
        [result("mean over layers")],
    ],
    "loss-attention": [
        [memory("student q, k\n(B, H, N, d)"), memory("teacher q, k\n(B, H, N, d')")],
        [Box("softmax of q kᵀ,\none row per query"), Box("softmax of q kᵀ,\none row per query")],
        [Box("divergence of the two rows")],
        [result("mean over rows, heads, images")],
    ],
    "loss-qkv": [
        [memory("student q, k, v\n(B, N, D)"), memory("teacher q, k, v\n(B, N, D')")],
        [Box("cut into R relation heads\nof D / R channels"), Box("cut into R relation heads\nof D' / R channels")],
        [Box("softmax of q qᵀ, k kᵀ, v vᵀ"), Box("softmax of q qᵀ, k kᵀ, v vᵀ")],
        [Box("KL of the rows, pair by pair")],
        [result("sum over relations")],
    ],
    "loss-statistics": [
        [memory("input of a BatchNorm\n(B, C, H, W)"), memory("its running mean\nand variance (C)")],
        [Box("mean and variance\nof the batch, per channel"), Box("mean and variance\nof real images")],
        [Box("distance of means + distance of variances")],
        [result("sum over layers")],
    ],
    "loss-prior": [
        [memory("images (B, C, H, W)")],
        [Box("each pixel minus neighbour:\nright, below, two diagonals"), Box("the pixels")],
        [Box("L1: means of |d|,\nL2: norms of d"), Box("norm of each image")],
        [result("weighted sum")],
    ],
    "loss-diversity": [
        [memory("logits of student\nand teacher (B, C)"), memory("teacher's features\nand labels (B, D)")],
        [Box("competition: 1 - Jensen-Shannon\nof the two"), Box("intra-divergence: distances\nwithin a class")],
        [result("rewards images the two\ndisagree on"), result("rewards images of a class\nthat differ")],
    ],
    "loss-logits": [
        [memory("student logits (B, C)"), memory("teacher logits (B, C)")],
        [Box("the target against all others"), Box("the others among themselves")],
        [Box("soft targets: one KL of both\nDKD: one weight for each\nNKD: cross-entropies")],
        [result("loss")],
    ],
    "kernel-relation": [
        [memory("S rows, read in place"), memory("T rows, read in place")],
        [Box("norms: n numbers each")],
        [Box("strip of S Sᵀ\n64 rows, upper triangle"), Box("strip of T Tᵀ\nthe same rows")],
        [Box("E = r_i r_j s·s - q_i q_j t·t\nloss += E², W = E r_j")],
        [Box("W S to the strip's rows"), Box("Wᵀ S to the rows below")],
        [result("dS = r (U - ŝ <ŝ, U>)"), result("loss")],
    ],
    "kernel-relation-gram": [
        [memory("S rows, normalised on the fly"), memory("T rows, normalised on the fly")],
        [
            Box("SᵀS  (Ds x Ds)\ntriangle, float64"),
            Box("SᵀT  (Ds x Dt)\nfloat64"),
            Box("TᵀT  (Dt x Dt)\ntriangle, float64"),
        ],
        [Box("|SᵀS|² - 2 |SᵀT|² + |TᵀT|²\n4 (S SᵀS - T TᵀS)")],
        [result("loss"), result("dS")],
    ],
    "kernel-attention": [
        [memory("q, k of the student\nread in place"), memory("q, k of the teacher\nread in place")],
        [Box("strip of Z_s = q kᵀ\nstays in cache"), Box("strip of Z_t = q kᵀ\nstays in cache")],
        [Box("row maxima m, sums l of both")],
        [Box("row losses"), Box("dZ = p_s - p_t\noverwrites Z_s, float32")],
        [result("loss"), result("dQ = dZ K, dK += dZᵀ Q")],
    ],
    "kernel-moments": [
        [memory("x (B, C, ...), read once")],
        [Box("a block in cache:\nits mean"), Box("the same block:\ndeviations from that mean")],
        [Box("(count, mean, M2) of blocks merge in pairs, in a fixed order")],
        [result("mean, variance (C)")],
        [Box("backward: dx = a_c + b_c (x - mean_c)")],
        [result("dx, written once")],
    ],
    "kernel-prior": [
        [memory("image, a plane at a time")],
        [Box("two rows in cache")],
        [Box("four differences,\n|d| and d² added up"), Box("backward: sign(d) and d / norm\nof all four neighbours")],
        [result("(TV L1, TV L2, norms)"), result("dx, written once")],
    ],
}
