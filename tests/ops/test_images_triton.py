"""draw_batch, noisy_patches and denoising_loss in Triton: run in the interpreter, and compiled for every GPU."""

import contextlib
import functools
import itertools
import os
from pathlib import Path

import pytest
import torch
from triton_compiled import SHARED, compiled, instructions, resources, run_cases

from maskdiff_kernels import triton_package
from maskdiff_kernels.ops import triton_visible
from maskdiff_kernels.ops.denoising_loss import triton_host as loss_host
from maskdiff_kernels.ops.draw_batch import triton_host as draw_host
from maskdiff_kernels.ops.structs import MASKS, TARGETS

pytest.importorskip("triton")
HERE = Path(__file__).parent
CASES = HERE / "images_triton_cases.py"
OF_ALL = [HERE / f"test_{op}.py" for op in ("draw_batch", "noisy_patches", "denoising_loss")]  # implementations


def test_in_the_interpreter():
    which = f"{CASES.stem} or (triton and not cuda and not ragged and (known or strided_store or second_derivative))"
    run_cases(CASES, *OF_ALL, "-k", which, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    run_cases(CASES, TRITON_INTERPRET="0")


# ---- compiled without a GPU ----

SAMPLES = {
    "patches": "*u8", "slots": "*i32", "n": "*i64", "image_ids": "*i64", "keep_ids": "*i32", "cu_patches": "*i32",
    "flip": "*i1", "timestep": "*i64", "alpha_sigma": "*fp32", "seed": "*i64", "images": "i64", "rows": "i64",
    "stride": "i64", "timesteps": "i64",
}  # fmt: skip
LOSSES = {
    "weight": "*fp32", "sums": "*fp64", "per_sample": "*fp32", "mean": "*fp32", "counter": "*i32",
    "sample_stride": "i64", "patch_stride": "i64", "grad_mean": "*fp32", "grad_per_sample": "*fp32",
    "grad_stride": "i64",
}  # fmt: skip
DRAWN = {
    "seed": "*i64", "n": "*i64", "ids": "*i64", "counts": "*i32", "images": "i64", "base": "i64", "timesteps": "i64",
    "flip": "i64", "label_dropout": "i64", "image_ids": "*i64", "keep_ids": "*i32", "cu_patches": "*i32",
    "mirrored": "*i1", "timestep": "*i64", "drop_label": "*i1",
}  # fmt: skip
OPTIONS, Q = triton_visible.OPTIONS, triton_visible.Q


@functools.cache
def visible(kernel: str, arch: int, dtype: str = "bf16", patch: int = 4, optional: bool = False, target: str = "v"):
    """A kernel of noisy_patches or denoising_loss; optional: ragged, from a staging buffer, without weights."""
    op = "noisy_patches" if kernel == "gather_and_add_noise" else "denoising_loss"
    function = getattr(triton_package.kernels(op), kernel)
    types = SAMPLES | LOSSES | dict.fromkeys(("out", "prediction", "error", "gradient"), f"*{dtype}")
    constants = {"ACROSS": 16, "PATCH": patch, "CHANNELS": 3, "Q": Q, "TARGET": TARGETS[target]}
    constants |= {"ELEMENTS": patch * patch * 3, "BLOCK": 2048}
    constants |= dict.fromkeys(("weight",) if optional else ("slots", "cu_patches"))
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    aligned = ("stride", "sample_stride", "patch_stride") if patch == 4 else ()
    return compiled(function, types, constants, OPTIONS, ("cuda", arch, 32), aligned)


@functools.cache
def drawing(arch: int, kind: str = "patch", patches: int = 256, members: int = 1):
    constants = {"KIND": MASKS[kind], "PATCHES": patches, "MEMBERS": members}
    constants |= {"counts": None} if members == 1 else {"ids": None}
    function = triton_package.kernels("draw_batch").draw_batch
    options = {"num_warps": draw_host.warps(max(patches, members))}
    return compiled(function, DRAWN, constants, options, ("cuda", arch, 32))


SHAPES = [("bf16", 4, False), ("fp32", 4, True), ("fp16", 3, False), ("bf16", 3, True)]
DRAWS = [("patch", 4096, 1), ("block", 4096, 4096), ("crop", 1024, 16), ("patch", 512, 512), ("dense", 256, 1)]


def binaries(arch: int):
    """Every kernel, in forms that take turns on the architectures. MASKDIFF_EVERY_TILE=1: all forms on each of them."""
    turn, every = list(SHARED).index(arch), bool(os.environ.get("MASKDIFF_EVERY_TILE"))
    for i, kernel in enumerate(("gather_and_add_noise", "score", "scale")):
        for shape in SHAPES if every else (SHAPES[(i + turn) % 4],):
            for target in TARGETS if every and kernel == "score" else ("v",):
                yield kernel, (*shape, target), visible(kernel, arch, *shape, target)
    for mask in (("patch", 256, 1), *(DRAWS if every else DRAWS[turn : turn + 1])):
        yield "draw_batch", mask, drawing(arch, *mask)


@pytest.mark.parametrize("arch", SHARED)
def test_compiles_without_spilling(arch):
    for kernel, form, binary in binaries(arch):
        used = resources(binary.asm["cubin"])
        print(kernel, form, arch, used["REG"], used["STACK"], binary.metadata.shared)
        assert used["STACK"] == 0 and 0 < used["REG"] * binary.metadata.num_warps * 32 <= 65536, (kernel, form, used)
        assert binary.metadata.shared <= SHARED[arch] * 1024 and binary.metadata.global_scratch_size == 0
        found = instructions(binary)
        assert found & {"ld", "st"} and bool(found & {"atom", "red"}) == (kernel == "score")
        if kernel != "draw_batch":
            assert not found & {"fma", "mad.rn"}, "products and sums are not to be fused"


@pytest.mark.parametrize("kernel", ["gather_and_add_noise", "score", "scale"])
def test_words_and_vectors_at_a_time(kernel):
    """Where four divides a patch: four bytes in, four numbers out, and nothing through shared memory on the way."""
    ptx = visible(kernel, 90, "fp32").asm["ptx"]
    assert "st.global.v4.b32" in ptx and (kernel != "score" or "ld.global.v4.b32" in ptx)
    assert visible("gather_and_add_noise", 90, "fp32").metadata.shared == 0


def test_drawing_with_a_warp_needs_no_barrier():
    assert "bar.sync" not in drawing(90).asm["ptx"]


def test_compiles_for_another_vendor():
    function = triton_package.kernels("draw_batch").draw_batch
    constants = {"KIND": MASKS["patch"], "PATCHES": 4096, "MEMBERS": 16, "ids": None}
    binary = compiled(function, DRAWN, constants, {"num_warps": 16}, ("hip", "gfx942", 64))
    assert binary.asm["amdgcn"]


def test_a_mask_rate_compiles_nothing_new():
    """Nor another batch, set of images or share of a group: strides alone are looked at more closely than by type."""
    losses = SAMPLES | LOSSES | dict.fromkeys(("prediction", "error", "gradient"), "*bf16")
    kernels = (
        ("noisy_patches", "gather_and_add_noise", SAMPLES | {"out": "*bf16"}),
        ("denoising_loss", "score", losses),
        ("denoising_loss", "scale", losses),
        ("draw_batch", "draw_batch", DRAWN),
    )
    for op, kernel, types in kernels:
        parameters = getattr(triton_package.kernels(op), kernel).params
        numbers = [p for p in parameters if not p.is_constexpr and types.get(p.name, "i32")[0] != "*"]
        assert len(numbers) > 4
        assert {p.name for p in numbers if not p.do_not_specialize} <= {name for name in types if "stride" in name}


def test_no_graph_captures_the_first_call(monkeypatch):
    """It would own the memory of the counters, and zero them whenever it runs."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="^denoising_loss: captured in a graph at its first call"):
        loss_host._counters.__wrapped__(torch.device("cuda", 0))


def test_parts():
    """All programs of a sample take as many turns, and none has nothing to do in a batch of equal lengths."""
    for quads, batch, programs, most in itertools.product((0, 1, 255, 256, 257, 5000), (1, 3, 256), (1, 2048), (1, 64)):
        parts = triton_visible.parts_of(quads * batch, batch, 256, programs, most)
        turns = -(-quads // 256)
        assert 1 <= parts <= max(most, 1) and parts <= max(turns, 1)
        assert turns <= -(-turns // parts) * parts < turns + -(-turns // parts) or turns == 0
