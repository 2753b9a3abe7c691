"""The op noisy_patches: op.py is its contract, reference.py its meaning."""
