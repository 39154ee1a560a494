"""The order of products that the backward has for D = 64 and enough keys: dV's before dP is there,
dK's into the next tile of rows. Forced upon short rows and shared heads, which else don't get it.
"""

from dataclasses import replace

import pytest
import torch
from mixed_attention_cases import MASKS, check, gradients, inputs

from croc_kernels.attention import config
from croc_kernels.attention.api import mixed_attention

pytestmark = pytest.mark.gpu

LENGTHS = (1, 63, 64, 65, 129, 700)
# The same everywhere: every other count is compiled apart.
HEADS = [(3, 3), (6, 2)]


@pytest.fixture
def late(monkeypatch):
    """``late(wanted)`` makes the choice; what is returned lists the choices made since."""
    pick, taken = config.pick_hopper_backward, []

    def choose(wanted):
        def picked(*arguments, **options):
            found = pick(*arguments, **options)
            taken.append(found and replace(found, late=wanted, whole=False))
            return taken[-1]

        monkeypatch.setattr(config, "pick_hopper_backward", picked)
        taken.clear()
        return taken

    return choose


def run(mask, deterministic):
    return lambda *x: mixed_attention(*x, mask, return_lse=True, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", MASKS)
def test_late_products_are_within_the_budget(name, heads, dtype, deterministic, late):
    for length in LENGTHS:
        mask = MASKS[name](2, length, "cuda")
        taken = late(True)
        check(run(mask, deterministic), *inputs(mask, *heads, 64, dtype), mask, 0.125)
        assert taken == [None] if mask.visible_until is not None else taken[0].late


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["spans", "packed", "left", "window"])
def test_late_products_change_no_bit_in_order(name, heads, late):
    for length in (*LENGTHS, 2049):
        mask = MASKS[name](2, length, "cuda")
        tensors = inputs(mask, *heads, 64, torch.bfloat16)
        late(False)
        want = gradients(run(mask, True), *tensors, torch.bfloat16)
        taken = late(True)
        for _ in range(3):
            got = gradients(run(mask, True), *tensors, torch.bfloat16)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert all(x.late for x in taken)


@pytest.mark.parametrize("deterministic", [True, False])
def test_late_products_where_they_are_chosen(deterministic, late):
    """Rows so long that both orders of adding get them, against the kernel without."""
    length = config.HOPPER_LATE[64, False][1] + 77
    picked = config.pick_hopper_backward(
        90, 64, torch.bfloat16, length, True, True, ordered=deterministic
    )
    assert picked.late
    mask = MASKS["spans"](1, length, "cuda")
    tensors = inputs(mask, *HEADS[0], 64, torch.bfloat16)
    got = [gradients(run(mask, deterministic), *tensors, torch.bfloat16) for _ in range(3)]
    taken = late(False)
    want = gradients(run(mask, True), *tensors, torch.bfloat16)
    assert not taken[0].late
    for out, lse, dq, dk, dv in got:
        same = zip((out, lse, dk, dv), want[:2] + want[3:], strict=True)
        assert all(torch.equal(a, b) for a, b in same)
        assert torch.equal(dq, want[2]) or not deterministic
        assert (dq - want[2]).norm() <= 2e-3 * want[2].norm()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["left", "right", "packed", "cache"])
def test_late_products_keep_nan_in_unseen_places(name, heads, deterministic, late):
    mask = MASKS[name](3, 700, "cuda")
    dense = mask.to_dense()
    sees, seen = dense.any(-1)[..., None], dense.any(-2)[..., None]
    q, k, v = (x.detach() for x in inputs(mask, *heads, 64, torch.bfloat16))
    weight = torch.randn_like(q)
    taken = late(True)

    def grads(fill):
        leaves = [torch.where(m, x, fill) for m, x in ((sees, q), (seen, k), (seen, v))]
        leaves = [x.requires_grad_() for x in leaves]
        out = mixed_attention(*leaves, mask, deterministic=deterministic)
        return out, *torch.autograd.grad(out, leaves, torch.where(sees, weight, fill))

    for got, want in zip(grads(float("nan")), grads(0.0), strict=True):
        if deterministic:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want)
    # Once for both: the second call is of the kind of the first.
    assert [x.late for x in taken] == [True]
