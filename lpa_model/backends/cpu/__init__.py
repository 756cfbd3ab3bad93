"""Kernels for CPUs: packed weights, a step as one op list, batch-invariant to the bit."""
