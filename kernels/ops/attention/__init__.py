"""The op attention: op.py is its contract, reference.py its meaning."""
