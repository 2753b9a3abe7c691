"""The stream of samples of different lengths, token by token against loops."""

import pytest
import torch

from maskdiff.ragged import Packing


@pytest.mark.parametrize("extras", [1, 2])
@pytest.mark.parametrize("counts", [(3, 1, 5), (4,), (2, 2), (0, 3, 0)])
def test_each_sample_has_its_extra_tokens_and_then_its_patches(extras, counts):
    batch, total = len(counts), sum(counts)
    cu_patches = torch.tensor([0, *counts]).cumsum(0).int()
    packing = Packing(cu_patches, total, extras)
    before = [torch.randn(batch, 4, dtype=torch.float64, requires_grad=True) for _ in range(extras)]
    patches = torch.randn(total, 4, dtype=torch.float64, requires_grad=True)
    expected, ends = [], [0]
    for b, count in enumerate(counts):
        first = int(cu_patches[b])
        expected += [extra[b] for extra in before] + list(patches[first : first + count])
        ends.append(len(expected))
    stream = packing.pack(before, patches)
    assert torch.equal(stream, torch.stack(expected))
    assert packing.cu_seqlens.tolist() == ends and packing.cu_seqlens.dtype == torch.int32
    assert torch.equal(packing.patches(stream, total), patches)
    assert torch.autograd.gradcheck(lambda *x: packing.pack(list(x[:-1]), x[-1]), (*before, patches))
    assert torch.autograd.gradcheck(lambda x: packing.patches(x, total), stream.detach().requires_grad_())
