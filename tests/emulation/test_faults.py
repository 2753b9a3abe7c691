"""The emulator notices each planted fault of faults.cu, and nothing in the sound versions."""

import ctypes
import re
from dataclasses import dataclass

import conformance
import emulate
import numpy as np
import pytest
from test_wrappers import SOURCES

pytestmark = pytest.mark.skipif(bool(emulate.no_emulator()), reason=emulate.no_emulator())
THREADS = 64
IN = np.arange(3 * THREADS, dtype=np.uint32).reshape(3, THREADS) + 100  # three blocks
MIRROR, LANES = np.arange(THREADS)[::-1], np.arange(THREADS)


@dataclass(frozen=True)
class Fault:
    """A kernel of faults.cu, by its place in FAULTS: what it computes when sound, and what notices the fault."""

    name: str
    sound: np.ndarray
    error: str = ""  # a pattern in the emulator's error
    numbers: bool = False  # wrong results, or an error, for every one of a few seeds
    thread: bool = False  # reported by thread sanitizer
    address: bool = False  # reported by address sanitizer


def line_of(text: str, nth: int = 0) -> int:
    """The line of faults.cu where a text stands for the nth time."""
    lines = (emulate.HERE / "faults.cu").read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if text in line][nth]


FAULTS = (
    Fault("no_block_barrier", IN[:, MIRROR], numbers=True, thread=True),
    Fault("no_warp_barrier", IN[:, LANES ^ 31], numbers=True, thread=True),
    Fault("shuffle_for_barrier", IN[:, LANES ^ 31], thread=True),
    Fault("reuse_without_barrier", IN[:, MIRROR] * 3, numbers=True, thread=True),
    Fault("copy_not_awaited", IN, numbers=True),
    Fault("copy_not_committed", IN, error="asynchronous copy that it did not wait for"),
    Fault("uninitialised_shared", IN[:, MIRROR], numbers=True),
    Fault("read_past_tensor", np.append(IN.ravel()[1:], IN[0, 0]).reshape(3, THREADS), address=True),
    Fault("store_past_shared", IN[:, MIRROR], address=True),
    Fault("divergent_barrier", IN, error=r"comes to sync_block, line \d+, while others wait at sync_block, line \d+"),
    Fault("early_exit", IN, error="threads 0-39 wait at sync_block.*threads 40-40 have returned"),
    Fault("half_warp_product", IN, error="no thread can go on.*threads 0-15 wait at mma_bf16"),
    Fault("two_collectives", IN[:, LANES ^ 1], error=r"(vote|shuffle_xor), line \d+, while others wait at"),
    Fault("misaligned_matrix", IN[:, LANES // 32 * 32 + LANES % 32 // 4], error="load_matrix_x4, line .*not 16-byte"),
    Fault("misaligned_copy", IN, error="copy_async16, line .*not 16-byte"),
    Fault("copy_outside_shared", IN, error="copy_async16, line .*not in shared memory"),
    Fault("pool_overrun", IN[:, MIRROR], error="array 0 of the pool ends at byte 272, the launch gave 256"),
    Fault("blocks_talk", IN, thread=True),
    Fault("copy_read_early", IN, numbers=True),
)
RUN_ONE = """
import sys, ctypes, numpy as np, conformance
library, number, planted = ctypes.CDLL(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
memory, values = conformance.Host(), np.frombuffer(bytes.fromhex(sys.argv[4]), np.uint32)
out = memory.put(np.zeros_like(values))
library.fault_run(number, planted, 3, memory.put(values), out)
"""


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulate.load(emulate.build("emulated", SOURCES))


def run(library: ctypes.CDLL, fault: Fault, planted: bool, seed: int) -> tuple[np.ndarray, str]:
    memory = conformance.Host()
    library.emulator_seed(ctypes.c_uint64(seed))
    source, out = memory.put(IN), memory.put(np.zeros_like(IN))
    code = library.fault_run(FAULTS.index(fault), int(planted), len(IN), source, out)
    memory.take(source, IN.shape, np.uint32)
    return memory.take(out, IN.shape, np.uint32), library.wrapper_error(code).decode() if code else ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_plain_build(library, fault: Fault):
    for seed in range(6):
        numbers, error = run(library, fault, False, seed)
        assert error == ""
        np.testing.assert_array_equal(numbers, fault.sound)
    if fault.numbers:  # fixed orders, ascending and descending, suffice
        found = [run(library, fault, True, seed) for seed in (0, 1)]
        assert any(error or (numbers != fault.sound).any() for numbers, error in found)
    if fault.error:
        for seed in range(6):
            numbers, error = run(library, fault, True, seed)
            assert re.search(fault.error, error)


def test_errors_name_the_lines(library):
    """Both lines of a divergent barrier, as the editor shows them."""
    fault = next(fault for fault in FAULTS if fault.name == "divergent_barrier")
    first = line_of("if (planted && p.warp) {") + 1
    _, error = run(library, fault, True, 0)
    assert f"line {first}, while others wait at sync_block, line {first + 2}" in error


@pytest.mark.parametrize(
    ("fault", "sanitizer"),
    [(fault, name) for name in ("thread", "address") for fault in FAULTS if getattr(fault, name)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_sanitized_build(fault: Fault, sanitizer: str):
    built = str(emulate.build("emulated", SOURCES, sanitizer))
    for planted in (False, True):
        arguments = ["-c", RUN_ONE, built, str(FAULTS.index(fault)), str(int(planted)), IN.tobytes().hex()]
        done = emulate.run_sanitized(sanitizer, *arguments)
        reported = f"{sanitizer.capitalize()}Sanitizer" in done.stderr
        assert (reported, done.returncode != 0) == (planted, planted), done.stderr
