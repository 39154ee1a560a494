"""Masks against loops that spell their rules out, token by token."""

import itertools
import random

import pytest
import torch
from mixed_attention_cases import MASKS
from torch._dynamo.testing import CompileCounter

from croc_kernels import ops
from croc_kernels.attention.mask import MixedMask


def brute(length, image, valid, document, window=None, exceed=False, until=None, first=0):
    """(L - first, L) list of lists; ``image[i]`` numbers the span that holds i, -1 for text."""
    rows = []
    for i in range(first, length):
        row = []
        for j in range(length):
            same = image[i] >= 0 and image[i] == image[j]
            near = window is None or i - j < window
            allowed = (j <= i and near) or same if exceed else (j <= i or same) and near
            allowed = allowed and document[i] == document[j] and valid[i] and valid[j]
            if until is not None:
                allowed = allowed and i < until[j]
            row.append(bool(allowed))
        rows.append(row)
    return rows


def random_case(rng):
    """One row: token types, images (no two documents share one, padding in none), padding,
    documents."""
    length = rng.choice([1, 2, 3, 7, 16, 33])
    document, current = [], 0
    for _ in range(length):
        current += rng.random() < 0.15
        document.append(current)
    visual = []
    while len(visual) < length:
        visual += [rng.random() < 0.5] * rng.randint(1, 8)
    visual = visual[:length]
    left, right = rng.choice([(0, 0), (rng.randint(0, length), 0), (0, rng.randint(0, length))])
    valid = [left <= i < length - right for i in range(length)]
    return length, visual, valid, document


def images_of(visual, valid, document):
    """Number the runs of visual tokens, cut at padding and documents."""
    image, number = [], -1
    for i, (v, ok) in enumerate(zip(visual, valid, strict=True)):
        if not (v and ok):
            image.append(-1)
            continue
        joined = i > 0 and image[i - 1] >= 0 and document[i - 1] == document[i]
        number += not joined
        image.append(number)
    return image


def same(mask, rows):
    return mask.to_dense()[0, 0].tolist() == rows


def assert_consistent(mask):
    """Bounds never decrease, are in range, and the column view says the same as the rows."""
    for low, high, limit in (
        (mask.start, mask.end, mask.num_keys),
        (mask.row_start, mask.row_end, mask.num_queries),
    ):
        assert low.dtype == high.dtype == torch.int32
        assert bool((low >= 0).all() and (low <= high).all() and (high <= limit).all())
        assert bool((low.diff(dim=1) >= 0).all() and (high.diff(dim=1) >= 0).all())
    row = torch.arange(mask.num_queries, device=mask.device)[None, :, None]
    columns = (mask.row_start[:, None] <= row) & (row < mask.row_end[:, None])
    if mask.visible_until is not None:
        columns &= row < mask.visible_until[:, None]
        seen = mask.to_dense()[:, 0].any(1)
        assert torch.equal(mask.visible_until > 0, seen)
    assert torch.equal(columns, mask.to_dense()[:, 0])


@pytest.mark.parametrize("seed", range(5))
def test_mask_from_token_types_equals_its_definition(seed):
    rng = random.Random(seed)
    for _ in range(40):
        length, visual, valid, document = random_case(rng)
        packed = rng.random() < 0.5
        document = document if packed else [0] * length
        window = rng.choice([None, 1, 2, 5, 100])
        exceed = rng.random() < 0.5
        until = [rng.randint(0, length) for _ in range(length)] if rng.random() < 0.3 else None
        queries = rng.randint(1, length)
        mask = MixedMask.from_token_types(
            torch.tensor([visual]),
            torch.tensor([valid]) if rng.random() < 0.7 or not all(valid) else None,
            document_ids=torch.tensor([document]) if packed else None,
            sliding_window=window,
            spans_exceed_window=exceed,
            visible_until=None if until is None else torch.tensor([until]),
            num_queries=queries,
        )
        image = images_of(visual, valid, document)
        first = length - queries
        assert same(mask, brute(length, image, valid, document, window, exceed, until, first))
        assert_consistent(mask)


