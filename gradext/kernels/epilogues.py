"""The output deltas named by `gradext.backends.reference.EPILOGUES`, computed in registers from two tensors.

fp32 exponentials are the hardware's (2 ulp and |x| / 2 more), which the sums that follow do not notice.
"""

import triton
import triton.language as tl

# EPILOGUE in the kernels: Triton 3.6 and older take no names in tuples of constants.
NAMES = (
    None, "residual", "sigmoid_residual", "mse_residual",
    "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "elu", "softplus",
)  # fmt: skip
CODES = {name: code for code, name in enumerate(NAMES)}
NONE, RESIDUAL, SIGMOID_RESIDUAL, MSE_RESIDUAL, RELU, LEAKY_RELU, SIGMOID, TANH, GELU, SILU, ELU, SOFTPLUS = (
    tl.constexpr(code) for code in range(len(NAMES))
)


@triton.jit
def widen(x):
    """x in the type that sums are kept in: fp64 for fp64, else fp32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_slope(x):
    """s(1 - s) for s = sigmoid(x), without the cancellation of 1 - s."""
    e = tl.exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def apply_epilogue(d, z, EPILOGUE: tl.constexpr):
    """The delta that EPILOGUE makes of d and its operand z, both fp32 or both fp64.

    Where z is not a number, the result is what torch's backward of that activation makes of it.
    """
    if EPILOGUE == RESIDUAL:
        return d - z
    elif EPILOGUE == SIGMOID_RESIDUAL:
        return sigmoid(d) - z
    elif EPILOGUE == MSE_RESIDUAL:
        return 2.0 * (d - z)
    elif EPILOGUE == RELU:
        return tl.where(z <= 0, 0.0, d)
    elif EPILOGUE == LEAKY_RELU:
        return tl.where(z > 0, d, 0.01 * d)
    elif EPILOGUE == SIGMOID:
        return d * sigmoid_slope(z)
    elif EPILOGUE == TANH:  # 1 - tanh²(z) = 4 s(1 - s) at 2z
        return d * (4.0 * sigmoid_slope(2.0 * z))
    elif EPILOGUE == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return d * (0.5 * (1.0 + tl.erf(0.7071067811865476 * z)) + z * density)
    elif EPILOGUE == SILU:
        return d * (sigmoid(z) + z * sigmoid_slope(z))
    elif EPILOGUE == ELU:
        return tl.where(z > 0, d, d * tl.exp(z))
    else:
        tl.static_assert(EPILOGUE == SOFTPLUS, "an epilogue that has no kernel")
        return d * sigmoid(z)


@triton.jit
def load_delta(delta_ptr, operand_ptr, mask, EPILOGUE: tl.constexpr):
    """The delta behind blocks of pointers: as stored without an epilogue, else wide, 0 and its epilogue outside."""
    delta = tl.load(delta_ptr, mask=mask, other=0.0)
    if EPILOGUE == NONE:
        return delta
    else:
        return apply_epilogue(widen(delta), widen(tl.load(operand_ptr, mask=mask, other=0.0)), EPILOGUE)
