"""FlatState and adamw_ema against plain PyTorch: values, skipping, rounding, borrowing, saving."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from maskdiff import optim
from maskdiff.config import OptimConfig
from maskdiff.errors import UserError
from maskdiff.optim import FlatState, Hyper, kernels


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Parameter(torch.randn(1, 5, 8))
        self.inner = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3, bias=False)

    def forward(self, x):
        hidden = self.inner((x + self.table).to(self.inner.weight.dtype))
        return self.head(self.norm(hidden.float()).to(self.head.weight.dtype)).float()


def adamw_ema(state, grads, hyper):
    state.tell(hyper)
    return optim.adamw_ema(state, grads)


def backward(model, seed):
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_torch_adamw_and_ema(decay_all, clip):
    config = OptimConfig(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, decay_all=decay_all, ema=0.5)
    model, plain = Net(), Net()
    state = FlatState(model, config)
    decayed = {"inner.weight", "head.weight"} if not decay_all else {name for name, _ in plain.named_parameters()}
    groups = [
        {
            "params": [p for name, p in plain.named_parameters() if (name in decayed) == decay],
            "weight_decay": 0.1 * decay,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), eps=1e-8)
    ema = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for step in range(12):
        lr = 1e-2 / (1 + step)
        backward(model, step)
        norm, skipped = adamw_ema(state, state.gradients(), Hyper(lr, clip))
        backward(plain, step)
        expected_norm = nn.utils.clip_grad_norm_(plain.parameters(), clip if clip is not None else float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.5, (2 + step) / (11 + step))
        for name, p in plain.named_parameters():
            ema[name].lerp_(p.detach(), 1 - decay)
        assert not skipped
        torch.testing.assert_close(norm, expected_norm)
    assert clip is None or expected_norm > clip  # else the clipping went untested
    with state.ema_weights():
        averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averaged[name], ema[name], rtol=1e-5, atol=1e-6)


def test_a_gradient_below_the_bound_is_left_alone():
    """Scaled up to the bound it would hardly change AdamW's steps, but it would change the moments."""
    moments = []
    for clip in (None, 1e3):
        state = FlatState(Net(), OptimConfig())
        backward(state.model, 0)
        norm, _ = adamw_ema(state, state.gradients(), Hyper(1e-2, clip))
        assert clip is None or norm < clip
        moments.append(state.exp_avg)
    assert torch.equal(*moments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_gradient_changes_nothing(bad, dtype):
    state = FlatState(Net(), OptimConfig(), dtype)
    backward(state.model, 0)
    adamw_ema(state, state.gradients(), Hyper(1e-2, 1.0))
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    backward(state.model, 1)
    grads = state.gradients()
    grads[-1].view(-1)[0] = bad
    _, skipped = adamw_ema(state, grads, Hyper(1e-2, 1.0))
    assert skipped == 1
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_low_precision_weights_are_rounded_masters():
    model = Net()
    state = FlatState(model, OptimConfig(), torch.bfloat16)
    for step in range(3):
        backward(model, step)
        adamw_ema(state, state.gradients(), Hyper(1e-2, 1.0))
    low = {"inner.weight", "inner.bias", "head.weight"}
    for segment in state.segments:
        param = model.get_parameter(segment.name)
        assert param.dtype == (torch.bfloat16 if segment.name in low else torch.float32)
        assert torch.equal(param, segment.view(state.master).to(param.dtype))
    assert state.master[: state.low_size].to(torch.bfloat16).float().ne(state.master[: state.low_size]).any()


def test_ema_weights_are_borrowed_and_given_back():
    model = Net()
    state = FlatState(model, OptimConfig(ema=0.9), torch.bfloat16)
    backward(model, 0)
    adamw_ema(state, state.gradients(), Hyper(1e-1, None))
    trained = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), state.ema_weights():
        assert any(not torch.equal(a, b) for a, b in zip(trained, model.parameters(), strict=True))
        raise RuntimeError("inside")
    assert all(torch.equal(a, b) for a, b in zip(trained, model.parameters(), strict=True))


