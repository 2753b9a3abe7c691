"""What `make gpu-test` does, as far as a machine without a GPU can tell: steps, verdicts, builds, who is to blame."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import adamw_cases
import attention_cases
import conformance
import emulate
import pytest
import torch

from maskdiff_kernels import library

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("gpu", HERE / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu"] = gpu  # dataclasses look there
spec.loader.exec_module(gpu)

needs_emulator = pytest.mark.skipif(bool(emulate.no_emulator()), reason=emulate.no_emulator())


def test_steps_and_summary(capsys):
    session = gpu.Session(1)
    assert session.step("first", lambda: (gpu.OK, "fine"))
    assert session.step("second", lambda: (gpu.NOT_RUN, "no tool")) and session.summary() == 0
    assert not session.step("third", lambda: (gpu.FAILED, "broke")) and session.summary() == 1
    out = capsys.readouterr().out
    assert "== first" in out and all(text in out.split("== summary")[-1] for text in ("ok ", "not run", "third: broke"))
    late = gpu.Session(-1)
    assert late.step("fourth", lambda: pytest.fail("it ran")) and late.steps[0].said == "no time left"


def test_commands(capfd):
    session = gpu.Session(1)
    assert session.checked(sys.executable, "-c", "print(1); print('last')") == (gpu.OK, "last")
    result, said = session.checked(sys.executable, "-c", "print('why'); raise SystemExit('end')")
    assert (result, said) == (gpu.FAILED, "end") and "why" in capfd.readouterr().out
    code = "import os; print(os.environ['GIVEN'])"
    assert session.checked(sys.executable, "-c", code, GIVEN="through") == (gpu.OK, "through")
    short = gpu.Session(0)
    status, printed = short.command(sys.executable, "-c", "print('so far', flush=True); import time; time.sleep(60)")
    assert status is None and short.checked(sys.executable, "-c", "import time; time.sleep(60)")[0] == gpu.FAILED


RAN = "".join(f"ran {name}\n" for name in range(7))


@pytest.mark.parametrize(
    ("status", "printed", "result", "said"),
    [
        (0, RAN + "========= ERROR SUMMARY: 0 errors", gpu.OK, "nothing found in 7 cases"),
        (gpu.FOUND, RAN + "========= ERROR SUMMARY: 3 errors", gpu.FAILED, "ERROR SUMMARY: 3 errors (exit status 99)"),
        (0, "========= COMPUTE-SANITIZER", gpu.FAILED, "COMPUTE-SANITIZER (exit status 0)"),
        (1, "========= Error: Device not supported. Please", gpu.NOT_RUN, "refused here: Error: Device not supported"),
        (1, RAN + "Traceback: not supported", gpu.FAILED, "Traceback: not supported (exit status 1)"),
        (None, "ran short\n", gpu.NOT_RUN, "no end in time, after 1 of 7 cases"),
    ],
)
def test_verdicts_of_the_sanitizer(status, printed, result, said):
    got = gpu.verdict(status, printed, 7)
    assert got[0] == result and got[1].startswith(said)


@pytest.mark.parametrize(
    ("archs", "arch", "why"),
    [
        ("80,90", 90, ""),
        ("90", 103, ""),
        ("90", 80, "built for [90], not for 80"),
        ("80,120", 90, "built for [80, 120]"),
    ],
)
def test_when_to_build(monkeypatch, archs, arch, why):
    monkeypatch.setattr(library, "cuda_archs", lambda: archs)
    got = gpu.fresh(arch)
    assert got.startswith(why) and bool(got) == bool(why)

    def missing():
        raise library.LibraryError("the CUDA kernels were not built")

    monkeypatch.setattr(library, "cuda_archs", missing)
    assert gpu.fresh(90) == "the CUDA kernels were not built"


def test_what_is_built_is_what_setup_builds(monkeypatch):
    """The same three commands, but for the folder; a command that fails ends it."""
    ran = []
    session = gpu.Session(1)
    monkeypatch.setattr(gpu, "fresh", lambda arch: "" if len(ran) == 3 else "missing")
    monkeypatch.setattr(session, "checked", lambda *c, **env: (ran.append((c, env)), (gpu.OK, ""))[1])
    monkeypatch.setattr(library, "cuda_archs", lambda: "90")
    assert gpu.build(session, 90) == (gpu.OK, "built for 90")
    assert [command[1] for command, _ in ran] == ["-S", "--build", "--install"]
    assert all(env == {"MASKDIFF_CUDA": "1", "MASKDIFF_CUDA_ARCHS": "90"} for _, env in ran)
    monkeypatch.setattr(session, "checked", lambda *c, **env: (gpu.FAILED, "no compiler"))
    monkeypatch.setattr(gpu, "fresh", lambda arch: "missing")
    assert gpu.build(session, 90) == (gpu.FAILED, "no compiler")


def test_no_test_is_no_success(monkeypatch):
    session = gpu.Session(1)
    for said, result in (("174 skipped, 655 deselected in 4.80s", gpu.FAILED), ("3 passed, 1 skipped", gpu.OK)):
        monkeypatch.setattr(session, "checked", lambda *c, said=said, **env: (gpu.OK, said))
        assert gpu.op_tests(session, gpu.OTHERS)[0] == gpu.step_tests(session)[0] == result


def test_the_op_tests_that_a_gpu_runs_are_found():
    """None of them twice; Triton's, which compile for long, by themselves."""
    session, found = gpu.Session(2), []
    for which in (gpu.OTHERS, gpu.TRITON):
        command = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-k", which, HERE / "ops")
        status, printed = session.command(*command)
        assert status == 0
        found.append({line for line in printed.splitlines() if "::" in line})
    others, triton = found
    for op in ("attention", "draw_batch", "noisy_patches", "denoising_loss", "registration"):
        assert any(f"tests/ops/test_{op}.py::" in line and "reference-on-cuda" in line for line in others)
    assert any("cuda-on-cuda" in line for line in others) and any(
        "test_counted_words_on_cuda" in line for line in others
    )
    assert others & triton == set() and all("triton" in line for line in triton)
    assert any("test_attention.py" in line for line in triton) and any("test_on_a_gpu" in line for line in triton)


