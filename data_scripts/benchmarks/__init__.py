"""The five benchmarks, a file each."""
