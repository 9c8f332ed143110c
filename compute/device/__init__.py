"""The device: free memory, staging, sizes, whether Triton is there."""
