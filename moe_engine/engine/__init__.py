"""The engine: scheduler, step execution, rank processes, and the Python API."""
