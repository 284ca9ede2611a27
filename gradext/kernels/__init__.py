"""The @triton.jit functions, with their tile tables. Only `gradext.backends.triton` imports them, at first use.

Tables are explicit and there is no autotuning: a launch compiles one configuration, and results depend on sizes and
types only. Names: B samples, T positions, O output and I input features; strides are in elements and may be 0.
"""