@pytest.mark.parametrize("seed", range(3))
def test_mask_from_spans_keeps_adjacent_spans_apart(seed):
    rng = random.Random(100 + seed)
    for _ in range(40):
        length = rng.choice([1, 4, 17, 40])
        cuts = sorted(rng.sample(range(length + 1), rng.randint(0, min(length + 1, 8))))
        spans = [s for s in itertools.pairwise(cuts) if rng.random() < 0.8]
        image = [-1] * length
        for number, (first, past) in enumerate(spans):
            image[first:past] = [number] * (past - first)
        rows = [[0, f, p] for f, p in spans] + [[0, 0, 0]]
        rng.shuffle(rows)
        mask = MixedMask.from_spans(torch.tensor(rows), 1, length)
        assert same(mask, brute(length, image, [True] * length, [0] * length))
        assert_consistent(mask)


def test_mask_from_spans_without_any_is_causal():
    empty = MixedMask.from_spans(torch.zeros(0, 3, dtype=torch.int64), 2, 9)
    assert torch.equal(empty.to_dense(), MixedMask.causal(2, 9).to_dense())


def test_mask_padding_inside_a_packed_row_is_seen_by_nothing():
    rng = random.Random(7)
    for _ in range(60):
        document, valid = [], []
        for number in range(rng.randint(1, 4)):
            left, body, right = (rng.randint(0, 3) for _ in range(3))
            document += [number] * (left + body + right)
            valid += [False] * left + [True] * body + [False] * right
        length = len(document)
        if length == 0:
            continue
        visual = [rng.random() < 0.6 for _ in range(length)]
        mask = MixedMask.from_token_types(
            torch.tensor([visual]), torch.tensor([valid]), document_ids=torch.tensor([document])
        )
        assert same(mask, brute(length, images_of(visual, valid, document), valid, document))
        assert_consistent(mask)


def test_mask_cu_seqlens_are_documents():
    borders = [0, 3, 3, 9, 14]
    document = [0] * 3 + [2] * 6 + [3] * 5 + [9] * 2
    valid = [True] * 14 + [False] * 2
    visual = [bool(i % 5 > 1) for i in range(16)]
    mask = MixedMask.from_token_types(
        torch.tensor([visual]), cu_seqlens=torch.tensor(borders, dtype=torch.int32)
    )
    assert same(mask, brute(16, images_of(visual, valid, document), valid, document))
    assert mask.visible_until is None
    assert_consistent(mask)


@pytest.mark.parametrize("prefix", [0, 1, 5, 12])
def test_mask_prefix_is_seen_by_every_row(prefix):
    for pad in (0, 4):
        valid = [i >= pad for i in range(12)]
        image = [0 if i < prefix and valid[i] else -1 for i in range(12)]
        attention_mask = torch.tensor([valid]).float()
        mask = MixedMask.prefix(torch.tensor([prefix]), 12, attention_mask)
        assert same(mask, brute(12, image, valid, [0] * 12))
        assert_consistent(mask)


def released(labels, valid):
    """The released Croc: causal over valid keys, then every column before the first label
    opened."""
    length = len(labels)
    prefix = next((j for j, x in enumerate(labels) if x != -100), length)
    return [
        [j < prefix or (j <= i and valid[j]) for j in range(length)] for i in range(length)
    ]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 4), (3, 0)])
@pytest.mark.parametrize("first", [None, 5, 8])
def test_mask_from_labels_is_croc_released(left, right, first):
    valid = [left <= i < 12 - right for i in range(12)]
    labels = [-100 if first is None or i < first or not valid[i] else i for i in range(12)]
    tensors = torch.tensor([labels]), torch.tensor([valid])
    mask = MixedMask.from_labels(*tensors, exact_parity=True)
    assert same(mask, released(labels, valid))
    assert_consistent(mask)
    clean = MixedMask.from_labels(*tensors)
    end = 12 if first is None else first
    image = [0 if i < end and valid[i] else -1 for i in range(12)]
    assert same(clean, brute(12, image, valid, [0] * 12))


