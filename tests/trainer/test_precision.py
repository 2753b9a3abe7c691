"""What `--precision auto` stands for: the faster of what a processor multiplies, and what a run has computed in."""

import dataclasses

import pytest
import torch

from maskdiff import checkpoint, precision, training
from maskdiff.errors import UserError
from maskdiff.options import parse
from maskdiff.sample import dtype_of
from maskdiff.study import asked

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("native", "fp32_is_faster", "before", "expected"),
    [
        (True, False, None, BF16), (True, True, None, FP32), (False, False, None, FP32),
        (True, True, "bfloat16", BF16), (True, False, "float32", FP32), (False, False, "bfloat16", FP32),
    ],
)  # fmt: skip
def test_auto(monkeypatch, native, fp32_is_faster, before, expected):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: native)
    monkeypatch.setattr(precision, "_fp32_is_faster", lambda: fp32_is_faster)
    assert precision.resolve_precision("auto", CPU, before) == expected
    assert precision.resolve_precision("fp32", CPU, before) == FP32
    if native:
        assert precision.resolve_precision("bf16", CPU, before) == BF16
    else:
        with pytest.raises(UserError, match="no bf16 matrix products"):
            precision.resolve_precision("bf16", CPU, before)


def test_samples_are_drawn_in_what_a_run_trained_in(monkeypatch):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: True)
    for fp32_is_faster, otherwise in ((True, FP32), (False, BF16)):
        monkeypatch.setattr(precision, "_fp32_is_faster", lambda: fp32_is_faster)  # noqa: B023  called at once
        for trained, expected in (("bfloat16", BF16), ("float32", FP32), (None, otherwise)):
            meta = {} if trained is None else {"environment": {"dtype": trained}}
            assert dtype_of(None, meta, CPU) == expected and dtype_of("fp32", meta, CPU) == FP32


def test_a_study_goes_on_in_what_it_was_begun_in(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: True)
    monkeypatch.setattr(precision, "_fp32_is_faster", lambda: True)
    rest = ["--preset", "faces32", "--device", "cpu"]
    for saved, expected in ((None, "fp32"), ({"precision": "bf16"}, "bf16"), ({"precision": "fp32"}, "fp32")):
        assert asked.configured(tmp_path, "sweep", rest, saved).precision == expected
    given = [*rest, "--precision", "bf16"]
    assert asked.configured(tmp_path, "sweep", given, {"precision": "fp32"}).precision == "bf16"


def test_a_gpu_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(precision, "_fp32_is_faster", lambda: pytest.fail("a processor was timed"))
    assert precision.resolve_precision("auto", CUDA) == BF16


@pytest.mark.parametrize(("bf16_ms", "faster"), [(4.0, False), (9.0, False), (12.4, False), (12.6, True), (20.0, True)])
def test_fp32_must_be_clearly_faster(monkeypatch, bf16_ms, faster):
    """By a clock that goes on with products alone: fp32's take 10 ms, the first and every other one twice as long."""
    clock, made = [0.0], []

    def product(left, right):
        made.append((left.dtype, torch.get_num_threads()))
        slow = 2 if sum(dtype == FP32 for dtype, _ in made) % 2 else 1
        clock[0] += 1e-3 * (10.0 * slow if left.dtype == FP32 else bf16_ms)

    monkeypatch.setattr(precision.time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(torch.Tensor, "mm", product)
    threads = torch.get_num_threads()
    assert precision._fp32_is_faster.__wrapped__() == faster
    assert {dtype for dtype, _ in made} == {BF16, FP32} and {used for _, used in made} == {1}
    assert torch.get_num_threads() == threads


def test_a_resumed_run_computes_in_what_it_did(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: True)
    argv = "--data faces:100 --device cpu --model.width 32 --model.blocks 3 --model.heads 2".split()
    argv += ["--stages", "patch:0.75 x4 b8", "--probe-steps", "0", "--sample-count", "0", "--heldout-every", "0"]
    config = dataclasses.replace(parse(argv).config, out=str(tmp_path / "run"))
    for fp32_is_faster, steps in ((False, 2), (True, 4)):
        monkeypatch.setattr(precision, "_fp32_is_faster", lambda: fp32_is_faster)  # noqa: B023  called at once
        training.run(dataclasses.replace(config, max_steps=steps), resume=steps > 2)
        meta = checkpoint.read_meta(checkpoint.latest(tmp_path / "run"))
        assert meta["step"] == steps and meta["environment"]["dtype"] == "bfloat16"
