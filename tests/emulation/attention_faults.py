"""Faults planted one at a time in attention's CUDA kernels, and what must notice each."""

import re

import planted
from planted import Fault

KERNELS, TILE = "csrc/cuda/attention.cu", "csrc/cuda/attention_tile.cuh"

FAULTS = (
    Fault("no block barrier", KERNELS, "else ptx::sync_block();", "else {}"),
    Fault("no warp barrier", KERNELS, "ptx::sync_warp();", "{}"),
    Fault("no wait, forward", KERNELS, "ptx::copy_wait<0>();", ""),
    Fault("wait leaves one open, backward", KERNELS, "ptx::copy_wait<0>();", "ptx::copy_wait<1>();", nth=1),
    Fault("no commit", KERNELS, "ptx::copy_commit();", "", nth=1),
    Fault("fragment of right factors swapped", TILE, "{r[0], r[2]}", "{r[0], r[1]}"),
    Fault("fragment of weighted rows swapped", TILE, "{r[2], r[3]}", "{r[3], r[2]}"),
    Fault("weights repacked in the wrong order", TILE, "weights[i / 2][i % 2 * 2]", "weights[i % 2][i / 2 * 2]"),
    Fault("not transposed", TILE, "load_matrix_x4_transposed", "load_matrix_x4"),
    Fault("lanes trade the wrong words", TILE, "q & bit ? v.word[i] : v.word[i + bit],", "v.word[i],"),
    Fault("row of a tile off by one", TILE, "first_row + lane() % 16", "first_row + (lane() + 1) % 16"),
    Fault(
        "keys not masked, forward",
        KERNELS,
        "i % 2 < item.length ? x * scale : -kInfinity",
        "i % 2 < 999 ? x * scale : 0",
    ),
    Fault("mask of keys off by one, forward", KERNELS, "i % 2 < item.length ? x", "i % 2 <= item.length ? x"),
    Fault("keys not masked, backward", KERNELS, "real ? ptx", "real || first >= 0 ? ptx"),
    Fault("maximum not corrected", KERNELS, "total[h] *= factor;", ""),
    Fault(
        "maximum of two lanes alone",
        KERNELS,
        "bits <= 2; bits *= 2) {\n    const float other",
        "bits < 2; bits *= 2) {\n    const float other",
    ),
    Fault("scale of dK dropped", KERNELS, "count, grad_k, {scale, scale}", "count, grad_k, {1, 1}"),
    Fault("one dot for two queries", KERNELS, "i % 2 ? d.y : d.x", "d.x"),
    Fault("last tile dropped", KERNELS, "(item.length + kTile - 1) / kTile;", "item.length / kTile;"),
    Fault(
        "a tile too far apart",
        KERNELS,
        "tile += shape.warps) { // of queries",
        "tile += shape.warps + 1) { // of queries",
    ),
    Fault("another head's gradient", KERNELS, "grad_out + item.head * D + offset", "grad_out + offset"),
    Fault("length of a ragged sequence ignored", KERNELS, "if (end - item.start < length) length", "if (0) length"),
    Fault("shared memory too small", KERNELS, "(backward ? 4 : 3)", "3"),
    Fault("swizzle leaves the row", TILE, "% (D / 8))) * 8", "% (D / 8) * 2)) * 8"),
    Fault(
        "half a warp skips a product",
        TILE,
        "T::multiply(s[1], a[k], {r[1], r[3]});",
        "if (lane() < 16) T::multiply(s[1], a[k], {r[1], r[3]});",
    ),
    Fault(
        "a vote for a barrier",
        KERNELS,
        "ptx::sync_warp();",
        "ptx::vote(true);",
        sanitizer="thread",
        case="ragged-short",
    ),
    Fault(
        "reads a row past the tensor",
        KERNELS,
        "row < item.length);",
        "row <= item.length);",
        sanitizer="address",
        case="half",
    ),
    Fault(
        "reads a row past the gradient",
        KERNELS,
        "if (row >= item.length) continue;",
        "if (row > item.length) continue;",
        sanitizer="address",
        case="half",
    ),
    Fault(
        "stores a row past the tensor",
        TILE,
        "if (row + 8 * h < count)",
        "if (row + 8 * h <= count)",
        sanitizer="address",
        case="half",
    ),
)
SOUND = Fault("nothing", KERNELS, "ptx::copy_commit();", "ptx::copy_commit();")  # the copies' own control


def build(sanitizer: str) -> tuple[tuple[Fault, ...], str]:
    """The faults that a sanitizer (or none) has to notice, and the library that holds them."""
    faults = tuple(fault for fault in (*FAULTS, SOUND) if fault.sanitizer == sanitizer)
    entries = ("attention", "attention_backward")
    return faults, planted.build("attention", (TILE, KERNELS), entries, faults, sanitizer, _few_kernels)


def _few_kernels(fault: Fault, text: str) -> str:
    """Most cases run one kernel alone."""
    return text if fault.case not in ("", "ragged-short") else re.sub(r"(Bf16, 32|Fp16, (64|32))>", "Bf16, 64>", text)