def test_mask_first_query_may_be_a_device_tensor():
    visual = torch.rand(3, 20) < 0.5
    whole = MixedMask.from_token_types(visual).to_dense()
    mask = MixedMask.from_token_types(visual, num_queries=2, first_query=torch.tensor([0, 7, 18]))
    for sample, first in enumerate((0, 7, 18)):
        assert torch.equal(mask.to_dense()[sample, 0], whole[sample, 0, first : first + 2])
    fixed = MixedMask.from_token_types(visual, num_queries=2, first_query=7)
    assert torch.equal(fixed.to_dense(), whole[:, :, 7:9])
    assert_consistent(mask)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("length", [1, 2, 97])
def test_mask_views_agree_and_rebuild(name, length):
    mask = MASKS[name](2, length, "cpu")
    assert_consistent(mask)
    rebuilt = MixedMask.from_rows(mask.start, mask.end, mask.num_keys, mask.visible_until)
    assert torch.equal(rebuilt.to_dense(), mask.to_dense())
    if name not in ("until", "cache-holes"):
        again = MixedMask.from_dense(mask.to_dense())
        assert torch.equal(again.to_dense(), mask.to_dense())
        assert_consistent(again)


def test_mask_moves_with_all_its_vectors():
    mask = MASKS["holes"](2, 40, "cpu").to("meta")
    assert {v.device.type for v in vars(mask).values() if v is not None} == {"meta"}
    assert repr(mask) == "MixedMask(batch=2, num_queries=40, num_keys=40, device=meta)"


def test_mask_of_an_empty_batch():
    mask = MixedMask.from_token_types(torch.zeros(0, 5, dtype=torch.bool), torch.zeros(0, 5))
    assert mask.to_dense().shape == (0, 1, 5, 5)


ONES = torch.ones(1, 6, dtype=torch.bool)
SPLIT = torch.tensor([[0, 0, 1, 1, 0, 0]])
GAP = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool()
SEQLENS = torch.tensor([0, 6])
BAD = [
    ("hole", lambda: MixedMask.from_token_types(ONES, torch.tensor([[1, 1, 0, 1, 1, 1]])),
     "attention_mask must be one run of ones per document (one interval per row can't express a "
     "hole), got a violation at sample, token (0, 3)"),
    ("ids", lambda: MixedMask.from_token_types(ONES, document_ids=SPLIT),
     "document_ids must not decrease along a row (one interval per row can't express a split "
     "document), got a violation at sample, token (0, 4)"),
    ("range", lambda: MixedMask.from_spans(torch.tensor([[0, 0, 1], [0, 4, 7]]), 1, 6),
     "spans must have 0 <= sample < batch and 0 <= first <= past <= length, "
     "got a violation at span 1"),
    ("sample", lambda: MixedMask.from_spans(torch.tensor([[1, 0, 1]]), 1, 6),
     "spans must have 0 <= sample < batch and 0 <= first <= past <= length, "
     "got a violation at span 0"),
    ("overlap", lambda: MixedMask.from_spans(torch.tensor([[0, 0, 3], [0, 2, 5]]), 1, 6),
     "spans must not overlap, got a violation at sample, token (0, 2)"),
    ("nested", lambda: MixedMask.from_spans(torch.tensor([[0, 1, 5], [0, 1, 5]]), 1, 6),
     "spans must not overlap, got a violation at sample, token (0, 1)"),
    ("crossing", lambda: MixedMask.from_spans(
        torch.tensor([[0, 1, 4]]), 1, 6, document_ids=torch.tensor([[0, 0, 0, 1, 1, 1]])),
     "spans must lie inside one document and outside padding, "
     "got a violation at sample, token (0, 3)"),
    ("padding", lambda: MixedMask.from_spans(
        torch.tensor([[0, 1, 4]]), 1, 6, torch.tensor([[0, 0, 1, 1, 1, 1]])),
     "spans must lie inside one document and outside padding, "
     "got a violation at sample, token (0, 1)"),
    ("rows", lambda: MixedMask.from_rows(torch.tensor([[0, 0]]), torch.tensor([[2, 1]]), 2),
     "start and end must satisfy 0 <= start <= end <= num_keys and never decrease along a row, "
     "got a violation at sample, token (0, 1)"),
    ("dense", lambda: MixedMask.from_dense(GAP),
     "dense must be one interval of keys per row with bounds that never decrease (anything else "
     "can't be expressed; a bound per key goes into visible_until), "
     "got a violation at sample, token (0, 2)"),
    ("prefix", lambda: MixedMask.prefix(torch.tensor([7]), 6),
     "prefix_length must be between 0 and length, got a violation at sample, token (0, 0)"),
    ("parity", lambda: MixedMask.from_labels(
        torch.tensor([[5, -100, 1]]), torch.tensor([[0, 0, 1]]), exact_parity=True),
     "labels must not supervise left padding with exact_parity, "
     "got a violation at sample, token (0, 0)"),
    ("seqlens", lambda: MixedMask.from_token_types(ONES, cu_seqlens=torch.tensor([0, 4, 2])),
     "cu_seqlens must start at 0, never decrease and end at or before length, "
     "got a violation at sample, token (0, 0)"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), [pytest.param(b, m, id=i) for i, b, m in BAD])
