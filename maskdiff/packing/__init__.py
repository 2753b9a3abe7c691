"""Packing: from pictures of any source to a packed set on disk. Knows nothing of the trainer, and needs no PyTorch."""
