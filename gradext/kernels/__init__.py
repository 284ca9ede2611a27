"""@triton.jit functions alone, with their tile tables. Imported by `gradext.backends.triton` only, at first use.

Tables are explicit and there is no autotuning: a launch compiles one configuration, and results depend on sizes and
types alone. Names: B samples, T positions, O output and I input features; strides are in elements and may be 0.
"""
