"""The op layer_norm: op.py is its contract, reference.py its meaning."""
