"""The linear layer of clusters (`hopper.cluster_linear`): its bits, its order, and what it takes.

Its values at edge shapes are compared with float32 by `test_hopper`.

Legend: R rows, X input width, O output width, N layers.
"""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops import hopper
from moe_engine.ops.linear import linear

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or hopper.extension(torch.device("cuda", 0)) is None,
    reason="needs a GPU of compute capability 9.0 and moe_engine._C",
)

BF16 = torch.bfloat16


@pytest.mark.parametrize(("in_features", "out_features"), [(2048, 5120), (4096, 2048)])
def test_a_row_of_a_layer_of_clusters_gets_the_same_bits_in_any_batch(
    in_features: int, out_features: int
) -> None:
    x_RX = torch.randn(256, in_features, device="cuda").to(BF16)
    weight_OX = torch.randn(out_features, in_features, device="cuda").to(BF16)
    together_RO = hopper.cluster_linear(x_RX, weight_OX)
    for first, last in ((0, 256), (0, 1), (255, 256), (3, 67), (60, 190), (1, 256)):
        some_RO = hopper.cluster_linear(x_RX[first:last], weight_OX)
        assert torch.equal(some_RO, together_RO[first:last])


@pytest.mark.parametrize("num_rows", [65, 128, 256])
def test_a_layer_of_clusters_waits_for_the_one_before(num_rows: int) -> None:
    """It begins before that has ended. Sums in another order or of other data would show."""
    weights_NOX = (torch.randn(2, 2048, 2048, device="cuda") / 45).to(BF16)
    x_RX = torch.randn(num_rows, 2048, device="cuda").to(BF16)

    def run(wait: bool) -> torch.Tensor:
        out_RX = x_RX
        for call in range(100):
            out_RX = hopper.cluster_linear(out_RX, weights_NOX[call % 2])
            if wait:
                torch.cuda.synchronize()
        return out_RX

    expected_RX = run(wait=True)
    assert expected_RX.isfinite().all()
    assert expected_RX.any(dim=1).all()
    for _ in range(5):
        assert torch.equal(run(wait=False), expected_RX)


def test_a_layer_of_clusters_is_not_taken_where_it_is_not_best_or_does_not_fit() -> None:
    def takes(
        num_rows: int = 128,
        in_features: int = 1024,
        out_features: int = 64,
        padding: int = 0,
        first: int = 0,
        dtype: torch.dtype = BF16,
    ) -> bool:
        wide = torch.empty(num_rows, first + in_features + padding, dtype=dtype, device="cuda")
        weight_OX = torch.empty(out_features, in_features, dtype=dtype, device="cuda")
        return hopper.takes_cluster_linear(wide[:, first : first + in_features], weight_OX)

    assert takes(65)
    assert takes(256)
    for num_rows in (0, 64, 257):
        assert not takes(num_rows)
    assert not takes(dtype=torch.float16)
    assert not takes(out_features=60)
    for num_parts in (1, 2, 4, 8):
        assert takes(in_features=512 * num_parts)
    for in_features in (256, 512 * 3, 1024 + 256, 512 * 16):
        assert not takes(in_features=in_features)
    # As many columns as one round of blocks covers, and more.
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count // 16 * 16
    for in_features, widest in ((512, 160), (2048, 160 // 4), (4096, 144 // 8)):
        assert takes(in_features=in_features, out_features=widest * num_sms)
        assert not takes(in_features=in_features, out_features=widest * num_sms + 8)
    # Rows that begin at multiples of 16 bytes, and others.
    assert takes(padding=8)
    assert takes(first=8)
    assert not takes(padding=4)
    assert not takes(first=4, padding=4)

    x_RX = torch.empty(128, 512, dtype=BF16, device="cuda")
    weight_OX = torch.empty(64, 1024, dtype=BF16, device="cuda")
    assert not hopper.takes_cluster_linear(x_RX, weight_OX[:, :512])
    assert not hopper.takes_cluster_linear(x_RX[:, ::2], weight_OX[:, :256].contiguous())


@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features"), [(257, 512, 64), (96, 1536, 64), (96, 512, 60)]
)
def test_a_layer_that_the_clusters_have_no_room_for_is_refused(
    num_rows: int, in_features: int, out_features: int
) -> None:
    x_RX = torch.zeros(num_rows, in_features, dtype=BF16, device="cuda")
    weight_OX = torch.zeros(out_features, in_features, dtype=BF16, device="cuda")
    with pytest.raises(ValueError, match="does not fit the cluster kernel"):
        hopper.cluster_linear(x_RX, weight_OX)


@pytest.mark.parametrize("num_rows", [64, 65, 256, 257])
def test_linear_layers_go_to_the_clusters_where_those_take_them(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_RX = torch.randn(num_rows, 1024, device="cuda").to(BF16)
    weight_OX = (torch.randn(256, 1024, device="cuda") / 32).to(BF16)
    ours_RO = hopper.cluster_linear(x_RX[:256], weight_OX)
    calls = []
    right = hopper.cluster_linear
    monkeypatch.setattr(hopper, "cluster_linear", lambda *args: calls.append(1) or right(*args))
    out_RO = linear(x_RX, weight_OX)
    torch.testing.assert_close(out_RO[:256], ours_RO, rtol=2e-2, atol=2e-2)
    linear(x_RX, weight_OX, bias_O=weight_OX[:, 0])
    assert len(calls) == (65 <= num_rows <= 256)
