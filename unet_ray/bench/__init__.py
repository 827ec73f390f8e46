"""The benchmark: contests of this project against what people would use instead (`jobs/benchmark.py`)."""
