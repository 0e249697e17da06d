"""Measurements: scripts that check a result first, then time it and write JSON to results/.

python -m benchmarks.bench_engine_cpu    the whole engine on a CPU, against transformers
python -m benchmarks.bench_engine        the whole engine: steps, prefill, start, memory, floors
python -m benchmarks.bench_serving       streams over HTTP, against the same work offline
python -m benchmarks.step_timeline       a decode step on a GPU, kernel by kernel
python -m benchmarks.tune                decode steps with each kernel; writes the tables of choices
python -m benchmarks.start_timeline      a start on a GPU, phase by phase
python -m benchmarks.bench_expert_ffn    the kernels of the MoE layer and the small ones on a GPU
python -m benchmarks.bench_attention     those of attention
python -m benchmarks.bench_sampling      those of sampling
python -m benchmarks.bench_energy        time and energy of a prompt's operators at the power limit
python -m benchmarks.peer                another engine's figures, as bench_engine takes them
python -m benchmarks.ceilings            what the machine can do at most
python -m benchmarks.plot                plots and the README's table from the JSON
"""
