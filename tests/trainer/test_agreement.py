"""Training with every implementation of every op in turn: agreement_cases.py, in a process that interprets Triton."""

from pathlib import Path

import pytest
from triton_compiled import run_cases

pytest.importorskip("triton")


def test_training_agrees_with_every_implementation_in_turn():
    run_cases(Path(__file__).with_name("agreement_cases.py"), TRITON_INTERPRET="1")