def test_mask_refuses_bad_values(build, message):
    with pytest.raises(ValueError, match=r"^MixedMask: ") as caught:
        build()
    assert str(caught.value) == f"MixedMask: {message}"


SHAPES = [
    (lambda: MixedMask.from_token_types(torch.zeros(1, 4)), TypeError,
     "MixedMask.from_token_types: is_visual must have dtype bool, got float32"),
    (lambda: MixedMask.from_token_types(torch.zeros(4, dtype=torch.bool)), ValueError,
     "MixedMask.from_token_types: is_visual must be (B, L), got (4,)"),
    (lambda: MixedMask.from_token_types(ONES, torch.ones(1, 5)), ValueError,
     "MixedMask.from_token_types: attention_mask must be (B, L) = (1, 6), got (1, 5)"),
    (lambda: MixedMask.from_token_types(ONES, sliding_window=0), ValueError,
     "MixedMask.from_token_types: sliding_window must be at least 1, got 0"),
    (lambda: MixedMask.from_token_types(ONES, num_queries=7), ValueError,
     "MixedMask.from_token_types: num_queries must be between 0 and 6, got 7"),
    (lambda: MixedMask.from_token_types(ONES, num_queries=2, first_query=5), ValueError,
     "MixedMask.from_token_types: first_query must be between 0 and 4, got 5"),
    (lambda: MixedMask.from_token_types(ONES.expand(2, 6), cu_seqlens=SEQLENS), ValueError,
     "MixedMask.from_token_types: cu_seqlens must go with a batch of one row, got B = 2"),
    (lambda: MixedMask.from_token_types(ONES, document_ids=SPLIT, cu_seqlens=SEQLENS), ValueError,
     "MixedMask.from_token_types: document_ids must be None when cu_seqlens is given"),
    (lambda: MixedMask.from_spans(torch.zeros(2, 2, dtype=torch.int64), 1, 6), ValueError,
     "MixedMask.from_spans: spans must be (S, 3), got (2, 2)"),
    (lambda: MixedMask.from_spans(torch.zeros(2, 3), 1, 6), TypeError,
     "MixedMask.from_spans: spans must have dtype int32, int64, got float32"),
    (lambda: MixedMask.from_dense(torch.zeros(2, 3, dtype=torch.bool)), ValueError,
     "MixedMask.from_dense: dense must be (B, Lq, Lk) or (B, 1, Lq, Lk), got (2, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "message"), SHAPES)
def test_mask_refuses_bad_shapes(build, error, message):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message


def test_mask_construction_and_use_compile_with_one_recompilation():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def visible(is_visual, attention_mask):
        mask = MixedMask.from_token_types(is_visual, attention_mask)
        return (mask.end - mask.start).sum() + mask.row_end.sum()

    for length in (16, 24, 40, 33):
        is_visual, attention_mask = torch.rand(2, length) < 0.5, torch.ones(2, length)
        attention_mask[:, length // 2 :] = 0
        mask = MixedMask.from_token_types(is_visual, attention_mask)
        want = (mask.end - mask.start).sum() + mask.row_end.sum()
        assert torch.equal(visible(is_visual, attention_mask), want)
    assert counter.frame_count <= 2


def test_mask_opcheck():
    is_visual, ids = torch.rand(2, 9) < 0.5, torch.arange(9).expand(2, 9) // 4
    padding, spans = torch.ones(2, 9), torch.tensor([[0, 1, 4], [1, 0, 0], [1, 3, 9]])
    lengths, borders = torch.tensor([3, 9]), torch.tensor([0, 4, 9])
    plain = (None, None, None)
    for arguments in (
        (is_visual, "types", *plain, 2, 9, 0, False, 0),
        (is_visual[:1], "types", padding[:1], None, borders, 1, 9, 3, True, 0),
        (spans, "spans", padding, ids, None, 2, 9, 0, False, 0),
        (lengths, "prefix", *plain, 2, 9, 0, False, 0),
        (ids, "labels", *plain, 2, 9, 0, False, 1),
        (is_visual[:0], "full", None, ids, None, 2, 9, 0, False, 0),
    ):
        torch.library.opcheck(ops.mask_rows, arguments)
    mask = MixedMask.from_token_types(is_visual)
    for until, holes in ((None, False), (None, True), (ids, False)):
        torch.library.opcheck(ops.mask_columns, (mask.start, mask.end, 9, until, holes))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_mask_on_cuda_equals_cpu_without_waiting(name):
    want = MASKS[name](3, 301, "cpu")
    MASKS[name](3, 301, "cuda")  # the first call may load modules, which waits
    torch.cuda.synchronize()
    is_visual = (torch.rand(3, 301) < 0.5).cuda()
    attention_mask = torch.ones(3, 301, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        MixedMask.from_token_types(is_visual, attention_mask, sliding_window=9)
        MixedMask.prefix(attention_mask.sum(1).int(), 301, attention_mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    got = MASKS[name](3, 301, "cuda").check().to("cpu")
    for field in ("start", "end", "row_start", "row_end"):
        assert torch.equal(getattr(got, field), getattr(want, field))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [4096, 5000, 20000])
@pytest.mark.parametrize("name", ["spans", "right", "packed", "holes", "window-old", "until"])
def test_mask_of_long_rows_on_cuda_equals_cpu(name, length):
    got, want = (MASKS[name](2, length, device) for device in ("cuda", "cpu"))
    for field, value in vars(want).items():
        mine = getattr(got, field)
        assert (mine is None) == (value is None), field
        assert value is None or torch.equal(mine.cpu(), value), field


@pytest.mark.gpu
def test_mask_on_cuda_captures_into_a_graph():
    is_visual = torch.rand(2, 700, device="cuda") < 0.5
    padding = torch.ones(2, 700, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        MixedMask.from_token_types(is_visual, padding)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = MixedMask.from_token_types(is_visual, padding)
    for seed in (1, 2):
        torch.manual_seed(seed)
        is_visual.copy_(torch.rand(2, 700) < 0.5)
        padding[:, 600 + seed :] = 0
        graph.replay()
        want = MixedMask.from_token_types(is_visual.cpu(), padding.cpu())
        for field in ("start", "end", "row_start", "row_end", "token_faults"):
            assert torch.equal(getattr(mask, field).cpu(), getattr(want, field))


@pytest.mark.gpu
def test_mask_construction_compiles_on_cuda():
    def bounds(is_visual, padding):
        mask = MixedMask.from_token_types(is_visual, padding)
        return mask.start, mask.end, mask.row_start, mask.row_end

    arguments = torch.rand(2, 300, device="cuda") < 0.5, torch.ones(2, 300, device="cuda")
    compiled = torch.compile(bounds, fullgraph=True)
    for got, want in zip(compiled(*arguments), bounds(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_mask_on_cuda_reports_bad_spans_when_asked():
    mask = MixedMask.from_spans(torch.tensor([[0, 0, 3], [0, 2, 5]], device="cuda"), 1, 6)
    with pytest.raises(ValueError, match="spans must not overlap"):
        mask.check()