def test_kept_undoes_steps_exactly():
    state = FlatState(Net(), OptimConfig(), torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with state.kept():
        backward(state.model, 0)
        adamw_ema(state, state.gradients(), Hyper(1e-1, None))
        state.sample += 4
        state.made_step(2)
        backward(state.model, 1)  # gradients that nothing has taken
        assert (state.step, state.sample, int(state.next_sample)) == (1, 6, 4)
        assert not torch.equal(state.master, torch.zeros_like(state.master))
        assert any(not torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    assert (state.step, state.sample, int(state.next_sample)) == (0, 0, 0)
    assert all(param.grad is None for param in state.params)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


def test_two_averages_follow_each_in_its_way():
    """The first by a power function of gamma 0, which is the mean; the second by a decay, from the first weights on."""
    config = OptimConfig(ema="power:0.2886751345948128", ema2=0.05)  # 12^-0.5; young averages forget faster than 0.05
    model = Net()
    state = FlatState(model, config, torch.bfloat16)
    start, masters = state.master.clone(), []
    assert torch.equal(state.ema2, start) and "ema2.table" in state.tensors()
    for step in range(3):
        backward(model, step)
        adamw_ema(state, state.gradients(), Hyper(1e-2, 1.0))
        masters.append(state.master.clone())
    torch.testing.assert_close(state.ema, torch.stack(masters).mean(0), rtol=1e-5, atol=1e-6)
    second = start
    for master in masters:
        second = 0.05 * second + 0.95 * master
    torch.testing.assert_close(state.ema2, second, rtol=1e-5, atol=1e-6)
    before = state.ema2.clone()
    with state.kept():
        backward(model, 3)
        adamw_ema(state, state.gradients(), Hyper(1e-2, 1.0))
        assert not torch.equal(state.ema2, before)
    assert torch.equal(state.ema2, before)
    state.fresh()
    assert torch.equal(state.ema2, state.master) and torch.equal(state.ema, state.master)


def test_averages_that_change_at_every_third_update():
    """Also in a state that takes up what another saved in between; from fresh, the count starts anew."""
    config, model = OptimConfig(ema=0.5, ema2="power:0.1", ema_every=3), Net()
    state, single = FlatState(model, config), FlatState(Net(), OptimConfig(ema=0.5, ema2="power:0.1"))
    for step in range(8):
        before = state.ema.clone(), state.ema2.clone()
        for trained in (state, single):
            backward(trained.model, step)
            adamw_ema(trained, trained.gradients(), Hyper(1e-2, 1.0))
        changed = [not torch.equal(*pair) for pair in zip(before, (state.ema, state.ema2), strict=True)]
        assert changed == [step in (2, 5)] * 2 and torch.equal(state.master, single.master)
        if step == 2:  # the first change of a power function's average replaces all of its start
            torch.testing.assert_close(state.ema2, state.master)
            assert not torch.equal(single.ema2, single.master)
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
            state = FlatState(Net(seed=1), config)
            state.load(saved)
    state.fresh()
    for step in range(3):
        assert torch.equal(state.ema, state.master) == (step == 0)
        start = state.ema.clone()
        backward(state.model, step)
        adamw_ema(state, state.gradients(), Hyper(1e-2, 1.0))
        assert torch.equal(state.ema, start) == (step < 2)


def test_a_second_average_is_saved_and_taken_up():
    config = OptimConfig(ema2="power:0.1")
    state, other, one = (FlatState(Net(), options) for options in (config, config, OptimConfig()))
    backward(state.model, 0)
    adamw_ema(state, state.gradients(), Hyper(1e-2, None))
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    other.load(saved)
    assert torch.equal(other.ema2, state.ema2) and not torch.equal(state.ema2, state.ema)
    for receiver, given in ((one, saved), (other, {k: v for k, v in saved.items() if not k.startswith("ema2.")})):
        with pytest.raises(ValueError, match="ema2.head.weight is in one of them only"):
            receiver.load(given)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_the_configured_optimizer_runs(name, monkeypatch):
    from maskdiff_kernels import dispatch

    module, ran = dispatch._OPS["adamw_ema"][name].module, []
    original = module.run
    monkeypatch.setattr(module, "run", lambda update: ran.append(name) or original(update))
    state = FlatState(Net(), OptimConfig(optimizer=name))
    backward(state.model, 0)
    adamw_ema(state, state.gradients(), Hyper(1e-2, None))
    assert ran == [name]
    assert kernels(state.config, torch.device("cpu"))["adamw_ema"] == name


def test_an_optimizer_that_cannot_run_is_the_users_to_mend():
    with pytest.raises(UserError, match="^optim.optimizer is apex: backend: 'apex' of adamw_ema takes cuda tensors"):
        kernels(OptimConfig(optimizer="apex"), torch.device("cpu"))


def test_fresh_resets_moments_and_ema_only():
    state = FlatState(Net(), OptimConfig())
    backward(state.model, 0)
    adamw_ema(state, state.gradients(), Hyper(1e-1, None))
    master = state.master.clone()
    state.fresh()
    assert torch.equal(state.master, master) and torch.equal(state.ema, master)
    assert not state.exp_avg.any() and not state.exp_avg_sq.any() and state.adam_step == 0 and state.ema_step == 0


def test_load_takes_up_what_was_saved_and_names_what_does_not_fit():
    state, other = FlatState(Net(), OptimConfig()), FlatState(Net(seed=1), OptimConfig())
    backward(state.model, 0)
    adamw_ema(state, state.gradients(), Hyper(1e-2, None))
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    other.load(saved)
    for name, param in state.model.named_parameters():
        assert torch.equal(param, other.model.get_parameter(name))
    with pytest.raises(ValueError, match="ema.table is in one"):
        other.load({name: tensor for name, tensor in saved.items() if name != "ema.table"})
    with pytest.raises(ValueError, match=r"ema.table: saved shape \[3\]"):
        other.load(saved | {"ema.table": torch.zeros(3)})


def test_a_parameter_without_gradient_is_named():
    state = FlatState(Net(), OptimConfig())
    state.model.head(torch.zeros(1, 12)).sum().backward()
    with pytest.raises(ValueError, match="inner.weight has no gradient"):
        state.gradients()


def test_masters_need_float32_weights():
    with pytest.raises(ValueError, match="float32"):
        FlatState(Net().to(torch.bfloat16), OptimConfig())


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages for the asking"
)
def test_large_buffers_ask_for_huge_pages_and_small_ones_do_not():
    """In a process of its own: where other tests' large arrays lay, which NumPy asks huge pages for, small ones may."""
    code = """
import re, torch
from torch import nn
from maskdiff.config import OptimConfig
from maskdiff.optim import FlatState

def asked(flat):
    inside = False
    for line in open("/proc/self/smaps"):
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= flat.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("VmFlags"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the buffer")

state = FlatState(nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8)), OptimConfig(ema2=0.9), torch.bfloat16)
buffers = [getattr(state, part) for part in state.parts] + [state.low]
assert len(buffers) == 6 and all(map(asked, buffers))
assert not state.exp_avg.any() and state.exp_avg.is_contiguous()
assert not asked(FlatState(nn.Linear(4, 4), OptimConfig()).master)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_buffers_without_huge_pages(monkeypatch):
    def refused(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(optim.mmap, "mmap", refused)
    state = FlatState(nn.Linear(1024, 1024), OptimConfig())
    assert torch.equal(state.master[:1024], state.params[0].flatten()[:1024]) and not state.exp_avg.any()
