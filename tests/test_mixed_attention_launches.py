"""What the backward for Hopper hands to its kernels, which are replaced here: no GPU is needed."""

import pytest
import torch

from croc_kernels.attention import config, hopper_backward


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched, and what was copied for them, in order: (name, arguments)."""
    found = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, _grid):
            return lambda *arguments, **_options: found.append((self.name, arguments))

    for name in ("_prepare_kernel", "_mixed_attention_bwd_hopper_kernel", "_finish_kernel"):
        monkeypatch.setattr(hopper_backward, name, Recorder(name.strip("_")))
    by_sample = config.by_sample

    def recorded(*vectors):
        found.append(("bounds", vectors))
        return by_sample(*vectors)

    monkeypatch.setattr(hopper_backward, "by_sample", recorded)
    return found


def moved(x, how):
    """The same values elsewhere: at an odd address, or column by column."""
    if how == "odd":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("how", ["as it was", "odd", "columns"])
@pytest.mark.parametrize("num_keys", [128, 1024])
def test_launches_read_one_copy_of_an_output_that_was_moved(launched, num_keys, how):
    """Rows of 16 bytes from a multiple of 16 on is what kernels and copy engine read; copies are
    made before the first launch, behind which the second is launched early.
    """
    q, k, v, grad_out = (torch.randn(2, 64, num_keys, 128).bfloat16() for _ in range(4))
    out = torch.randn(2, 64, num_keys, 128).bfloat16()
    given = out if how == "as it was" else moved(out, how)
    assert torch.equal(given, out)
    assert config.tma_aligned(given) == (how == "as it was")
    lse = torch.randn(2, 64, num_keys)
    row_start, row_end = torch.zeros(2, 2, num_keys, 2, dtype=torch.int32)[..., 0]
    picked = config.pick_hopper_backward(90, 128, q.dtype, num_keys, True, True, planes=128)
    assert picked.statistics == (num_keys == 1024)
    hopper_backward.hopper_bwd(
        grad_out, None, q, k, v, given, lse, row_start, row_end,
        0.1, [torch.empty_like(x) for x in (q, k, v)], picked, False,
    )  # fmt: skip
    names = [name for name, _ in launched]
    assert names == [
        "bounds",
        "prepare_kernel",
        "mixed_attention_bwd_hopper_kernel",
        "finish_kernel",
    ]
    read, grad_read, *_ = launched[1][1]
    assert config.tma_aligned(read)
    assert torch.equal(read, out)
    assert (read is given) == (how == "as it was")
    assert grad_read is grad_out
    pieces = launched[2][1][7:9]
    if picked.statistics:
        assert [x.base.data_ptr() for x in pieces] == [read.data_ptr(), grad_out.data_ptr()]
    (start, step), (end, _), *_ = launched[2][1][9]
    assert start.stride(1) == end.stride(1) == 1
    assert step == num_keys
