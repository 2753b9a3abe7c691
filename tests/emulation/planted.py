"""Copies of kernels with one fault each, in one library: what the tests that plant faults share."""

import functools
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import emulate
import numpy as np

Results = Sequence[np.ndarray]


@dataclass(frozen=True)
class Fault:
    """A text of a file and what stands there instead; `nth` of its places."""

    name: str
    file: str
    old: str
    new: str
    nth: int = 0
    sanitizer: str = ""  # the only one that notices; else: the numbers, or the emulator
    case: str = ""  # with a sanitizer: what to run, of the CASES


@functools.cache
def build(
    op: str,
    files: Sequence[str],  # of the kernels and of what they include, in this order
    entries: Sequence[str],  # maskdiff_cuda_... without that
    faults: Sequence[Fault],
    sanitizer: str = "",
    trimmed: Callable[[Fault, str], str] = lambda fault, text: text,
) -> str:
    """The library with a copy of the kernels for each fault: entries fault_0_<entry>, ... fault_1_<entry>, ...

    Not optimised, unlike the emulator that it includes: compiling so many copies takes longer than running them.
    """
    parts = ["// Planted faults.", *(f'#include "{name}"' for name in ("cuda/launch.cuh", "maskdiff_kernels.h"))]
    parts += ['#pragma GCC optimize("O0")']
    parts += [f'#pragma GCC diagnostic ignored "-Wunused-{what}"' for what in ("variable", "parameter")]  # by a fault
    header = (emulate.ROOT / "csrc/maskdiff_kernels.h").read_text()
    for number, fault in enumerate(faults):
        texts = {file: (emulate.ROOT / file).read_text() for file in files}
        pieces = texts[fault.file].split(fault.old)
        assert len(pieces) > fault.nth + 1, f"{fault.name}: {fault.old!r} is not in {fault.file}"
        texts[fault.file] = (
            fault.old.join(pieces[: fault.nth + 1]) + fault.new + fault.old.join(pieces[fault.nth + 1 :])
        )
        text = trimmed(fault, re.sub(r"#(include|pragma once).*", "", "".join(texts.values())))
        parts.append(f"namespace copy_{number} {{\nnamespace maskdiff {{\nusing namespace ::maskdiff;\n}}\n{text}\n}}")
        for entry in entries:
            ((kind, declared),) = re.findall(rf"(\w+) maskdiff_cuda_{entry}\(([^)]*)\)", header)
            names = ", ".join(re.findall(r"(\w+)(?:,|$)", declared))
            call = f"return copy_{number}::maskdiff_cuda_{entry}({names});"
            parts.append(f'extern "C" MASKDIFF_API {kind} fault_{number}_{entry}({declared}) {{ {call} }}')
    text, folder = "\n".join(parts), emulate.ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{op}_faults_{zlib.crc32(text.encode()):08x}.cu"  # another text, another build
    path.write_text(text)
    return str(emulate.build(f"{op}-faults", [path, emulate.EXPORTS], sanitizer))


def differs(pairs: Iterable[tuple[Results, Callable[[], Results]]]) -> bool:
    """Whether, in any pair, the emulator reports an error or a bit is another: the sound results, what runs a copy."""
    for sound, run in pairs:
        try:
            results = run()
        except RuntimeError:
            return True
        if any((x.view(np.uint8) != y.view(np.uint8)).any() for x, y in zip(sound, results, strict=True)):
            return True
    return False


def sanitizer_notices(fault: Fault, script: str, *arguments: str) -> str:
    """Empty where the fault's sanitizer stops the script with a report; else what was said."""
    done = emulate.run_sanitized(fault.sanitizer, script, *arguments)
    report = f"{fault.sanitizer.capitalize()}Sanitizer"
    return "" if done.returncode and report in done.stderr else f"{done.returncode}: {done.stdout}{done.stderr}"
