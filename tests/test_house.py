"""The rules of the house that a machine can check: where things may stand, who may import whom, how long files are."""

import ast
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "kernels", "maskdiff", "benchmarks", "tests")
CODE = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and "__pycache__" not in path.parts
)
KERNELS = [path for path in CODE if path.suffix == ".cu"]
HEAVY = {"torchmetrics", "diffusers", "sklearn", "matplotlib", "xformers", "apex", "triton", "torchvision", "timm"}
HEAVY |= {"pyarrow", "datasets", "pandas", "tensorboard", "wandb", "altair", "vl_convert"}
OPS = sorted(path.parent.name for path in (ROOT / "kernels" / "ops").glob("*/op.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_comments(path: Path) -> str:
    """A C++ file's text; comments and strings are blanked, lines stay where they are."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\""
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), path.read_text(), flags=re.DOTALL)


def files_with(pattern: str, under: str = "csrc") -> set[str]:
    """The C++ files below a folder whose code (comments left out) has a match."""
    files = [path for path in CODE if path.suffix != ".py" and path.is_relative_to(ROOT / under)]
    return {name(path) for path in files if re.search(pattern, without_comments(path))}


def test_lengths_of_files():
    lengths = {name(path): len(path.read_text().splitlines()) for path in CODE}
    assert {path: length for path, length in lengths.items() if length > 600} == {}
    assert statistics.median(lengths.values()) < 200
    assert lengths["tests/emulation/emulator.h"] <= 400


def test_first_line_says_what_a_file_is_for():
    for path in CODE:
        first, opening = path.read_text().split("\n")[0], '"""' if path.suffix == ".py" else "// "
        empty = path.name == "__init__.py" and not path.read_text()
        assert empty or (first.startswith(opening) and len(first.split()) >= 4), (name(path), first)


def test_width_of_the_readme():
    """Tables and images cannot be wrapped."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))] == []


def imports(path: Path, top_only: bool) -> set[str]:
    """Names of the modules that a Python file imports, relative imports made whole."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in _at_import_time(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def _at_import_time(node: ast.AST):
    """All nodes that run when the module is imported: not the insides of functions, not TYPE_CHECKING blocks."""
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if inside or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            continue
        yield child
        yield from _at_import_time(child)


def python_files(folder: str) -> list[Path]:
    return [path for path in CODE if path.suffix == ".py" and path.is_relative_to(ROOT / folder)]


def test_kernels_know_nothing_of_training():
    for path in python_files("kernels"):
        wrong = {module for module in imports(path, top_only=False) if re.match(r"maskdiff(\.|$)", module)}
        assert wrong == set(), name(path)


def test_packing_knows_nothing_of_training():
    """Worker processes and people without PyTorch import it: of the rest of maskdiff it needs two small modules."""
    for path in python_files("maskdiff/packing"):
        for module in imports(path, top_only=False):
            own = module.startswith("maskdiff.packing") or module in ("maskdiff.errors", "maskdiff.durable")
            assert own or module.split(".")[0] not in ("", "maskdiff", "maskdiff_kernels", "torch"), (
                name(path),
                module,
            )


def test_nothing_imports_tests_or_benchmarks():
    for path in (*python_files("kernels"), *python_files("maskdiff")):
        tops = {module.split(".")[0] for module in imports(path, top_only=False)}
        assert tops.isdisjoint({"tests", "benchmarks", "conftest", "emulate"}), name(path)


def test_heavy_packages_are_imported_where_they_are_used():
    for path in (*python_files("kernels"), *python_files("maskdiff"), *python_files("benchmarks")):
        tops = {module.split(".")[0] for module in imports(path, top_only=True)}
        allowed = {"triton"} if path.name == "triton_kernel.py" else set()  # which others import inside functions
        assert tops.isdisjoint(HEAVY - allowed), name(path)


def test_measuring_needs_no_heavy_package():
    """A machine with a GPU may lack them: the bench, the doctor and the kernels import without."""
    code = f"""
import sys
for name in {sorted(HEAVY | {"tyro", "scipy"})!r}:
    sys.modules[name] = None  # importing it fails
import maskdiff_kernels, maskdiff.bench, maskdiff.doctor, maskdiff.step, maskdiff.model, maskdiff.baselines
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ("gpu_kernels.py", ["--ops=attention", "--minutes=0"], "cases are left"),
        ("gpu_step.py", ["--only=dense maskdiff-own", "--rounds=1"], "no picture: matplotlib is not here"),
    ],
)
def test_timing_on_a_card_needs_pytorch_alone(file, options, said, tmp_path):
    """A bare machine with a GPU has PyTorch, Triton and NumPy."""
    absent = sorted(HEAVY | {"tyro", "scipy", "pytest", "pytest_benchmark", "safetensors", "PIL", "tqdm"})
    code = f"""
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = [{file!r}, "--device=cpu", "--out={tmp_path}/rows.json", *{options!r}]
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/{file}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and said in done.stdout, done.stderr


def test_import_has_no_side_effects():
    """Importing the kernels loads no library and touches neither threads nor switches."""
    code = """
import os, torch
before = torch.get_num_threads(), torch.get_num_interop_threads(), dict(os.environ), torch.get_default_dtype()
import maskdiff_kernels, maskdiff.step
assert before == (torch.get_num_threads(), torch.get_num_interop_threads(), dict(os.environ), torch.get_default_dtype())
assert "libmaskdiff" not in open("/proc/self/maps").read()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_everywhere(op: str):
    places = [f"csrc/cpu/{op}.cpp", f"kernels/ops/{op}/op.py", f"kernels/ops/{op}/reference.py"]
    places += [f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"]
    assert [place for place in places if not (ROOT / place).is_file()] == []
    assert re.search(rf"\bmaskdiff_cpu_{op}\(", (ROOT / "csrc" / "maskdiff_kernels.h").read_text())


def test_no_pytorch_and_no_python_in_compiled_code():
    assert files_with(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)") == set()


def test_nothing_builds_with_fast_math():
    for file in ("CMakeLists.txt", "setup.py", "Makefile", "tests/emulation/emulate.py"):
        assert not re.search(r"-ffast-math|-Ofast|use_fast_math|-funsafe-math", (ROOT / file).read_text()), file


def test_one_launch_assembly_in_two_places_one_question_for_the_compiler():
    assert files_with(r"<<<") == {"csrc/cuda/launch.cuh"}
    assert files_with(r"\b(asm|__asm__)\b") == {"csrc/cuda/ptx.cuh", "csrc/cpu/amx.h"}
    assert files_with(r"\b__CUDACC__\b") == {"csrc/cuda/ptx.cuh", "csrc/common/portable.h"}
    assert files_with(r"\b__CUDA_ARCH__\b") == set()


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_use_the_wrappers_alone(path: Path):
    text = without_comments(path)
    banned = (
        r"\b(threadIdx|blockIdx|blockDim|gridDim|__shared__|__global__|__device__|extern __shared__|__sync\w+|__shfl\w+"
    )
    banned += r"|__ballot\w*|atomic\w+|cuda[A-Z]\w+|wgmma|cp_async_bulk|cooperative_groups|__nv_bfloat16|half2?)\b"
    assert re.findall(banned, text) == []
    includes = re.findall(r"#include [<\"]([^>\"]+)", path.read_text())
    allowed = r"(cuda|common)/\w+\.(cuh|h)|maskdiff_kernels\.h|c?std(int|def)(\.h)?"
    assert [header for header in includes if not re.fullmatch(allowed, header)] == []
    meeting = (
        r"\b(sync_block|sync_warp|shuffle(_xor|_up|_down)?|vote|load_matrix_x4(_transposed)?|mma_(bf16|fp16))(<\w+>)?\("
    )
    crowded = [line for line in text.splitlines() if len(re.findall(meeting, line)) > 1]
    assert crowded == []  # the emulator tells barriers and collectives apart by their lines


def test_the_emulator_has_every_wrapper():
    """ptx.cuh and its twin define the same functions."""
    function = r"^(?:DEVICE|EMULATOR)[^=;(]*?\b(\w+)\("
    wrappers = re.findall(function, without_comments(ROOT / "csrc/cuda/ptx.cuh"), re.MULTILINE)
    twin = without_comments(ROOT / "tests/emulation/instructions.h").split("namespace ptx")[1]
    assert set(wrappers) - {"shared_address"} == set(re.findall(function, twin, re.MULTILINE))
    conformance = ast.parse((ROOT / "tests/emulation/conformance.py").read_text())
    (checked,) = (
        n.value for n in conformance.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "CHECKS"
    )
    assert set(" ".join(ast.literal_eval(checked).values()).split()) == set(wrappers) - {"shared_address"}
    tried = (ROOT / "tests/emulation/wrappers.cu").read_text() + (ROOT / "tests/emulation/faults.cu").read_text()
    assert [wrapper for wrapper in set(wrappers) - {"shared_address"} if wrapper not in tried] == []


def test_console_commands_exist():
    from maskdiff.__main__ import COMMANDS

    for command in COMMANDS:
        text = (ROOT / "maskdiff" / f"{command}.py").read_text()
        assert "def main()" in text and '__name__ == "__main__"' in text, command


def test_versions_agree():
    import maskdiff

    (stated,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert maskdiff.__version__ == stated


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no repository")
def test_nothing_built_is_committed():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split(
        "\n"
    )
    built = r".*\.(so|o|a|whl|pyc|safetensors|egg-info)|.*/lib/.*|build/.*|runs/.*"
    assert [path for path in tracked if re.fullmatch(built, path)] == []
