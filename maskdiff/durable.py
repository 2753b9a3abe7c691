"""Files that are written whole or not at all, and on disk when that is said."""

import json
import os
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes a file of plain values: readers see the one before or this one, never a part."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