def test_a_wrong_wrapper_is_named(monkeypatch, capsys):
    def wrong(self):
        raise AssertionError("Arrays are not equal\n\nMismatched elements")

    monkeypatch.setattr(conformance.Checks, "products", wrong)
    monkeypatch.setattr(conformance.Checks, "copies", lambda self: None)
    path = emulate.build("card-wrappers", [emulate.HERE / "wrappers.cu", emulate.EXPORTS])
    monkeypatch.setattr("sys.argv", ["conformance.py", str(path), "--seeds=1", "--only=products,copies"])
    assert conformance.main() == 1
    out = capsys.readouterr().out
    assert "products NOT as the table says, one of mma_bf16 mma_fp16: Arrays are not equal Mismatched" in out
    assert "copies as the table says (copy_async16" in out


@needs_emulator
@pytest.mark.parametrize("op", ["attention", "adamw_ema"])
def test_cases_as_on_a_card(monkeypatch, capsys, op):
    """What the sanitizers run there: a library that knows no emulator, memory that is not the host's."""
    cases = {"attention": attention_cases, "adamw_ema": adamw_cases}[op]
    file = Path(cases.__file__).name
    assert set(gpu.SANITIZED[file]) <= set(cases.CASES)

    class Card(conformance.Host):
        pass

    sources = [emulate.EXPORTS, *(emulate.ROOT / "csrc" / "cuda" / f"{name}.cu" for name in (op, "info"))]
    built, name = emulate.build(f"card-{op}", sources), gpu.SANITIZED[file][0]
    monkeypatch.setattr(conformance, "Cuda", Card)
    monkeypatch.setattr("sys.argv", [file, str(built), name, "--cuda"])
    conformance.run_cases(cases.run, cases.CASES)
    assert capsys.readouterr().out == f"ran {name}\n"
    explain = conformance.set_up(emulate.load(built), Card, 0)
    assert explain(1) == "error 1" and isinstance(explain(1000), str)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, HERE / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "sees no CUDA device" in done.stderr
