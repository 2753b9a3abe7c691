"""`python -m maskdiff.doctor`: what is installed here, what the processor can do, and which kernels run and why."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16")
SWITCHES = ("MASKDIFF_KERNELS", "MASKDIFF_CPU_ISA", "MASKDIFF_CACHE", "OMP_NUM_THREADS")


def report() -> Iterator[str]:
    """The lines of the report. Whatever is broken here shows as a line of its own: this is what one runs then."""
    for title, section in (
        ("Versions", _versions),
        ("Processor", _processor),
        ("Kernels", _kernels),
        ("CUDA", _cuda),
        ("Environment", _environment),
    ):
        yield title
        try:
            yield from (f"  {line}" for line in section())
        except Exception as error:  # noqa: BLE001  a broken installation breaks anywhere, and the rest still helps
            yield f"  {type(error).__name__}: {error}"


def _versions() -> Iterator[str]:
    yield f"maskdiff {_version('maskdiff') or 'not installed'} in {Path(__file__).parent}"
    yield f"python {platform.python_version()} on {platform.platform()}"
    requirements = importlib.metadata.requires("maskdiff") or []
    names = [(re.split(r"[^\w.-]", line)[0], "extra ==" in line) for line in requirements]
    yield ", ".join(f"{name} {_version(name) or 'MISSING'}" for name, extra in names if not extra)
    optional = dict.fromkeys(name for name, extra in names if extra)
    yield "optional: " + ", ".join(f"{name} {_version(name) or 'absent'}" for name in optional)


def _processor() -> Iterator[str]:
    import torch

    from . import precision

    words = _cpuinfo()
    yield f"{words.get('model name', platform.machine())}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs"
    flags = set(words.get("flags", "").split())
    yield "features: " + (" ".join(name for name in FEATURES if name in flags) or "none of " + " ".join(FEATURES))
    yield f"torch uses {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    cpu = torch.device("cpu")
    yield f"--precision auto is {precision.words(precision.resolve_precision('auto', cpu), cpu)}"


def _kernels() -> Iterator[str]:
    import maskdiff_kernels
    from maskdiff_kernels import dispatch, library

    yield f"maskdiff_kernels in {Path(maskdiff_kernels.__file__).parent}"
    yield from _try(
        lambda: (
            f"CPU library: sources {library.source_version()}, instruction set {library.cpu_level()}"
            f" of {', '.join(library.cpu_levels())}"
        )
    )
    for op in sorted(folder.parent.name for folder in Path(maskdiff_kernels.__file__).parent.glob("ops/*/op.py")):
        yield from _try(lambda op: f"{op}: {dispatch.chosen('cpu')[op]} runs on CPU tensors", op)
        for name, (able, reason) in maskdiff_kernels.backends(op).items():
            yield f"  {name:10} {'can run' if able else 'cannot'}: {reason}"


def _cuda() -> Iterator[str]:
    import torch

    from maskdiff_kernels import library
    from maskdiff_kernels.source_version import LIBRARIES

    nvcc = shutil.which("nvcc")
    if (LIBRARIES / "libmaskdiff_cuda.so").is_file():
        yield from _try(lambda: f"library: for compute capabilities {library.cuda().maskdiff_cuda_archs().decode()}")
    elif nvcc:
        yield f"library: not built ({nvcc} is here: MASKDIFF_CUDA=1 pip install ... builds it without a GPU too)"
    else:
        yield "library: not built, no nvcc"
    if not torch.cuda.is_available():
        yield f"GPU: none that torch {torch.__version__} can use"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"


def _environment() -> Iterator[str]:
    for name in SWITCHES:
        yield f"{name}={os.environ[name]}" if name in os.environ else f"{name} not set"


def _try(line: Callable[..., str], *arguments: str) -> Iterator[str]:
    try:
        yield line(*arguments)
    except Exception as error:  # noqa: BLE001
        yield f"PROBLEM: {error}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty where there is no such file."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def main() -> None:
    """Prints the report."""
    for line in report():
        print(line)


if __name__ == "__main__":
    main()
