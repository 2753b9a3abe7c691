"""The ops, one folder each: op.py (contract, checks, registration), reference.py (meaning), one file per kernel."""
