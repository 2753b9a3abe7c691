"""attention in Triton: runs attention_triton_cases.py in the interpreter, and compiles every kernel for every GPU.

Whether triton interprets or compiles is settled as it is imported, so the cases run in a process of their own.
"""

import functools
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
import triton_compiled
from triton_compiled import SHARED, instructions, resources, run_cases

from maskdiff_kernels import dispatch, library, triton_package
from maskdiff_kernels.ops.attention import op, triton_host
from maskdiff_kernels.ops.attention.triton_host import ANY, BACKWARD, FORWARD, Tile

pytest.importorskip("triton")
CASES = Path(__file__).with_name("attention_triton_cases.py")
NAMES = {2: ("bf16", "fp16"), 4: ("fp32",)}
TABLES = {"forward": FORWARD, "backward": BACKWARD}


def test_in_the_interpreter():
    run_cases(CASES, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    run_cases(CASES, TRITON_INTERPRET="0")


# ---- compiled without a GPU ----


@functools.cache
def compiled(kernel: str, dtype: str, width: int, most: int, target: tuple[str, int, int], ragged: bool):
    """A kernel as triton_host launches it for a dense qkv with sequences to `most` tokens."""
    tile: Tile = TABLES[kernel][width, 4 if dtype == "fp32" else 2][most]
    function = getattr(triton_package.kernels("attention"), kernel)
    constants = {"D": width, "BLOCK": tile.block, "STEP": tile.step, "ONE": most < ANY}
    types = {name: f"*{dtype}" for name in ("qkv", "out", "grad_out", "grad_qkv")} | {"lse": "*fp32", "scale": "fp32"}
    if ragged:
        types["cu_seqlens"] = "*i32"
    else:
        constants["cu_seqlens"] = None
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    aligned = [name for name in function.arg_names if name.endswith("stride")]
    return triton_compiled.compiled(function, types, constants, options, target, aligned)


def variants() -> list[tuple]:
    """(kernel, dtype, d, most tokens, architecture, ragged): every tile, on the architectures in turn, and so for
    bfloat16 or float16, equal lengths or ragged. MASKDIFF_EVERY_TILE=1: all combinations, which takes some minutes."""
    tiles = [(kernel, *key, most) for kernel, table in TABLES.items() for key, row in table.items() for most in row]
    chosen = []
    for (i, (kernel, width, size, most)), (j, arch) in itertools.product(enumerate(tiles), enumerate(SHARED)):
        turn = i % len(SHARED) == j
        for k, dtype in enumerate(NAMES[size]):
            if os.environ.get("MASKDIFF_EVERY_TILE"):
                chosen += [(kernel, dtype, width, most, arch, ragged) for ragged in (False, True)]
            elif turn and (i + i // len(SHARED)) % len(NAMES[size]) == k:
                chosen.append((kernel, dtype, width, most, arch, i // len(SHARED) % 2 == 0))
    return chosen


@pytest.mark.parametrize("kernel", TABLES)
@pytest.mark.parametrize("arch", SHARED)
def test_compiles_without_spilling(kernel, arch):
    chosen = [variant for variant in variants() if variant[0] == kernel and variant[4] == arch]
    assert len({dtype for _, dtype, *_ in chosen}) == 3
    spilling = []
    for _, dtype, width, most, _, ragged in chosen:
        binary = compiled(kernel, dtype, width, most, ("cuda", arch, 32), ragged)
        used = resources(binary.asm["cubin"])
        print(kernel, dtype, width, most, arch, used["REG"], used["STACK"], binary.metadata.shared)
        assert 0 < used["REG"] <= 255
        if used["STACK"] != 0:
            spilling.append((dtype, width, most, ragged, used))
        assert binary.metadata.shared <= SHARED[arch] * 1024
        assert binary.metadata.global_scratch_size == 0
        used = instructions(binary)
        assert used & {"ld", "st"} and not used & {"atom", "red"}
        assert bool(used & {"mma", "wgmma", "tcgen05"}) == (dtype != "fp32")  # float32 products are float32's
    assert spilling == []


@pytest.mark.parametrize(
    ("kernel", "width", "most"), [("forward", 64, 128), ("backward", 64, 128), ("backward", 128, ANY)]
)
def test_compiles_for_another_vendor(kernel, width, most):
    binary = compiled(kernel, "bf16", width, most, ("hip", "gfx942", 64), True)
    assert binary.metadata.shared <= 64 * 1024 and "v_mfma" in binary.asm["amdgcn"]


def test_every_kernel_is_compiled():
    """With each dtype and d, with each tile, on each architecture."""
    chosen = variants()
    expected = itertools.product(TABLES, ("bf16", "fp16", "fp32"), (32, 64, 128))
    assert {variant[:3] for variant in chosen} == set(expected)
    tiles = {(kernel, v[0], most) for kernel, table in TABLES.items() for v, row in table.items() for most in row}
    assert {(kernel, width, most) for kernel, _, width, most, *_ in chosen} == tiles
    assert {(v[0], v[4], v[5]) for v in chosen} == set(itertools.product(TABLES, SHARED, (False, True)))


def test_a_length_compiles_nothing_new():
    for kernel in TABLES:
        parameters = getattr(triton_package.kernels("attention"), kernel).params
        assert {p.name for p in parameters if p.do_not_specialize} == {"length", "tokens", "heads"}


def test_tiles():
    """Every length has a tile that holds it, and products have sides of at least 16."""
    for table in TABLES.values():
        assert set(table) == set(itertools.product((32, 64, 128), (2, 4)))
        for row in table.values():
            assert list(row) == sorted(row) and list(row)[-1] == ANY
            for most, tile in row.items():
                assert most == ANY or most <= (tile.step if table is FORWARD else tile.block)
                assert min(tile.block, tile.step) >= 16 and tile.block % tile.step * (tile.step % tile.block) == 0
    qkv = torch.empty(1, 1, 3, 1, 64, dtype=torch.bfloat16)
    lengths = (0, 1, 16, 17, 64, 65, 128, 129)
    assert [triton_host.bucket(FORWARD, qkv, n) for n in lengths] == [16, 16, 16, 32, 64, 128, 128, ANY]


# ---- choice ----


def test_why_it_cannot_run(monkeypatch):
    triton_package.version.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(library.LibraryError, match=r"^Triton 3\.\d+\.\d+ is there, but PyTorch sees no CUDA device"):
        triton_package.load()
    monkeypatch.setattr("triton.__version__", "3.4.0")
    triton_package.version.cache_clear()
    with pytest.raises(library.LibraryError, match=r"^triton is 3.4.0, the kernels need 3.5: pip install"):
        triton_package.load()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(library.LibraryError, match=r"^triton is not there .*: pip install 'triton>=3.5'"):
        triton_package.load()
    for op_name in ("attention", "draw_batch", "noisy_patches", "denoising_loss"):
        able, reason = dispatch.backends(op_name)["triton"]
        assert not able and reason.startswith("triton is not there")
    assert op._where_cuda_cannot.__wrapped__() == "sdpa"
    monkeypatch.undo()
    triton_package.version.cache_clear()
