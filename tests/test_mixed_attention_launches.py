"""What the backward for Hopper hands to its kernels, which are replaced here: no GPU is needed."""

import math

import pytest
import torch

from croc_kernels.attention import config, hopper_backward, hopper_forward, operands


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched, and what was copied for them, in order: (name, arguments, options)."""
    found = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, _grid):
            return lambda *arguments, **options: found.append((self.name, arguments, options))

    for name in ("_prepare_kernel", "_mixed_attention_bwd_hopper_kernel", "_finish_kernel"):
        monkeypatch.setattr(hopper_backward, name, Recorder(name.strip("_")))
    by_sample = operands.by_sample

    def recorded(*vectors):
        found.append(("bounds", vectors, {}))
        return by_sample(*vectors)

    monkeypatch.setattr(hopper_backward, "by_sample", recorded)
    return found


def moved(x, how):
    """The same values elsewhere: at an odd address, or column by column."""
    if how == "odd":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("how", ["as it was", "odd", "columns"])
@pytest.mark.parametrize("num_keys", [128, 256, 1024])
def test_launches_read_one_copy_of_an_output_that_was_moved(launched, num_keys, how):
    """Rows of 16 bytes from a multiple of 16 on is what kernels and copy engine read; copies are
    made before the first launch, behind which the second is launched early.
    """
    q, k, v, grad_out = (torch.randn(2, 64, num_keys, 128).bfloat16() for _ in range(4))
    out = torch.randn(2, 64, num_keys, 128).bfloat16()
    given = out if how == "as it was" else moved(out, how)
    assert torch.equal(given, out)
    assert operands.tma_aligned(given) == (how == "as it was")
    lse = torch.randn(2, 64, num_keys)
    row_start, row_end = torch.zeros(2, 2, num_keys, 2, dtype=torch.int32)[..., 0]
    picked = config.pick_hopper_backward(90, 128, q.dtype, num_keys, True, True, planes=128)
    assert picked.statistics == (num_keys == 1024)
    assert picked.whole == (num_keys == 128)
    hopper_backward.hopper_bwd(
        grad_out, None, q, k, v, given, lse, row_start, row_end,
        0.1, picked, False,
    )  # fmt: skip
    names = [name for name, *_ in launched]
    last = ["finish_kernel"] * (not picked.whole)
    assert names == ["bounds", "prepare_kernel", "mixed_attention_bwd_hopper_kernel", *last]
    read, grad_read, *_ = launched[1][1]
    assert operands.tma_aligned(read)
    assert torch.equal(read, out)
    assert (read is given) == (how == "as it was")
    assert grad_read is grad_out
    sums, *pieces = launched[2][1][7:10]
    if picked.staged:
        # Of the tensor that the kernel after reads, and all of it.
        read_after = launched[3][1][0]
        assert sums.base.data_ptr() == read_after.data_ptr()
        assert sums.base.numel() == read_after.numel()
        assert sums.block_shape[0] * sums.block_shape[1] == read_after.shape[1] == 64 * 128
    if picked.statistics:
        assert [x.base.data_ptr() for x in pieces] == [read.data_ptr(), grad_out.data_ptr()]
    (start, step), (end, _), *_ = launched[2][1][10]
    assert start.stride(1) == end.stride(1) == 1
    assert step == num_keys


@pytest.mark.parametrize("dim", config.HOPPER_BACKWARD)
@pytest.mark.parametrize("num_queries", [1, 100, 300])
def test_launches_one_kernel_for_both_orders_where_one_tile_holds_all_keys(
    launched, monkeypatch, num_queries, dim
):
    """It is given dQ itself, and nothing that its sums would take is allocated."""
    empty, allocated = torch.empty, []
    monkeypatch.setattr(
        torch, "empty", lambda *a, **o: allocated.append(empty(*a, **o)) or allocated[-1]
    )
    num_keys, options = config.HOPPER_BACKWARD[dim][1], []
    q, grad_out, out = (torch.randn(2, 8, num_queries, dim).bfloat16() for _ in range(3))
    k, v = (torch.randn(2, 2, num_keys, dim).bfloat16() for _ in range(2))
    row_start, row_end = torch.zeros(2, 2, num_keys, dtype=torch.int32)
    for ordered in (False, True):
        launched.clear()
        picked = config.pick_hopper_backward(
            90, dim, q.dtype, num_keys, True, True, planes=4, group=4, ordered=ordered
        )
        grads = hopper_backward.hopper_bwd(
            grad_out, None, q, k, v, out, torch.randn(2, 8, num_queries), row_start, row_end,
            0.1, picked, ordered,
        )  # fmt: skip
        assert [x[0] for x in launched] == [
            "bounds", "prepare_kernel", "mixed_attention_bwd_hopper_kernel",
        ]  # fmt: skip
        options.append([x[2] for x in launched])
        assert launched[2][1][7].base is grads[0]
    assert options[0] == options[1]
    assert not options[0][2]["ORDERED"]
    assert sum(x.nbytes for x in allocated) <= 2 * 2 * 8 * (2 * 4 * (num_queries + 63) + 64)


@pytest.mark.parametrize("length", [128, 1000, 4096])
def test_launches_forward_programs_for_what_there_is(monkeypatch, length):
    """At most one a multiprocessor; tiles of rows are counted over the heads of all samples."""
    launched = []
    monkeypatch.setattr(hopper_forward, "multiprocessors", lambda _index: 132)
    monkeypatch.setattr(
        hopper_forward, "launch", lambda *arguments, **_options: launched.append(arguments)
    )
    q, k, v = (torch.randn(1, heads, length, 128).bfloat16() for heads in (8, 2, 2))
    start, end = torch.zeros(2, 1, length, dtype=torch.int32)
    picked = config.pick_hopper_forward(90, 128, q.dtype, length, True, True)
    out, lse = hopper_forward.hopper_fwd(q, k, v, start, end, 0.1, picked)
    ((kernel, grid, arguments, constants),) = launched
    assert kernel is hopper_forward._mixed_attention_fwd_hopper_kernel
    items = 8 * math.ceil(length / picked.block_m)
    assert grid == (min(items, 132), 1, 1)
    assert arguments[-2:] == (length, items)
    assert [x.base is y for x, y in zip(arguments, (q, k, v, out), strict=False)] == [True] * 4
    assert (arguments[5] is lse) == (not picked.dynamic)
    assert (constants["GROUP"], constants["HEADS"]) == (4, 8)
