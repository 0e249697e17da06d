"""Measurements: scripts that check a result first, then time it and write JSON to results/.

python -m benchmarks.bench_engine_cpu    the whole engine on a CPU, against transformers
python -m benchmarks.plot                plots and the README's table from the JSON
"""
