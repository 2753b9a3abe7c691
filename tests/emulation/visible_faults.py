"""Faults planted one at a time in the CUDA kernels of noisy_patches and denoising_loss, and what must notice each."""

import planted
from planted import Fault

COMMON = [f"csrc/common/{name}.h" for name in ("portable", "floats", "philox", "normals", "patches", "samples")]
PATCHES, SAMPLES = COMMON[4:]
NUMBERS, VISIBLE = "csrc/cuda/numbers.cuh", "csrc/cuda/visible.cuh"
NOISY, LOSS = "csrc/cuda/noisy_patches.cu", "csrc/cuda/denoising_loss.cu"
FILES = (*COMMON, NUMBERS, VISIBLE, NOISY, LOSS)
ENTRIES = ("noisy_patches", "denoising_loss_workspace", "denoising_loss", "denoising_loss_backward")

SUM = "scored.sums[b * parts + ptx::block_y()] = sum;\n"
ARRIVAL = "    *last = ptx::last_to_arrive(counters + scored.counter, blocks);\n"

FAULTS = (
    Fault("lanes of a Philox block swapped", VISIBLE, "block.c, words_of_block.d", "block.d, words_of_block.c"),
    Fault("sine for cosine", VISIBLE, "second.x, quad.eps[3] = second.y", "second.y, quad.eps[3] = second.x"),
    Fault("every quad the first block of its patch", VISIBLE, "* per_patch + block);", "* per_patch);"),
    Fault("noise by the place in the batch", VISIBLE, "static_cast<uint64_t>(s.n[b])", "static_cast<uint64_t>(b)"),
    Fault("tail of a patch not masked", LOSS, "k < quad.count ?", "k < 4 ?"),
    Fault("tail counted as whole", VISIBLE, "static_cast<int>(left) : 4", "4 : 4", 0, "address", "odd"),
    Fault("flip forgotten within a patch", VISIBLE, "flip ? mirrored : quad.element + k", "quad.element + k"),
    Fault("words read where a sample is flipped", VISIBLE, "if (words && !flip)", "if (words)"),
    Fault("flip of places forgotten", VISIBLE, "place, sample.flip)", "place, false)"),
    Fault("a row starts at its second pixel", PATCHES, "== row ? 0", "== row ? channels"),
    Fault("stride of an image without its padding", VISIBLE, "image * s.stride", "image * s.rows * patch_elements(&s)"),
    Fault("slots ignored", SAMPLES, "s->slots ? s->slots[j] :", ""),
    Fault("sigma of another timestep", VISIBLE, "s.alpha_sigma[2 * t + 1]", "s.alpha_sigma[1]"),
    Fault("alpha and sigma swapped", SAMPLES, "alpha * x0 + sigma * eps", "sigma * x0 + alpha * eps"),
    Fault("sign of the velocity", SAMPLES, "alpha * eps - sigma * x0", "sigma * x0 - alpha * eps"),
    Fault("parts leave a gap", VISIBLE, "q += parts * kThreads)", "q += (parts + 1) * kThreads)"),
    Fault("last quad dropped", VISIBLE, "q < quads;", "q + 1 < quads;"),
    Fault("halves in the wrong order", NUMBERS, "x.x[0], x.x[1])", "x.x[1], x.x[0])"),
    Fault("stride off by one", LOSS, "begin) * scored.patch_stride", "begin) * (scored.patch_stride - 1)"),
    Fault("offsets of ragged samples ignored", SAMPLES, "s->cu_patches ? s->cu_patches[b] :", ""),
    Fault("weight twice", LOSS, "2.0f * weight *", "2.0f * weight * weight *"),
    Fault("half of the block not added", NUMBERS, "other = threads / 2;", "other = threads / 4;"),
    Fault("no barrier between two sums", NUMBERS, "other];\n    ptx::sync_block();", "other];"),
    Fault("no barrier before sums", NUMBERS, "= x;\n  ptx::sync_block();", "= x;"),
    Fault("no barrier after the arrival", LOSS, "ptx::sync_block();\n  if (!*last)", "if (!*last)"),
    Fault("arrivals not counted", LOSS, "ptx::last_to_arrive(counters + scored.counter, blocks);", "b == 0;"),
    Fault("counter of more blocks", LOSS, "(samples.batch) * parts;", "(samples.batch) * parts + 1;"),
    Fault("mean over the parts", LOSS, "<double>(samples.batch)", "<double>(samples.batch * parts)"),
    Fault("samples beyond the threads not finished", LOSS, "b += kThreads", "b += samples.batch"),
    Fault("another sample's gradient", LOSS, "[b * s.grad_stride]", "[b]"),
    Fault("mean's gradient not shared out", LOSS, "*s.grad_mean / static_cast<float>(s.batch)", "*s.grad_mean"),
    Fault("sum stored after the arrival", LOSS, SUM + ARRIVAL, ARRIVAL + SUM, 0, "thread", "twelve"),
    Fault("reads past the images", VISIBLE, "if (k < quad.count) bytes", "bytes", 0, "address", "ones"),
    Fault("stores past the gradient", NUMBERS, "if (k >= count) break;", "", 0, "address", "one"),
    Fault("words not aligned", VISIBLE, "s.stride % 4 == 0 && ", ""),
    Fault("vectors not aligned", LOSS, "| scored.patch_stride |", "|"),
)  # fmt: skip
SOUND = Fault("nothing", LOSS, "ptx::sync_block();", "ptx::sync_block();")  # the copies' own control


def build(sanitizer: str) -> tuple[tuple[Fault, ...], str]:
    """The faults that a sanitizer (or none) has to notice, and the library that holds them."""
    faults = (*(fault for fault in FAULTS if fault.sanitizer == sanitizer), SOUND)
    return faults, planted.build("visible", FILES, ENTRIES, faults, sanitizer)
