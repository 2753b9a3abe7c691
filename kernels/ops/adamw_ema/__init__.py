"""The op adamw_ema: op.py is its contract, reference.py its meaning."""
