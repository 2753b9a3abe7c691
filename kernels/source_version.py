"""Says which csrc/ a compiled library was built from. Run by path from CMake and setup.py, imported by library.py.

It imports nothing of this package, so that a build needs neither PyTorch nor an installed maskdiff_kernels.
"""

import hashlib
import sys
from pathlib import Path

SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
PACKAGE = Path(__file__).resolve().parent
LIBRARIES = PACKAGE / "lib"  # where a build puts the compiled libraries
RECORD = LIBRARIES / "SOURCE_VERSION"  # written by a build: the version of the sources it compiled


def hash_sources(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """The first 16 hex digits of the SHA-256 over the paths below a folder and the bytes of its source files, in order.

    Both are preceded by their length, so that no two trees share one input. ValueError if there is no source file.
    """
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.suffix in suffixes)
    if not files:
        raise ValueError(f"no source files in {str(folder)!r}")
    digest = hashlib.sha256()
    for name, path in files:
        for part in (name.encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()[:16]


def expected_version() -> str | None:
    """The version that this package's libraries must report: that of the sources beside it, in a checkout; else that
    recorded by the build that installed it; None if neither is there (nothing was ever built).
    """
    csrc = PACKAGE.parent / "csrc"
    if PACKAGE.name == "kernels" and (csrc / "maskdiff_kernels.h").is_file():
        return hash_sources(csrc)
    return RECORD.read_text().strip() if RECORD.is_file() else None


if __name__ == "__main__":
    print(hash_sources(Path(sys.argv[1])))
