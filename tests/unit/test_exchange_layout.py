"""The memory that ranks share: sections side by side, large enough, none over another."""

import importlib.util
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.dist.exchange.domain import ExchangeShape

if importlib.util.find_spec("moe_engine._C") is None:
    pytest.skip("moe_engine._C was not built", allow_module_level=True)

from moe_engine import _C

CHUNK_TOKENS = 4


@settings(max_examples=100, deadline=None)
@given(
    num_ranks=st.integers(1, 128),
    max_tokens=st.integers(1, 8192),
    packet_tokens=st.integers(0, 8192),
    reduced_rows=st.integers(0, 8192),
    multicast_rows=st.integers(0, 8192),
    row_bytes=st.integers(1, 1024).map(lambda n: 16 * n),
    wire_bytes=st.integers(1, 1024).map(lambda n: 16 * n),
    top_k=st.integers(1, 32),
)
def test_sections_do_not_overlap(
    num_ranks: int,
    max_tokens: int,
    packet_tokens: int,
    reduced_rows: int,
    multicast_rows: int,
    row_bytes: int,
    wire_bytes: int,
    top_k: int,
) -> None:
    packet_tokens = min(packet_tokens, max_tokens)
    layout = _C.ExchangeLayout(
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        packet_tokens=packet_tokens,
        reduced_rows=reduced_rows,
        multicast_rows=multicast_rows,
        row_bytes=row_bytes,
        wire_bytes=wire_bytes,
        top_k=top_k,
    )
    assert layout.num_chunks == -(-max_tokens // CHUNK_TOKENS)
    # A packet brings 3 words of 4 bytes.
    row_packets = layout.dispatch_packets - layout.header_packets
    assert 3 * layout.header_packets >= 2 * top_k > 3 * (layout.header_packets - 1)
    assert 3 * row_packets >= wire_bytes // 4 > 3 * (row_packets - 1)
    assert 3 * layout.combine_packets >= row_bytes // 4 > 3 * (layout.combine_packets - 1)
    flags = 4 * num_ranks * (layout.num_chunks + 1)
    needed = [
        (layout.abort_at, 8),
        (layout.dispatch_flags_at, flags),
        (layout.combine_flags_at, flags),
        (layout.dispatch_inbox_at, 2 * 16 * num_ranks * packet_tokens * layout.dispatch_packets),
        (layout.combine_inbox_at, 16 * num_ranks * packet_tokens * layout.combine_packets),
        (layout.reduce_inbox_at, 2 * 16 * num_ranks * reduced_rows * layout.combine_packets),
        (layout.written_flags_at, 4 * num_ranks * multicast_rows),
        (layout.summed_flags_at, 4 * multicast_rows),
        (layout.multicast_rows_at, multicast_rows * row_bytes),
        (layout.rows_at, num_ranks * max_tokens * wire_bytes),
        (layout.slots_at, 4 * num_ranks * max_tokens * top_k),
        (layout.weights_at, 4 * num_ranks * max_tokens * top_k),
        (layout.results_at, num_ranks * max_tokens * row_bytes),
        (layout.total_bytes, 0),
    ]
    for (at, num_bytes), (next_at, _) in itertools.pairwise(needed):
        assert at % 256 == 0
        assert at + num_bytes <= next_at
    waste = layout.total_bytes - sum(num_bytes for _, num_bytes in needed)
    assert waste <= 256 * (len(needed) + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ranks": 129}, "num_ranks is 129; it is from 1 to 128"),
        ({"top_k": 33}, "top_k is 33; it is from 1 to 32"),
        ({"row_bytes": 24}, "row_bytes is 24; it is a multiple of 16"),
        ({"wire_bytes": 8}, "wire_bytes is 8; it is a multiple of 16"),
        ({"packet_tokens": 9}, "packet_tokens is 9; it is from 0 to 8"),
        ({"reduced_rows": -1}, "reduced_rows is -1; it is from 0 to 1048576"),
        ({"multicast_rows": -1}, "multicast_rows is -1; it is from 0 to 1048576"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes: dict[str, int], message: str) -> None:
    sizes = {"num_ranks": 2, "max_tokens": 8, "packet_tokens": 8, "top_k": 2}
    sizes |= {"row_bytes": 32, "wire_bytes": 32, "reduced_rows": 0}
    with pytest.raises(ValueError, match=message):
        _C.ExchangeLayout(**sizes | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float64; it is one of"),
        ({"hidden": 12}, "hidden is 12, 24 bytes a row; rows are multiples of 16"),
        ({"top_k": 0}, "top_k is 0; it is from 1 to 32"),
        ({"num_experts": 5}, "num_experts is 5 on 2 ranks"),
        ({"fp8": True}, "fp8 of 64 elements of torch.bfloat16; it is for multiples of 512"),
        ({"fp8": True, "hidden": 512, "dtype": torch.float32}, "fp8 of 512 elements of torch.f"),
    ],
)
def test_rows_that_cannot_be_moved_are_refused(changes: dict, message: str) -> None:
    sizes = {
        "num_ranks": 2,
        "num_experts": 4,
        "top_k": 2,
        "hidden": 64,
        "dtype": torch.bfloat16,
        "max_tokens": 8,
    }
    ExchangeShape(**sizes)
    with pytest.raises(ValueError, match=message):
        ExchangeShape(**sizes | changes)


@pytest.mark.parametrize(
    ("multicast", "num_rows", "group_size", "message"),
    [
        (1, 17, 2, "num_rows is 17; it is from 1 to 16"),
        (1, 16, 1, "a sum by multicast is over all ranks"),
        (0, 16, 2, "of a domain that has it"),
    ],
)
def test_sums_by_multicast_that_cannot_be_are_refused(
    multicast: int, num_rows: int, group_size: int, message: str
) -> None:
    sizes = {"num_ranks": 2, "max_tokens": 8, "packet_tokens": 8, "top_k": 2}
    sizes |= {"row_bytes": 32, "wire_bytes": 32, "reduced_rows": 0, "multicast_rows": 16}
    state = _C.ExchangeState(
        layout=_C.ExchangeLayout(**sizes),
        type=_C.ElementType.BFLOAT16,
        is_fp8=False,
        rank=0,
        num_local=1,
        buffers=[0, 0],
        multicast=multicast,
        order=[1, 0],
        counters=0,
        abort_report=0,
        timeout_ns=1,
        num_blocks=1,
        next_may_start=True,
    )
    rows = {"x": 0, "out": 0, "num_rows": num_rows, "first_rank": 0, "group_size": group_size}
    with pytest.raises(ValueError, match=message):
        _C.exchange_all_reduce(state, by_packets=False, **rows, stream=0)
