"""One call on a GPU machine, which measures and tests everything: python -m benchmarks gpu-call."""
