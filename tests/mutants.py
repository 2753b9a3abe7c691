"""`make mutants`: plants small faults one at a time in a copy of the tree; the tests that are named must notice each.

    python tests/mutants.py [--only TEXT] [--list]

A fault that no test notices has survived: exit status 1. So it is where an old text is not found exactly once, or where
its source does not compile: such a fault proves nothing. Without --only, the faults that tests/emulation plants by
itself, in CUDA kernels that run in the emulator, are planted too.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "csrc",
    "kernels",
    "maskdiff",
    "tests",
    "benchmarks",
    "CMakeLists.txt",
    "pyproject.toml",
    "setup.py",
    "README.md",
)
TIMEOUT = 600  # seconds for the tests of one fault; a fault that makes them hang is noticed

ATTENTION = ("tests/ops/test_attention.py", "-k", "float64 or log_sum or scale or ragged or pairs")
TRITON = ("tests/ops/test_attention_triton.py", "-k", "interpreter")
ADAMW = ("tests/ops/test_adamw_ema.py", "-k", "not compile and not opcheck")
DRAW, NOISY, LOSS = (f"tests/ops/test_{op}.py" for op in ("draw_batch", "noisy_patches", "denoising_loss"))
EMULATED_FAULTS = "test_planted_fault or test_plain_build or test_sanitized_build"
PLAIN_FAULTS = ("tests/emulation/test_faults.py", "-k", "plain")


def trainer(*modules: str) -> tuple[str, ...]:
    return tuple(f"tests/trainer/test_{module}.py" for module in modules)


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest


# File, tests that must notice, faults (old text, new text).
PLANTED: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    ("csrc/common/philox.h", (DRAW,), (("round < 10", "round < 9"),)),
    (
        "csrc/common/normals.h",
        (NOISY,),
        (
            ("y_sign = (quadrant >> 1) << 31", "y_sign = (quadrant & 1) << 31"),
            ("minus_log_fraction((a >> 8) + 1)", "minus_log_fraction((a >> 8) | 1)"),
        ),
    ),
    ("csrc/common/floats.h", (NOISY,), (("bits + 0x7FFFu + (bits >> 16 & 1)", "bits + 0x8000u"),)),
    (
        "csrc/common/patches.h",
        (NOISY,),
        (
            ("(row - channels) - 2 * at->column", "(row - channels) - at->column"),
            ("(elements + 3) / 4", "elements / 4"),
            ("2.0 / 255.0", "2.0 / 256.0"),
        ),
    ),
    (
        "csrc/common/adamw.h",
        ADAMW,
        (
            ("(int64_t)adam_step + 1;", "(int64_t)adam_step;"),
            ("norm > bound ?", "bound > 0.0f ?"),
            ("const float single = (float)sum;", "const float single = (float)__builtin_sqrt(sum);"),
            ("young < decay ? young : decay", "decay"),
            ("* f.root + f.eps", "+ f.eps"),
            ("x.master = keep * x.master", "x.master = f.keep[1] * x.master"),
        ),
    ),
    (
        "csrc/cpu/adamw_ema.cpp",
        ADAMW,
        (
            ("sums[v] += y * y;", "sums[v] = y * y;"),
            ("left >= 8;", "left > 8;"),
            ("at - offset, count, buffer", "0, count, buffer"),
            ("low < count ? low : count", "count"),
            ("c >= chunks * part / parts", "c > chunks * part / parts"),
            ("  *a->ema_step += 1.0f;\n", ""),
        ),
    ),
    (
        "csrc/cuda/adamw_ema.cu",
        ("tests/emulation/test_adamw_ema.py", "-k", "float64 or address"),
        (
            ("first ? sum : workspace->sums[block] + sum", "sum"),
            ("float adam_step = workspace->adam_step,", "float adam_step = *update.adam_step,"),
            ("at + N <= update.low_size", "at < update.low_size"),
        ),
    ),
    (
        "csrc/cuda/numbers.cuh",
        ("tests/emulation/test_adamw_ema.py", "-k", "float64 or address"),
        (("sums[thread + other];\n    ptx::sync_block();", "sums[thread + other];"),),
    ),
    (
        "csrc/cuda/adamw_ema.cu",
        ("tests/emulation/test_adamw_ema.py", "-k", "address"),
        (("segment.offset % 4 == 0 && ", ""),),
    ),
    (
        "kernels/ops/adamw_ema/fused.py",
        ADAMW,
        (("(1 - decay) * (1 - skipped)", "1 - decay"), ("u.weight_decay if decays else 0.0", "u.weight_decay")),
    ),
    (
        "csrc/cpu/draw_batch.cpp",
        (DRAW,),
        (
            ("round < 8", "round < 6"),
            ("equal = wanted - below;", "equal = wanted - below - 1;"),
            ("d->grid_across - side + 1", "d->grid_across - side"),
            ("words[j] < words[i] ||", "words[j] > words[i] ||"),
            ("element(seed, n, LABEL_DROPOUT, 0)", "element(seed, n, FLIP, 0)"),
            ("const uint64_t epoch = n / images", "const uint64_t epoch = 0 * n"),
            ("(uint32_t)(first + i)", "(uint32_t)i"),
        ),
    ),
    (
        "csrc/common/samples.h",
        (NOISY,),
        (
            ("alpha * x0 + sigma * eps", "alpha * x0 - sigma * eps"),
            ("(uint32_t)s->grid_across, flip)", "(uint32_t)s->grid_across, false)"),
        ),
    ),
    ("csrc/common/samples.h", (LOSS,), (("alpha * eps - sigma * x0", "alpha * eps + sigma * x0"),)),
    (
        "csrc/cpu/visible.h",
        (NOISY,),
        (
            ("per_patch + block)", "per_patch)"),
            ("s->image_ids[b] * s->stride", "s->image_ids[b] * s->rows * elements"),
            ("offsets[b + 1] < offsets[b]", "offsets[b + 1] <= offsets[b]"),
        ),
    ),
    (
        "csrc/cpu/denoising_loss.cpp",
        (LOSS,),
        (
            ("sum /= (double)count", "sum /= (double)elements"),
            ("if (weight) sum *=", "if (weight) sum +="),
            ("squares[i] = 0.0f;", "squares[i] = 1e3f;"),
            ("*= factor[b]", "*= factor[0]"),
            ("all / (double)s->batch", "all"),
        ),
    ),
    (
        "kernels/ops/attention/triton_kernel.py",
        TRITON,
        (
            (
                'return tl.where(there, _dot(a, tl.trans(b)) * factor, float("-inf"))',
                "return _dot(a, tl.trans(b)) * factor",
            ),
            ("factor, (key + keys < length)[None, :])", "factor, (keys < length)[None, :])"),
            ("most * UNIT + tl.log2(total) * LN_2", "(most + tl.log2(total)) * LN_2"),
            ("total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
            (
                "for key in range(0, length, STEP):\n            keys =",
                "for key in range(STEP, length, STEP):\n            keys =",
            ),
            ("grad_k * scale", "grad_k"),
            ("begin + tl.arange(0, BLOCK) < length)[:, None]", "begin + tl.arange(0, BLOCK) <= length)[:, None]"),
            (
                "tl.store(at, x.to(start.dtype.element_ty), mask=(rows < length)[:, None])",
                "tl.store(at, x.to(start.dtype.element_ty))",
            ),
            ("lse + head.to(tl.int64) * tokens + first\n", "lse + head.to(tl.int64) * length + first\n"),
            ("tl.sum(p * grad_p, 0) if ONE", "tl.sum(p * grad_p, 0) * 0.99 if ONE"),
            (
                "    at = start + rows.to(tl.int64)[:, None] * token_stride + columns[None, :]\n    return",
                "    at = start + rows[:, None] * token_stride + columns[None, :]\n    return",
            ),
        ),
    ),
    (
        "kernels/ops/attention/triton_host.py",
        TRITON,
        (
            ("(0, grad_out.stride(0))", "(0, qkv.shape[-1] * qkv.shape[-2])"),
            ("if length <= most)", "if length < most + 2)"),
        ),
    ),
    (
        "csrc/cpu/entry.cpp",
        ("tests/test_library.py", "-k", "libgomp"),
        (("return MASKDIFF_SOURCE_VERSION;", 'return "0";'),),
    ),
    ("kernels/philox.py", ("tests/ops/test_philox.py",), (("n >> 32 & _LOW", "n & _LOW"),)),
    (
        "kernels/ops/visible.py",
        (NOISY, "-k", "can_run or pinned"),
        (("-(-size // 4)", "(size // 4)"), ("and not elsewhere and", "and"), ("> MOST_QUADS", ">= MOST_QUADS")),
    ),
    ("kernels/ops/denoising_loss/reference.py", (LOSS,), (("shape[0] + grad_per_sample)", "shape[0])"),)),
    ("kernels/library.py", ("tests/test_install.py", "-k", "foreign or stale"), (("built != expected", "not built"),)),
    (
        "maskdiff/masking.py",
        trainer("masking"),
        (
            ("return n - int(rate * n)\n", "return int(n - rate * n)\n"),
            ("// area * area", "// plan.size * plan.size"),
            ("(i + 0.5) / group", "i / group"),
        ),
    ),
    ("maskdiff/masking.py", trainer("step"), (("10 * (n - visible) // n", "(10 * (n - visible) - 1) // n"),)),
    (
        "maskdiff/diffusion.py",
        trainer("diffusion"),
        (
            ("kept[1:] / kept[:-1]", "kept[1:] / kept[0]"),
            ("return alpha * eps - sigma * x0", "return alpha * eps + sigma * x0"),
            ('"v": on_x0 / (snr + 1)', '"v": on_x0 / snr'),
        ),
    ),
    (
        "maskdiff/model.py",
        trainer("model", "pretrained"),
        (
            ("skip=index > half", "skip=index >= half"),
            ("[time + extra_rows[-1]]", "[time + extra_rows[0]]"),
            ("F.embedding(keep_ids, patch_rows)", "patch_rows[: keep_ids.shape[1]]"),
            ("cut.permute(0, 2, 4, 3, 5, 1)", "cut.permute(0, 2, 4, 5, 3, 1)"),
            ("there.any(1, keepdim=True)", "there.all(1, keepdim=True)"),
        ),
    ),
    (
        "maskdiff/optim.py",
        trainer("optim"),
        (
            ("math.inf if hyper.clip is None else hyper.clip", "math.inf"),
            ("low=self.low if self.low.numel() else None", "low=None"),
            ("decays=[segment.decay for", "decays=[segment.low for"),
        ),
    ),
    (
        "maskdiff/step.py",
        trainer("step", "training"),
        (
            ("state.sample += batch\n", "state.sample += 1\n"),
            (".masked_fill(batch.drop_label[:, None], -1)", ""),
            ("0.0).sum(0) / inside.sum(0)", "0.0).sum(0) / len(per_sample)"),
        ),
    ),
    (
        "maskdiff/ragged.py",
        trainer("ragged", "model"),
        (
            ("extras * (sample + 1)", "extras * sample + 1"),
            ("cu_patches + extras * torch.arange(batch + 1", "cu_patches + 0 * torch.arange(batch + 1"),
        ),
    ),
    (
        "maskdiff/stages.py",
        trainer("stages"),
        (("(step + 1) / stage.warmup", "step / stage.warmup"), ("            batch -= 1", "            break")),
    ),
    (
        "maskdiff/flops.py",
        trainer("flops"),
        (("for count in counts) / len(counts)", "for count in [sum(counts) / len(counts)])"),),
    ),
    (
        "maskdiff/packing/decode.py",
        trainer("decode"),
        (
            ("if turn not in (_TURNS[2]", "if turn in (_TURNS[2]"),
            ("return Image.fromarray(((gray * 255 + 32767) // 65535)", "return Image.fromarray((gray // 257)"),
        ),
    ),
    (
        "maskdiff/packing/look.py",
        (*trainer("sources"), "-k", "recipes"),
        (("(25, 57, 128)", "(57, 25, 128)"),),
    ),
    (
        "maskdiff/packing/sources.py",
        (*trainer("sources"), "-k", "nested"),
        (("return np.sort(np.argsort(", "return (np.argsort("),),
    ),
    (
        "maskdiff/packing/archives.py",
        (*trainer("hostile"), "-k", "lead_out or no_files"),
        (('{"..", "\\0"} & set', '{"\\0"} & set'), ("if not member.isreg() or", "if")),
    ),
    (
        "maskdiff/packing/tables.py",
        (*trainer("sources"), "-k", "every_kind or interruptions"),
        (("at < first + rows", "at <= first + rows"),),
    ),
    (
        "maskdiff/packing/labels.py",
        (*trainer("sources"), "-k", "labels"),
        (("of.get(_key(attribute, value), -1)", "of.get(_key(attribute, value), 0)"),),
    ),
    (
        "maskdiff/packing/journal.py",
        (*trainer("pack"), "-k", "crash"),
        (("if padded or not np.array_equal(keys_of(shape.images(rows)), entry.keys):", "if padded:"),),
    ),
    (
        "maskdiff/packing/writer.py",
        (*trainer("pack"), "-k", "crash or copies"),
        (("            self._names.setdefault(key, name)\n", "            pass\n"),),
    ),
    (
        "maskdiff/packing/check.py",
        (*trainer("data"), "-k", "altered_pixel or wrong_arrays"),
        (("if running.hexdigest() != expected:", "if number and running.hexdigest() != expected:"),),
    ),
    (
        "tests/emulation/instructions.h",
        ("tests/emulation/test_wrappers.py", "-k", "products or matrices"),
        (
            ("a[g + 8 * (i % 2)][c + h + 8 * (i / 2)]", "a[g + 8 * (i / 2)][c + h + 8 * (i % 2)]"),
            ("transposed ? l / 4 :", "!transposed ? l / 4 :"),
        ),
    ),
    (
        "kernels/dispatch.py",
        ("tests/ops/test_interface.py", "-k", "table or length or choice"),
        (
            ("if length <= most)", "if length < most)"),
            ("if any(a >= b for a, b in zip([0, *most]", "if any(a > b for a, b in zip([0, *most]"),
            ("for key in (device_key(device), device.type)", "for key in (device.type,)"),
        ),
    ),
    (
        "benchmarks/records.py",
        ("tests/test_gpu_kernels.py",),
        (
            ("there / here for there, here", "here / there for there, here"),
            ("[old for old in self.rows if _place(old) != _place(row)]", "self.rows"),
        ),
    ),
    (
        "benchmarks/gpu_kernels.py",
        ("tests/test_gpu_kernels.py",),
        (
            ("if said := judge(captured.result):", "if said := judge(call()):"),
            ("return 1 if runner.wrong else 0", "return 0"),
            ('or not rows[name]["error"]]', "]"),
        ),
    ),
    (
        "benchmarks/choices.py",
        ("tests/test_gpu_kernels.py",),
        (
            ("set.intersection(*(", "set.union(*("),
            ('if row["shape"]["backward"]:', "if True:"),
            ("    if options.write:\n", "    if True:\n"),
        ),
    ),
    (
        "tests/emulation/instructions.h",
        PLAIN_FAULTS,
        (
            ("copy.group + open_groups >= f.group", "copy.group + open_groups > f.group"),
            ("__builtin_memcpy(to, nan, 16);", "(void)nan;"),
        ),
    ),
    (
        "tests/emulation/emulator.h",
        PLAIN_FAULTS,
        (("if (m.arrived && (m.line != line || m.what != what))", "if (m.arrived && m.what != what)"),),
    ),
)
MUTANTS = tuple(Mutant(file, old, new, tests) for file, tests, faults in PLANTED for old, new in faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose file or text contains TEXT")
    parser.add_argument("--list", action="store_true", help="show the faults and end")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.file or options.only in m.old]
    if options.list:
        print("\n".join(describe(mutant) for mutant in chosen))
        return 0
    misplaced = [m for m in chosen if (ROOT / m.file).read_text().count(m.old) != 1]
    for mutant in misplaced:
        print(f"not found exactly once: {describe(mutant)}")
    if misplaced:
        return 1
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Tree(Path(folder))
        return plant_all(tree, chosen) or (0 if options.only else plant_emulated(tree))


def describe(mutant: Mutant) -> str:
    first, second = (" ".join(text.split()) or "nothing" for text in (mutant.old, mutant.new))
    return f"{mutant.file}: {first} -> {second}"


class Tree:
    """A copy of the sources with a build of its own, which imports of the tests find before any other."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.root.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
            else:
                shutil.copy(source, self.root / name)
        links = folder / "links"
        links.mkdir()
        (links / "maskdiff").symlink_to(self.root / "maskdiff")
        (links / "maskdiff_kernels").symlink_to(self.root / "kernels")
        self.environment = os.environ | {
            "PYTHONPATH": str(links),
            "PYTHONDONTWRITEBYTECODE": "1",  # a cache may vouch for a mutated file of the same size and second
            "MASKDIFF_BUILD_DIR": str(folder / "objects"),
            "MASKDIFF_CUDA": "0",
        }
        self.built: dict[Path, bytes] = {}

    def build(self) -> str:
        """Compiles what changed since the last build; the compiler's words where that fails."""
        now = {path: path.read_bytes() for path in sorted((self.root / "csrc").rglob("*.*"))}
        if now == self.built:
            return ""
        command = [sys.executable, "setup.py", "--quiet", "build_kernels", "--inplace"]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        self.built = now if done.returncode == 0 else {}
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def test(self, *arguments: str) -> tuple[bool, str]:
        """Whether the tests pass, and what they say."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return False, f"no end within {TIMEOUT} s"
        if done.returncode not in (0, 1):  # 1: tests failed; all else (a name of no test, say) is a fault of the list
            raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.returncode == 0, done.stdout


def plant_all(tree: Tree, mutants: list[Mutant]) -> int:
    print("building the copy, and running the named tests on it as it is", flush=True)
    if failure := tree.build():
        print(failure)
        return 1
    where = "import maskdiff_kernels as k; print(k.__file__)"
    found = subprocess.run([sys.executable, "-c", where], env=tree.environment, capture_output=True, text=True).stdout
    if not Path(found.strip()).resolve().is_relative_to(tree.root.resolve()):
        print(f"error: the tests would import {found.strip()}, not the copy in {tree.root}")
        return 1
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        passed, output = tree.test(*tests)
        if not passed:
            print(f"{output}\nerror: {' '.join(tests)} fails without a fault")
            return 1
    results = []
    for number, mutant in enumerate(mutants, 1):
        start = time.monotonic()
        results.append(plant(tree, mutant))
        took = f"{time.monotonic() - start:5.1f} s"
        print(f"{number:3}/{len(mutants)}  {results[-1]:14}  {took}  {describe(mutant)}", flush=True)
    print(f"\n{results.count('killed')} of {len(results)} killed, {results.count('SURVIVED')} survived")
    return 0 if set(results) == {"killed"} else 1


def plant(tree: Tree, mutant: Mutant) -> str:
    path = tree.root / mutant.file
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        if tree.build():
            return "DOES NOT BUILD"
        return "SURVIVED" if tree.test(*mutant.tests)[0] else "killed"
    finally:
        path.write_text(sound)


def plant_emulated(tree: Tree) -> int:
    """Runs the tests of tests/emulation that plant one fault each and fail where the emulator does not notice it."""
    passed, output = tree.test("tests/emulation", "-k", EMULATED_FAULTS, "-rA")
    print("\n".join(line for line in output.splitlines() if line.startswith(("PASSED", "FAILED", "SKIPPED"))))
    survived, killed = output.count("\nFAILED "), output.count("\nPASSED ")
    print(f"\n{killed} of {killed + survived} faults in emulated kernels killed, {survived} survived")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
