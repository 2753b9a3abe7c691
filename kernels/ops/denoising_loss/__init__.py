"""The op denoising_loss: op.py is its contract, reference.py its meaning."""
