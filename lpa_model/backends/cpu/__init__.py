"""The CPU backend: C kernels for each instruction set, and the op lists that they run."""
