"""Time, memory and error of every loss, compared with its alternatives: python -m benchmarks."""
