"""The op draw_batch: op.py is its contract, reference.py its meaning."""
