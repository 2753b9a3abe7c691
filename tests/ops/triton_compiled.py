"""Compiles Triton kernels for GPUs that are not there, reads what they need, and runs cases in Triton's interpreter."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from typing import Any

SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB that a block may have: CUDA C++ Programming Guide, 20.2


def compiled(
    function: Any,  # a kernel
    types: Mapping[str, str],  # of its arguments that are not int32: "*bf16", "i64", ...
    constants: Mapping[str, Any],  # tl.constexpr arguments, and those that are None
    options: Mapping[str, Any],  # num_warps, ...
    target: tuple[str, int, int] = ("cuda", 90, 32),
    aligned: Collection[str] = (),  # numbers that 16 divides; pointers always are
) -> Any:
    """A kernel as a launch with such arguments compiles it."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    by_16 = [name for name in names if signature[name][0] == "*" or name in aligned]
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in by_16},
    )
    return triton_compile(source, target=GPUTarget(*target), options=dict(options))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread (REG), bytes of its stack (STACK; spilled registers lie there), and more."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", said)}


def instructions(binary: Any) -> set[str]:
    """The first words of all instructions of a kernel: {"ld", "st", "mul", ...}."""
    return set(re.findall(r"^\s+(?:@%\w+ )?(\w+)\.", binary.asm["ptx"], re.MULTILINE))


def run_cases(*arguments: object, **environment: str) -> None:
    """Runs pytest in a process of its own: whether triton interprets or compiles is settled as it is imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *map(str, arguments),
    ]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths} | environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout + done.stderr
    assert "skipped" not in done.stdout
