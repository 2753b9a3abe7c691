"""The op gelu: op.py is its contract, reference.py its meaning."""
