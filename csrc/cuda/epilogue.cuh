// Epilogues on the device: delta is computed where it is loaded.
#pragma once

#include "../outer.h"
#include "kernel.cuh"

namespace gradext {

template <class Real>
__device__ __forceinline__ Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exp(-x));
}

// The formulas are those of torch's backward functions, term by term, so that NaN and infinity come out alike. The
// branch is the same for a whole launch, or for all blocks of one of its problems.
template <class Real>
__device__ __forceinline__ Real apply(Epilogue epilogue, Real d, Real z) {
  switch (epilogue) {
    case Epilogue::none:
      return d;
    case Epilogue::residual:
      return d - z;
    case Epilogue::sigmoid_residual:
      return sigmoid(d) - z;
    case Epilogue::mse_residual:
      return Real(2) * (d - z);
    case Epilogue::relu:
      return z <= Real(0) ? Real(0) : d;
    case Epilogue::leaky_relu:
      return z > Real(0) ? d : d * Real(0.01);
    case Epilogue::sigmoid: {
      const Real s = sigmoid(z);
      return d * (Real(1) - s) * s;
    }
    case Epilogue::tanh: {
      const Real t = tanh(z);
      return d * (Real(1) - t * t);
    }
    case Epilogue::gelu: {
      const Real cdf = Real(0.5) * (Real(1) + erf(z * Real(0.70710678118654752440)));
      const Real pdf = Real(0.39894228040143267794) * exp(Real(-0.5) * z * z);
      return d * (cdf + z * pdf);
    }
    case Epilogue::silu: {
      const Real s = sigmoid(z);
      return d * s * (Real(1) + z * (Real(1) - s));
    }
    case Epilogue::elu:
      return z > Real(0) ? d : d * exp(z);
    case Epilogue::softplus:
      return d * sigmoid(z);
  }
  return d;
}

}  // namespace gradext
