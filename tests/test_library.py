"""The compiled CPU library is safe to load anywhere: what it exports, what it links, what it leaves alone."""

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maskdiff_kernels.source_version import LIBRARIES, hash_sources

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = LIBRARIES / "libmaskdiff_cpu.so"
needs_binutils = pytest.mark.skipif(not shutil.which("nm"), reason="no nm and readelf")
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")


def output(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of a file's defined symbols."""
    lines = output("nm", "--defined-only", "--format=posix", *options, str(path)).splitlines()
    return [(kind, name) for name, kind in (re.match(r"(.*) (\w) [0-9a-f]+", line).groups() for line in lines if line)]


def declared() -> set[str]:
    """The functions of csrc/maskdiff_kernels.h."""
    header = (ROOT / "csrc" / "maskdiff_kernels.h").read_text()
    return set(re.findall(r"^MASKDIFF_API [^;(]*?(\w+)\(", header, re.MULTILINE))


@pytest.fixture(scope="module")
def objects() -> dict[str, list[Path]]:
    """The object files of each instruction set, of the sources as they are."""
    build = ROOT / "build" / "kernels"
    generator = [] if (build / "CMakeCache.txt").is_file() or not shutil.which("ninja") else ["-G", "Ninja"]
    output("cmake", "-S", str(ROOT), "-B", str(build), *generator, f"-DPython3_EXECUTABLE={sys.executable}")
    output("cmake", "--build", str(build), "--parallel", "2")
    folders = (build / "CMakeFiles").glob("cpu_*.dir")
    return {folder.name[4:-4]: sorted(folder.rglob("*.o")) for folder in folders}


@needs_binutils
@needs_cmake
def test_no_weak_symbols(objects):
    """A weak symbol of two instruction sets would be merged: old processors would get the AVX-512 copy."""
    assert len(objects) in (1, 4, 5) and "baseline" in objects
    ops = {path.name for path in (ROOT / "csrc/cpu").glob("*.cpp")} - {"entry.cpp", "cpuid.cpp"}
    for isa, files in objects.items():
        assert {path.stem for path in files} == ({"attention.cpp", "product.cpp"} if "amx" in isa else ops)
        for path in files:
            found = symbols(path, "-C")
            assert [name for kind, name in found if kind in "VvWwu"] == [], path
            outside = [name for kind, name in found if kind.isupper() and f"maskdiff::{isa}::" not in name]
            assert outside == [], path


@needs_binutils
def test_exports_exactly_the_interface():
    assert {name for _, name in symbols(LIBRARY, "-D")} == {name for name in declared() if "_cuda_" not in name}


@needs_binutils
def test_links_nothing_of_its_own():
    """No path to a libgomp of its own: it must take the one that PyTorch has loaded. No C++ runtime, no PyTorch."""
    dynamic = output("readelf", "-d", str(LIBRARY))
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = set(re.findall(r"NEEDED.*\[([^.\]]+)", dynamic))
    assert "libgomp" in needed and needed <= {"libgomp", "libm", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}


@needs_binutils
@needs_cmake
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_cuda_library_for_every_gpu():
    """Built without a GPU, for all architectures, without a warning; loads on a machine that has no CUDA at all."""
    build = ROOT / "build" / "cuda"
    environment = os.environ | {"MASKDIFF_CUDA": "1", "MASKDIFF_CUDA_ARCHS": ""}
    generator = [] if (build / "CMakeCache.txt").is_file() or not shutil.which("ninja") else ["-G", "Ninja"]
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    options = ["-DMASKDIFF_STRICT=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    output("cmake", "-S", str(ROOT), "-B", str(build), *generator, python, *options, env=environment)
    output("cmake", "--build", str(build), "--target", "maskdiff_cuda", env=environment)
    commands = {Path(c["file"]).name: c["command"] for c in json.loads((build / "compile_commands.json").read_text())}
    unfused = {file for file, command in commands.items() if "-fmad=false" in command}
    assert unfused == {"noisy_patches.cu", "denoising_loss.cu"}  # the bits of the CPU
    path = build / "libmaskdiff_cuda.so"
    assert {name for _, name in symbols(path, "-D")} == {name for name in declared() if "_cuda_" in name}
    dynamic = output("readelf", "-d", str(path))
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic and "libcuda" not in dynamic
    library = ctypes.CDLL(str(path))
    library.maskdiff_cuda_archs.restype = library.maskdiff_cuda_source_version.restype = ctypes.c_char_p
    assert library.maskdiff_cuda_archs() == b"80,90,100,120"
    assert library.maskdiff_cuda_source_version().decode() == hash_sources(ROOT / "csrc")


def test_one_libgomp_in_the_process():
    code = """
import torch, maskdiff_kernels as k
k.draw_batch(torch.tensor([1]), torch.arange(64), 100, (8, 8), k.Mask("patch", counts=(16,)), backend="cpp")
torch.ones(1000, 1000).add_(1)
import json
print(json.dumps(sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})))
"""
    found = json.loads(output(sys.executable, "-c", code))
    assert len(found) == 1 and "/torch/lib/" in found[0], found


def test_subnormal_numbers_survive_loading():
    """A library built with fast-math would switch them off for the whole process, PyTorch's threads included."""
    code = """
import ctypes, sys
small = 5e-324
ctypes.CDLL(sys.argv[1])
assert small * float("1.0") == 5e-324 != 0.0
import torch, maskdiff_kernels as k
k.draw_batch(torch.tensor([1]), torch.arange(64), 100, (8, 8), k.Mask("patch", counts=(16,)), backend="cpp")
assert (torch.full((1 << 20,), 1e-40) * 1.0).count_nonzero() == 1 << 20
"""
    output(sys.executable, "-c", code, str(LIBRARY))


def test_the_version_follows_every_source(tmp_path):
    """A changed byte, a renamed file and a new file are other sources; a file that is no source is none."""
    source = tmp_path / "cpu" / "a.cpp"
    source.parent.mkdir()
    source.write_text("int a;")
    versions = [hash_sources(tmp_path)]
    source.write_text("int b;")
    versions.append(hash_sources(tmp_path))
    source.rename(tmp_path / "cpu" / "b.cpp")
    versions.append(hash_sources(tmp_path))
    (tmp_path / "c.cuh").write_text("")
    versions.append(hash_sources(tmp_path))
    assert len(set(versions)) == 4 and all(re.fullmatch("[0-9a-f]{16}", version) for version in versions)
    (tmp_path / "notes.txt").write_text("x")
    assert hash_sources(tmp_path) == versions[-1]
    with pytest.raises(ValueError, match="no source files"):
        hash_sources(tmp_path / "none")


@needs_binutils
@needs_cmake
@pytest.mark.skipif(platform.machine() != "x86_64", reason="not x86-64")
def test_a_compiler_without_amx_builds_the_rest(tmp_path):
    """Such as GCC 10: no code for AMX, and no processor is said to have it."""
    compiler = tmp_path / "c++"
    real = shutil.which("c++")
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    given = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DPython3_EXECUTABLE={sys.executable}"]
    said = output("cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *generator, *given)
    assert "this compiler has no AMX" in said
    targets = (tmp_path / "build" / "CMakeFiles" / "TargetDirectories.txt").read_text()
    assert "cpu_avx512_bf16" in targets and "cpu_amx_bf16" not in targets
    for source in ("entry", "cpuid"):
        given = (str(ROOT / "csrc" / "cpu" / f"{source}.cpp"), "-I", str(ROOT / "csrc"), "-fno-math-errno")
        output(str(compiler), "-c", *given, '-DMASKDIFF_SOURCE_VERSION=""', "-o", str(tmp_path / f"{source}.o"))
    assert "amx_bf16::" not in output("nm", "-C", str(tmp_path / "entry.o"))
    assert "syscall" not in output("nm", str(tmp_path / "cpuid.o"))  # which asks for the tiles
