"""Who gets a multicast address, and which sums go by it; with a stand-in for PyTorch's memory."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric_memory

from moe_engine.config import EngineConfig, ExchangeConfig, SchedulerConfig
from moe_engine.dist.buffer import SharedBuffer, symmetric_buffer
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange import domain
from moe_engine.dist.exchange.domain import ExchangeShape, NvlinkDomain, join_domain
from moe_engine.dist.topology import one_domain
from moe_engine.engine import runtime
from moe_engine.errors import ConfigError

DISABLE = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
ADDRESS = 1 << 40
SHAPE = ExchangeShape(
    num_ranks=2, num_experts=4, top_k=2, hidden=8, dtype=torch.bfloat16, max_tokens=8
)
WITH_MULTICAST = replace(SHAPE, reduced_rows=4, multicast_rows=16)
ALL_RANKS = range(2)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """PyTorch's symmetric memory of rank 0 of two; `multicast_ptr` is what it finds it can make.

    `disabled` is whether multicast was off when the memory was shared.
    """
    fake = SimpleNamespace(multicast_ptr=ADDRESS, disabled=None)

    def rendezvous(own: torch.Tensor, group: Any) -> SimpleNamespace:
        fake.disabled = os.environ.get(DISABLE) == "1"
        address = 0 if fake.disabled else fake.multicast_ptr
        pointers = [own.data_ptr(), own.data_ptr() + own.numel()]
        return SimpleNamespace(rank=0, buffer_ptrs=pointers, multicast_ptr=address)

    variables = {name: value for name, value in os.environ.items() if name != DISABLE}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(symmetric_memory, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    return fake


def shared(with_multicast: bool) -> SharedBuffer:
    return symmetric_buffer(64, None, torch.device("cpu"), with_multicast)


def test_memory_is_shared_without_multicast_unless_asked(memory: SimpleNamespace) -> None:
    assert shared(False).multicast_address == 0
    assert memory.disabled


def test_memory_is_shared_with_multicast_where_asked(memory: SimpleNamespace) -> None:
    assert shared(True).multicast_address == ADDRESS
    assert not memory.disabled


def test_what_the_user_has_disabled_stays_so(
    memory: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DISABLE, "1")
    assert shared(True).multicast_address == 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The CUDA extension's part; `sums` are the arguments of what was enqueued."""
    fake = SimpleNamespace(sums=[], ElementType=SimpleNamespace(BFLOAT16=0))
    fake.ExchangeLayout = lambda **sizes: SimpleNamespace(total_bytes=64)
    fake.ExchangeState = lambda **fields: SimpleNamespace(**fields)
    fake.exchange_all_reduce = lambda state, **arguments: fake.sums.append(arguments)
    monkeypatch.setattr(domain.native, "cuda_extension", lambda device: fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return fake


def make(shape: ExchangeShape, address: int) -> NvlinkDomain:
    shared_buffer = SharedBuffer(torch.zeros(64, dtype=torch.uint8), (0, 64), None, address)
    shard = domain.ExpertShard(shape.num_experts, shape.num_ranks, 0)
    return NvlinkDomain(shape, shard, shared_buffer, one_domain(2), 1.0, 1)


def test_the_kernels_get_the_address(library: SimpleNamespace) -> None:
    assert make(WITH_MULTICAST, ADDRESS).state.multicast == ADDRESS
    assert make(SHAPE, 0).state.multicast == 0


@pytest.mark.parametrize(
    ("num_rows", "address", "ranks", "by_packets"),
    [
        (4, ADDRESS, ALL_RANKS, True),
        (5, ADDRESS, ALL_RANKS, False),
        (16, ADDRESS, ALL_RANKS, False),
        (5, ADDRESS, range(1), True),
        (5, 0, ALL_RANKS, True),
    ],
)
def test_more_rows_than_go_by_packets_are_summed_in_the_network(
    library: SimpleNamespace, num_rows: int, address: int, ranks: range, by_packets: bool
) -> None:
    x_TH = torch.zeros(num_rows, SHAPE.hidden, dtype=SHAPE.dtype)
    reducing = make(WITH_MULTICAST, address)
    reducing.all_reduce(x_TH, ranks)
    [arguments] = library.sums
    assert arguments["by_packets"] == by_packets
    is_in_network = address != 0 and ranks == ALL_RANKS
    assert reducing.most_reduced_rows(ranks) == (16 if is_in_network else 4)


@pytest.mark.parametrize(
    ("shape", "address"), [(SHAPE, 0), (WITH_MULTICAST, ADDRESS), (WITH_MULTICAST, 0)]
)
def test_a_domain_without_the_multicast_that_it_needs_is_refused(
    monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace, shape: ExchangeShape, address: int
) -> None:
    asked = []

    def share(num_bytes: int, group: Any, device: Any, with_multicast: bool) -> SharedBuffer:
        asked.append(with_multicast)
        return SharedBuffer(torch.zeros(64, dtype=torch.uint8), (0, 64), None, address)

    monkeypatch.setattr(domain, "symmetric_buffer", share)
    properties = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    ranks = Communicator(2, 0, SimpleNamespace())
    is_refused = shape.multicast_rows > 0 and address == 0
    message = "in_network_reduction is on, and PyTorch has no multicast address .* cuda:0 or"
    with pytest.raises(ConfigError, match=message) if is_refused else nullcontext():
        joined = join_domain(shape, ranks, torch.device("cuda", 0), 1.0, one_domain(2))
        assert joined.state.multicast == address
    assert asked == [shape.multicast_rows > 0]


@pytest.mark.parametrize("is_on", [False, True])
def test_the_option_asks_for_it_for_all_rows_of_a_step(
    monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    config = EngineConfig(
        exchange=ExchangeConfig("nvlink", in_network_reduction=is_on),
        scheduler=SchedulerConfig(max_num_batched_tokens=5000),
    )
    rank = SimpleNamespace(config=config, groups=SimpleNamespace(ep=None), device=None)
    monkeypatch.setattr(runtime, "join_domain", lambda shape, *_: shape)
    joined = runtime.RankRuntime._join_domain(rank, SHAPE)
    assert joined == replace(SHAPE, multicast_rows=5000 if is_on else 0)
