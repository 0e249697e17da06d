"""Which replica a token goes to: the hash, shares of the tokens, and counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.dist.exchange.replicas import (
    DECODE,
    PREFILL,
    Balancing,
    ReplicaTable,
    physical_ids,
)
from moe_engine.ops.replicas import LAST_HASH, choose_replicas, replica_hash

CPU = torch.device("cpu")
WORD = 0xFFFFFFFF


def slow_hash(sequence: int, expert: int) -> int:
    x = (sequence * 0x9E3779B1 & WORD) ^ (expert * 0x85EBCA6B & WORD)
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    x ^= x >> 16
    return x & LAST_HASH


def tags_of(sequences: torch.Tensor, phase: int = DECODE) -> torch.Tensor:
    return (2 * sequences + phase).to(torch.int32)


@given(sequence=st.integers(0, WORD), expert=st.integers(0, WORD))
def test_hash_is_that_of_numbers_of_32_bits(sequence: int, expert: int) -> None:
    found = replica_hash(torch.tensor([sequence]), torch.tensor([expert]))
    assert found.tolist() == [slow_hash(sequence, expert)]


def test_replicas_take_their_shares() -> None:
    table = ReplicaTable.make(
        [[(3, 0.5), (7, 0.3), (9, 0.2)], [(1, 1.0)], [(2, 0.0), (4, 5.0)]], 3, CPU
    )
    num_tokens = 40_000
    ids_TK = torch.tensor([[0, 1, 2]], dtype=torch.int32).expand(num_tokens, 3)
    chosen_TK = Balancing(tags_of(torch.arange(num_tokens)), table).apply(ids_TK)
    assert chosen_TK.dtype == torch.int32
    shares = [float((chosen_TK[:, 0] == slot).float().mean()) for slot in (3, 7, 9)]
    # Five times the deviation of so many coins.
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=5 * 0.5 / num_tokens**0.5)
    assert chosen_TK[:, 1].tolist() == [1] * num_tokens
    assert chosen_TK[:, 2].tolist() == [4] * num_tokens


def test_a_sequence_stays_with_its_replica_and_experts_are_drawn_apart() -> None:
    table = ReplicaTable.make([[(0, 1.0), (2, 1.0)], [(1, 1.0), (3, 1.0)]], 2, CPU)
    sequences = torch.randint(0, 1 << 30, (3000,))
    ids_TK = torch.tensor([[0, 1]], dtype=torch.int32).expand(3000, 2)
    first, again = (
        Balancing(tags_of(sequences, phase), table).apply(ids_TK) for phase in (DECODE, PREFILL)
    )
    assert torch.equal(first, again)
    both = ((first[:, 0] == 2) & (first[:, 1] == 3)).float().mean()
    assert float(both) == pytest.approx(0.25, abs=0.05)


def test_more_weight_moves_only_what_has_to_move() -> None:
    sequences = torch.randint(0, 1 << 30, (5000,))
    ids_TK = torch.zeros(5000, 1, dtype=torch.int32)
    before, after = (
        Balancing(
            tags_of(sequences), ReplicaTable.make([[(0, share), (1, 1 - share)]], 2, CPU)
        ).apply(ids_TK)
        for share in (0.5, 0.6)
    )
    assert not ((before == 0) & (after == 1)).any()
    assert float((before != after).float().mean()) == pytest.approx(0.1, abs=0.03)


def test_no_expert_is_no_expert() -> None:
    table = ReplicaTable.make([[(5, 1.0)]], 1, CPU)
    ids_TK = torch.tensor([[0, -1], [-1, 0]], dtype=torch.int32)
    chosen = choose_replicas(ids_TK, tags_of(torch.tensor([1, 2])), table.slots_ER, table.bounds_ER)
    assert chosen.tolist() == [[5, -1], [-1, 5]]


def test_choices_are_counted_by_phase_and_add_up() -> None:
    load_2E = torch.zeros(2, 3, dtype=torch.int32)
    ids_TK = torch.tensor([[0, 2], [2, -1], [2, 1]], dtype=torch.int32)
    tags_T = torch.tensor([2 * 7 + PREFILL, 2 * 8 + DECODE, 2 * 7 + PREFILL], dtype=torch.int32)
    balancing = Balancing(tags_T, load_2E=load_2E)
    assert balancing.apply(ids_TK) is ids_TK
    assert load_2E.tolist() == [[0, 0, 1], [1, 1, 2]]
    balancing.apply(ids_TK)
    assert load_2E.tolist() == [[0, 0, 2], [2, 2, 4]]
    assert physical_ids(ids_TK, None) is ids_TK


def test_tags_may_use_all_bits() -> None:
    table = ReplicaTable.make([[(0, 1.0), (1, 1.0)]], 2, CPU)
    sequence = (1 << 31) - 5
    tag = torch.tensor([2 * sequence + 1 - (1 << 32)], dtype=torch.int32)
    chosen = Balancing(tag, table).apply(torch.zeros(1, 1, dtype=torch.int32))
    assert chosen.item() == int(slow_hash(sequence, 0) > LAST_HASH // 2)


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        ([[(0, 1.0)], []], "expert 1 has 0 replicas; it is from 1 to 2"),
        ([[(0, 1.0), (1, 1.0), (2, 1.0)]], "expert 0 has 3 replicas"),
        ([[(0, 0.0), (1, 0.0)]], r"expert 0's shares are \[0.0, 0.0\]"),
        ([[(0, 2.0), (1, -1.0)]], r"expert 0's shares are \[2.0, -1.0\]"),
    ],
)
def test_impossible_tables_are_refused(
    replicas: list[list[tuple[int, float]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ReplicaTable.make(replicas, 2, CPU)


def test_a_table_larger_than_shared_memory_is_refused() -> None:
    too_large = torch.zeros(1024, 7, dtype=torch.int32)
    with pytest.raises(ValueError, match="57344 bytes, of 49152"):
        ReplicaTable(too_large, too_large)
