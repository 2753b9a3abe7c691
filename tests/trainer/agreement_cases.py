"""200 training steps, each by another implementation of one op, every one held to the fp64 rule.

pytest runs this file in a process of its own (see test_agreement.py): what Triton does is settled as it is imported.
"""

import contextlib
import dataclasses
import itertools

import emulate
import pytest
import small_step
import test_step
import torch
from placing import cuda_on_cpu

import maskdiff_kernels as mk
from maskdiff.model import ModelConfig
from maskdiff.optim import Hyper, adamw_ema
from maskdiff.step import draw
from maskdiff_kernels import dispatch
from maskdiff_kernels.ops.adamw_ema import reference
from maskdiff_kernels.ops.adamw_ema.state import Update, flatten

STEPS, BATCH = 200, 4
MODEL = ModelConfig(image_size=8, channels=3, patch=2, width=32, blocks=1, heads=1, classes=(3, 2))
HYPER = Hyper(1e-2, 1.0)
PLAIN = dict.fromkeys(dispatch._OPS, "reference")
TAKES = {  # what takes one dtype alone: the interpreter's products are wrong in bf16, attention.cu has none in fp32
    ("attention", "triton"): torch.float32,
    ("attention", "cuda"): torch.bfloat16,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (small_step, test_step):
        monkeypatch.setattr(module, "MODEL", MODEL)
        monkeypatch.setattr(module, "BATCH", BATCH)


def switches(dtype: torch.dtype) -> list[tuple[str, str]]:
    """Every implementation that runs here, CUDA's in the emulator: (op, name)."""
    every = [(op, name) for op in dispatch._OPS for name in dispatch.able(op, "cpu")]
    return [(op, name) for op, name in every if TAKES.get((op, name), dtype) == dtype]


@pytest.mark.parametrize(("dtype", "mask"), [(torch.float32, "patch:0.5"), (torch.bfloat16, "patch:0.25-0.75")])
def test_every_implementation_in_turn(dtype, mask):
    emulated = () if emulate.no_emulator() else (*emulate.OPS, "attention")
    with cuda_on_cpu(emulated) if emulated else contextlib.nullcontext():
        turns = switches(dtype)
        kinds = {name for _, name in turns}
        assert {"reference", "cpp", "triton", "torch", "sdpa"} <= kinds and ("cuda" in kinds) == bool(emulated)
        assert train(dtype, small_step.mask_of(mask), turns) == STEPS


def train(dtype, mask, turns: list[tuple[str, str]]) -> int:
    """Returns the number of steps made."""
    state, source, objective = small_step.setup("v", dtype, backend="auto")
    found: dict[tuple[str, str], list] = {turn: [] for turn in turns}
    for step, (op, name) in zip(range(STEPS), itertools.cycle(turns), strict=False):
        said = f"step {step}, {op} by {name}"
        n = torch.arange(state.sample, state.sample + BATCH)
        with mk.using(**PLAIN):
            expected = draw(source, objective, mask, small_step.SEED, n)
        with mk.using(**PLAIN | {op: name}):
            batch = draw(source, objective, mask, small_step.SEED, n)
            for field in dataclasses.fields(batch):
                pair = getattr(batch, field.name), getattr(expected, field.name)
                assert pair[0] is pair[1] is None or torch.equal(*pair), (said, field.name)
            found[op, name].append(test_step.three_ways(state, source, objective, mask, batch))
            (_, grads), *_ = found[op, name][-1]
            update(state, [grads[segment.name] for segment in state.segments], said)
        state.sample += BATCH
    for turn, steps in found.items():
        test_step.check(steps, dtype, turn)
    return sum(map(len, found.values()))


def update(state, grads: list[torch.Tensor], said: str) -> None:
    """Makes the update; its error at most twice the reference's, plus one rounding."""
    state.tell(HYPER)
    averages = state.averages[0], state.averages[-1]
    fixed = (state.config.betas, state.config.eps, state.config.weight_decay, *averages, state.config.ema_every)
    found = {}
    for exact in (torch.float64, torch.float32):
        flats = {f: getattr(state.adams[0], f).to(exact, copy=True) for f in ("master", "exp_avg", "exp_avg_sq", "ema")}
        counts = {f: getattr(state.adams[0], f).to(exact, copy=True) for f in ("adam_step", "ema_step")}
        low = None if state.adams[0].low is None else state.adams[0].low.clone()
        copy = dataclasses.replace(state.adams[0], **flats, **counts, low=low)
        reference.run(Update(*flatten(copy, [grad.clone() for grad in grads], state.hyper, *fixed)))
        found[exact] = flats
    adamw_ema(state, grads)
    for name, truth in found[torch.float64].items():
        allowed = 2 * test_step.error(found[torch.float32][name], truth)
        allowed += torch.finfo(torch.float32).eps / 2 * truth.norm().item()
        got = test_step.error(getattr(state.adams[0], name), truth)
        assert got <= allowed, f"{said}: {name}: error {got:.2e}, allowed {allowed:.2e}"
