"""A GPU's backend: steps over static buffers that a CUDA graph can replay, with kernels in Triton."""
