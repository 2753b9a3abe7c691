"""maskdiff: fast training of image diffusion transformers on masked images. What is masked costs nothing."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_maskdm"]

if TYPE_CHECKING:
    from maskdiff.pretrained import load as load
    from maskdiff.pretrained import load_maskdm as load_maskdm


def __getattr__(name: str):
    # Lazy, so that `import maskdiff` (every command starts with it) does not pay for importing torch.
    if name in ("load", "load_maskdm"):
        return getattr(importlib.import_module("maskdiff.pretrained"), name)
    raise AttributeError(f"module 'maskdiff' has no attribute {name!r}")
