"""int8 and nf4: formats, kernels, modules."""
