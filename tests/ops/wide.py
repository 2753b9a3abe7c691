"""Builds an op with vectors of sixteen floats, made of narrower ones where need be: AVX-512's code on any processor."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from maskdiff_kernels import library

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-Og -std=c++17 -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
EXPORT = 'extern "C" __attribute__((visibility("default"))) int maskdiff_cpu_'
ENTRIES = {
    "attention": f"""
{EXPORT}attention(const maskdiff_attention_input* input, float scale, void* out, float* lse, int threads) {{
  return maskdiff::wide::attention(input, scale, out, lse, threads);
}}
{EXPORT}attention_backward(const maskdiff_attention_input* input, float scale, const float* lse, const void* grad_out,
                           int64_t sequence_stride, int64_t token_stride, void* grad_qkv, int threads) {{
  return maskdiff::wide::attention_backward(input, scale, lse, grad_out, sequence_stride, token_stride, grad_qkv,
                                            threads);
}}
""",
    "product": f"""
{EXPORT}product(const maskdiff_product* call, int threads) {{ return maskdiff::wide::product(call, threads); }}
""",
}


def build(op: str, folder: Path) -> ctypes.CDLL:
    """csrc/cpu/<op>.cpp alone, as a library. Skips the test where there is no compiler."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    (folder / "entry.cpp").write_text('#include "cpu/ops.h"\n' + ENTRIES[op])
    command = ["c++", *FLAGS.split(), "-DISA=wide", "-DMASKDIFF_WIDTH=16", "-I", str(ROOT / "csrc")]
    if library.cpu_level() != "baseline":
        command += ["-mavx2", "-mfma"]
    sources = [str(ROOT / "csrc" / "cpu" / f"{op}.cpp"), str(folder / "entry.cpp")]
    subprocess.run([*command, *sources, "-o", str(folder / "wide.so")], check=True)
    return ctypes.CDLL(str(folder / "wide.so"))
