"""Time, memory and error of every loss beside what one would use instead: python -m benchmarks."""
