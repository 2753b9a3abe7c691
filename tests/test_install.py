"""The package as a user gets it: source archive, wheel, installation; and libraries that do not fit."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
BUILD_SDIST = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"


def python(
    *arguments: str, where: Path, path: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASKDIFF_", "PYTHON"))}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    environment |= variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=where, env=environment, timeout=300)


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory) -> Path:
    """A folder that makes importing PyTorch or NumPy fail: a build must need neither."""
    folder = tmp_path_factory.mktemp("no_torch")
    for name in ("torch", "numpy"):
        (folder / f"{name}.py").write_text(f"raise ImportError('the build imports {name}')")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory, no_torch) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    done = python("-c", BUILD_SDIST, str(folder), where=ROOT, path=no_torch)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sources, no_torch) -> Path:
    """The wheel that pip builds from the source archive alone."""
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", "."]
    done = python(*command, where=sources, path=no_torch, MASKDIFF_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (sources / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and goes before the checkout's own installation."""
    folder = tmp_path_factory.mktemp("installed")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    done = python(*command, where=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_source_archive_carries_what_a_build_needs(sources):
    for folder, pattern in (("csrc", "*.*"), ("kernels", "*.py"), ("maskdiff", "*.py")):
        expected = {
            path.relative_to(ROOT) for path in (ROOT / folder).rglob(pattern) if "__pycache__" not in path.parts
        }
        missing = {path for path in expected if not (sources / path).is_file()}
        assert missing == set()
    assert all((sources / name).is_file() for name in ("CMakeLists.txt", "setup.py", "LICENSE", "README.md"))
    assert list(sources.rglob("*.so")) == []


def test_wheel_serves_every_python(wheel):
    assert re.fullmatch(r"maskdiff-[\d.]+-py3-none-(linux|manylinux\w*)_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (info,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        assert b"Root-Is-Purelib: false" in opened.read(info)
    for package, folder in (("maskdiff", "maskdiff"), ("maskdiff_kernels", "kernels")):
        modules = {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")} == modules
    compiled = {name for name in names if name.endswith(".so")}
    assert compiled == {"maskdiff_kernels/lib/libmaskdiff_cpu.so"}
    assert {"maskdiff/py.typed", "maskdiff_kernels/py.typed", "maskdiff_kernels/choices.json"} <= names
    assert not [name for name in names if name.split("/")[0] in ("csrc", "tests", "benchmarks", "kernels")]


def test_runs_from_anywhere(installed, tmp_path):
    done = python("-m", "maskdiff.doctor", where=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert f"in {installed / 'maskdiff'}" in done.stdout and f"in {installed / 'maskdiff_kernels'}" in done.stdout
    assert "can run: C++" in done.stdout and "PROBLEM" not in done.stdout and "Error" not in done.stdout


def test_runs_from_the_repository_root(installed):
    """There the folder maskdiff/ comes before the installed package; the kernels are the installed ones."""
    done = python("-m", "maskdiff.doctor", where=ROOT, path=installed)
    assert done.returncode == 0, done.stderr
    assert f"in {ROOT / 'maskdiff'}" in done.stdout and f"in {installed / 'maskdiff_kernels'}" in done.stdout
    assert "PROBLEM" not in done.stdout and "Error" not in done.stdout


def test_train_command_from_anywhere(installed, tmp_path):
    for arguments in (["-m", "maskdiff.train"], [str(installed / "bin" / "maskdiff"), "train"]):
        done = python(*arguments, "--help", where=tmp_path, path=installed)
        assert done.returncode == 0 and "--preset" in done.stdout, done.stdout + done.stderr


def test_console_script(installed, tmp_path):
    script = str(installed / "bin" / "maskdiff")
    done = python(script, "doctor", where=tmp_path, path=installed)
    assert done.returncode == 0 and f"in {installed / 'maskdiff_kernels'}" in done.stdout
    done = python(script, where=tmp_path, path=installed)
    assert done.returncode == 0 and "train" in done.stdout
    done = python(script, "trian", "--out", "x", where=tmp_path, path=installed)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no command 'trian': did you mean 'train'?\n"
    done = python(script, "qqqq", where=tmp_path, path=installed)
    assert done.returncode == 2 and done.stderr.startswith("error: no command 'qqqq': there are train, ")


USE = "from maskdiff.errors import run_command; import maskdiff_kernels as k; run_command(lambda: print(k.cpu_level()))"


def spoilt(folder: Path, tmp_path: Path) -> Path:
    """A copy of an installation, to break."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_missing_library_is_one_clear_error(installed, tmp_path):
    copy = spoilt(installed, tmp_path)
    assert python("-c", USE, where=tmp_path, path=copy).returncode == 0
    (copy / "maskdiff_kernels" / "lib" / "libmaskdiff_cpu.so").unlink()
    error = one_error(python("-c", USE, where=tmp_path, path=copy))
    assert "missing" in error and "pip install" in error
    done = python("-m", "maskdiff.doctor", where=tmp_path, path=copy)
    assert done.returncode == 0 and "PROBLEM: the compiled kernels are missing" in done.stdout


def test_foreign_library_is_one_clear_error(installed, tmp_path):
    copy = spoilt(installed, tmp_path)
    (copy / "maskdiff_kernels" / "lib" / "SOURCE_VERSION").write_text("0123456789abcdef\n")
    error = one_error(python("-c", USE, where=tmp_path, path=copy))
    assert "stale" in error and "0123456789abcdef" in error and "pip install" in error


def test_what_is_no_library_is_one_clear_error(installed, tmp_path):
    (spoilt(installed, tmp_path) / "maskdiff_kernels" / "lib" / "libmaskdiff_cpu.so").write_bytes(b"of another system")
    error = one_error(python("-c", USE, where=tmp_path, path=tmp_path / "copy"))
    assert "does not load" in error and "pip install" in error


def test_changed_sources_make_the_library_stale(installed, tmp_path):
    """In a checkout the libraries are compared with the sources that lie there."""
    checkout = tmp_path / "checkout"
    for name in ("csrc", "maskdiff", "kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    shutil.copytree(installed / "maskdiff_kernels" / "lib", checkout / "kernels" / "lib")
    (checkout / "maskdiff_kernels").symlink_to("kernels")
    assert python("-c", USE, where=tmp_path, path=checkout).returncode == 0
    with open(checkout / "csrc" / "cpu" / "entry.cpp", "a") as file:
        file.write("// changed\n")
    error = one_error(python("-c", USE, where=tmp_path, path=checkout))
    assert "stale" in error and "pip install" in error


@pytest.fixture
def door(monkeypatch):
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_of_maskdiff", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_brings_only_the_tools_that_lack(door, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert door._build_requirements() == ["cmake>=3.20", "ninja"]
    for name, says in (("cmake", "cmake version 3.16.3"), ("make", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / name).chmod(0o755)
    assert door._build_requirements() == ["cmake>=3.20"]
    (tmp_path / "cmake").write_text("#!/bin/sh\necho cmake version 4.0.1\n")
    assert door._build_requirements() == []


def test_a_build_folder_of_vanished_tools_is_forgotten(door, tmp_path):
    """pip's isolated builds leave a folder whose CMake and ninja were deleted after the build."""
    objects = tmp_path / "objects"
    objects.mkdir()
    cache = objects / "CMakeCache.txt"
    lines = "CMAKE_COMMAND:INTERNAL={0}\nCMAKE_MAKE_PROGRAM:FILEPATH={0}\nCMAKE_HOME_DIRECTORY:INTERNAL={1}\n"
    cache.write_text(lines.format(sys.executable, ROOT))
    door._forget_vanished_tools(objects)
    assert cache.is_file()
    for tool, root in ((tmp_path / "gone", ROOT), (sys.executable, tmp_path)):
        objects.mkdir(exist_ok=True)
        cache.write_text(lines.format(tool, root))
        door._forget_vanished_tools(objects)
        assert not objects.exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"MASKDIFF_CUDA": "yes"}, "give 1"), ({"MASKDIFF_CUDA": "1", "PATH": ""}, "there is no nvcc")],
)
def test_cmake_explains_wrong_switches(tmp_path, variables, message):
    cmake, compiler = shutil.which("cmake"), shutil.which("c++")
    environment = os.environ | variables | {"CUDA_HOME": "", "CUDA_PATH": ""}
    command = [cmake, "-G", "Unix Makefiles", "-S", str(ROOT), "-B", str(tmp_path), f"-DCMAKE_CXX_COMPILER={compiler}"]
    command += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('make')}", f"-DPython3_EXECUTABLE={sys.executable}"]
    if variables["MASKDIFF_CUDA"] == "1":
        command += [
            "-DNVCC=NVCC-NOTFOUND",
            "-DCMAKE_FIND_ROOT_PATH=/nowhere",
            "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY",
        ]
        environment["PATH"] = os.environ["PATH"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and message in done.stderr, done.stderr
