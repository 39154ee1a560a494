"""Benchmarks of every operator against what users would pick instead; see CONTRIBUTING.md."""
