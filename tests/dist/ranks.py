"""Run a function on several ranks, each a process of its own, on a CPU or with a GPU each."""

import multiprocessing
import tempfile
import traceback
from pathlib import Path

import torch

from moe_engine.config import ParallelConfig
from moe_engine.dist.groups import create_groups
from moe_engine.dist.layout import RankLayout
from moe_engine.dist.rendezvous import open_store


def _run(function, rank, tp, dp, device_type, store_file, results):
    torch.set_num_threads(1)
    device = torch.device("cpu")
    try:
        if device_type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        layout = RankLayout(rank, tp, dp)
        store = open_store(store_file, rank, layout.world_size)
        function(create_groups(layout, store, device, 60))
        results.put((rank, None))
    except BaseException:
        results.put((rank, traceback.format_exc()))


def run_on_ranks(function, tp, dp, timeout=120, device_type="cpu"):
    """Call ``function(groups)`` on tp × dp ranks; raises if any of them raises.

    Args:
        timeout: seconds after which a rank that has not ended is an error.
        device_type: ``cuda`` gives each rank the GPU of its number.
    """
    ParallelConfig(attention_tp=tp, attention_dp=dp)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store_file = str(Path(directory) / "store")
        processes = [
            context.Process(
                target=_run,
                args=(function, rank, tp, dp, device_type, store_file, results),
                daemon=True,
            )
            for rank in range(tp * dp)
        ]
        for process in processes:
            process.start()
        try:
            for _ in processes:
                rank, error = results.get(timeout=timeout)
                assert error is None, f"rank {rank}:\n{error}"
        finally:
            for process in processes:
                process.kill()
                process.join()
