"""The door that pip uses: has CMakeLists.txt build the compiled libraries and puts them into the package.

`python setup.py build_kernels --inplace` alone (what `make build` does) rebuilds them for an editable install.
MASKDIFF_BUILD_DIR names the folder that keeps the objects, so that a second build compiles only what changed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = "maskdiff_kernels"


class KernelDistribution(Distribution):
    """Carries compiled code, though no extension module of Python's."""

    def has_ext_modules(self) -> bool:
        return True


class Build(build):
    """Starts from an empty folder: what an earlier build left there, a removed module say, would get into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildKernels(Command):
    """Builds the compiled libraries: a sub-command of build, in the protocol of setuptools.command.build.SubCommand."""

    description = "build the compiled kernels by CMake"
    user_options = [
        ("inplace", "i", "put the libraries into kernels/lib"),
        ("build-lib=", "b", "folder of the package being built"),
    ]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        package = ROOT / "kernels" if inplace else Path(str(self.build_lib)).resolve() / PACKAGE
        build_libraries(Path(os.environ.get("MASKDIFF_BUILD_DIR", ROOT / "build" / "kernels")), package / "lib")

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*")))]

    def get_outputs(self) -> list[str]:
        return [f"{self.build_lib}/{PACKAGE}/lib/{name}" for name in ("libmaskdiff_cpu.so", "SOURCE_VERSION")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3: the libraries are plain C, loaded by ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def build_libraries(objects: Path, destination: Path) -> None:
    """Compiles into `objects` and installs into `destination`; ends with one line where CMake or the compiler fails."""
    cmake = _usable_cmake()
    if cmake is None:
        sys.exit("error: building the kernels needs CMake 3.20 or newer: pip install cmake, then build again")
    _forget_vanished_tools(objects)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(objects), *generator, f"-DPython3_EXECUTABLE={sys.executable}"],
        [cmake, "--build", str(objects), "--parallel", jobs],
        [cmake, "--install", str(objects), "--prefix", str(destination)],
    ):
        if subprocess.run(command).returncode != 0:
            sys.exit(f"error: building the kernels failed (its output stands above): {' '.join(command)}")


def _forget_vanished_tools(objects: Path) -> None:
    """Removes a build folder whose CMake, ninja or sources are gone: pip's isolated builds use tools that vanish."""
    cache = objects / "CMakeCache.txt"
    if not cache.is_file():
        return
    entries = dict(line.split("=", 1) for line in cache.read_text().splitlines() if "=" in line and line[0].isalpha())
    tools = [entries.get(f"CMAKE_{name}:INTERNAL", "") for name in ("COMMAND", "HOME_DIRECTORY")]
    tools.append(entries.get("CMAKE_MAKE_PROGRAM:FILEPATH", ""))
    if not all(Path(tool).exists() for tool in tools) or Path(tools[1]) != ROOT:
        shutil.rmtree(objects)


def _usable_cmake() -> str | None:
    """The CMake that the path finds, if it is new enough for CMakeLists.txt."""
    cmake = shutil.which("cmake")
    if cmake is None:
        return None
    found = re.search(
        r"version (\d+)\.(\d+)", subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    )
    return cmake if found and (int(found[1]), int(found[2])) >= (3, 20) else None


def _build_requirements() -> list[str]:
    """What pip must bring for the build: only what this machine lacks."""
    wanted = []
    if _usable_cmake() is None:
        wanted.append("cmake>=3.20")
    if shutil.which("ninja") is None and shutil.which("make") is None:
        wanted.append("ninja")
    return wanted


if __name__ == "__main__":
    build.sub_commands = [*build.sub_commands, ("build_kernels", None)]
    setup(
        distclass=KernelDistribution,
        packages=[
            *find_namespace_packages(include=["maskdiff", "maskdiff.*"], exclude=["*__pycache__*"]),
            PACKAGE,
            *(f"{PACKAGE}.{name}" for name in find_namespace_packages("kernels", ["*__pycache__*"], ["ops", "ops.*"])),
        ],
        package_dir={PACKAGE: "kernels"},
        setup_requires=_build_requirements(),
        cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": PlatformWheel},
    )
