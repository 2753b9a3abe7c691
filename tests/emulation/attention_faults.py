"""Faults planted one at a time in attention's CUDA kernels, and what must notice each."""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import emulate

KERNELS, TILE = "csrc/cuda/attention.cu", "csrc/cuda/attention_tile.cuh"


@dataclass(frozen=True)
class Fault:
    """A text of a file and what stands there instead; `nth` of its places."""

    name: str
    file: str
    old: str
    new: str
    nth: int = 0
    sanitizer: str = ""  # the only one that notices; else: the numbers, or the emulator
    case: str = ""  # with a sanitizer: what to run, of attention_cases.CASES


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


def source(faults: tuple[Fault, ...], folder: Path) -> Path:
    """One .cu file with a copy of the kernels for each fault: entries fault_0, fault_0_backward, ...

    Not optimised, unlike the emulator that it includes: compiling so many copies takes longer than running them.
    """
    parts = [
        '// Planted faults.\n#include "cuda/launch.cuh"\n#include "maskdiff_kernels.h"\n#pragma GCC optimize("O0")'
    ]
    entries = (emulate.ROOT / "csrc/maskdiff_kernels.h").read_text()
    for number, fault in enumerate(faults):
        texts = {file: (emulate.ROOT / file).read_text() for file in (TILE, KERNELS)}
        pieces = texts[fault.file].split(fault.old)
        assert len(pieces) > fault.nth + 1, f"{fault.name}: {fault.old!r} is not in {fault.file}"
        texts[fault.file] = (
            fault.old.join(pieces[: fault.nth + 1]) + fault.new + fault.old.join(pieces[fault.nth + 1 :])
        )
        text = re.sub(r"#(include|pragma once).*", "", "".join(texts.values()))
        if not fault.case or fault.case == "ragged-short":
            text = re.sub(r"(Bf16, 32|Fp16, (64|32))>", "Bf16, 64>", text)
        parts.append(f"namespace copy_{number} {{\nnamespace maskdiff {{\nusing namespace ::maskdiff;\n}}\n{text}\n}}")
        for suffix in ("", "_backward"):
            (declared,) = re.findall(rf"int maskdiff_cuda_attention{suffix}\(([^)]*)\)", entries)
            names = ", ".join(re.findall(r"(\w+)(?:,|$)", declared))
            call = f"return copy_{number}::maskdiff_cuda_attention{suffix}({names});"
            parts.append(f'extern "C" MASKDIFF_API int fault_{number}{suffix}({declared}) {{ {call} }}')
    text = "\n".join(parts)
    path = folder / f"attention_faults_{zlib.crc32(text.encode()):08x}.cu"  # another text, another build
    path.write_text(text)
    return path
