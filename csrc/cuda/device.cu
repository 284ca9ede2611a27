// The state of this machine's GPUs, and the error messages of failed CUDA calls.
#include "../device.h"
#include "launch.cuh"

namespace gradext {
namespace {

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The compute capability, 90 for 9.0; 0 where it cannot be read.
int capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  return major * 10 + minor;
}

const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "; gradext was not built for this GPU: install it again with GRADEXT_CUDA_ARCHS=native on this machine";
    case cudaErrorInsufficientDriver:
      return "; the NVIDIA driver is missing or older than the CUDA runtime that gradext was built with: update it, "
             "or build gradext with an older CUDA toolkit";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
      return "; an earlier kernel of this process is to blame, from whatever library: CUDA_LAUNCH_BLOCKING=1 or "
             "compute-sanitizer finds it";
    default:
      return "";
  }
}

}  // namespace

void fail(cudaError_t error, const char* call, const char* operation, std::int64_t B, std::int64_t T, std::int64_t O,
          std::int64_t I, int device) {
  const int known = capability(device);
  cudaGetLastError();  // so that the next caller finds neither this error nor one of the queries above
  throw std::runtime_error(std::string("gradext ") + operation + ": " + call + " failed: " + cudaGetErrorString(error) +
                           " (" + cudaGetErrorName(error) + ", B=" + std::to_string(B) + ", T=" + std::to_string(T) +
                           ", O=" + std::to_string(O) + ", I=" + std::to_string(I) + ", device " +
                           std::to_string(device) + ", " + (known ? "sm_" + std::to_string(known) : "unknown arch") +
                           ")" + advice(error));
}

CudaStatus cuda_status() {
  CudaStatus status{};
  cudaRuntimeGetVersion(&status.runtime_version);
  cudaDriverGetVersion(&status.driver_version);
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) {
    for (int device = 0; device < devices; ++device) status.capabilities.push_back(capability(device));
    return status;
  }
  cudaGetLastError();
  if (status.driver_version == 0)
    status.reason = "no NVIDIA driver is installed";
  else if (error == cudaErrorInsufficientDriver)
    status.reason = "the NVIDIA driver supports CUDA " + version_name(status.driver_version) +
                    ", gradext was built with CUDA " + version_name(status.runtime_version) +
                    ": update the driver, or build gradext with an older toolkit";
  else if (error == cudaSuccess || error == cudaErrorNoDevice)
    status.reason = "no GPU is visible (CUDA_VISIBLE_DEVICES?)";
  else
    status.reason = std::string("cudaGetDeviceCount failed: ") + cudaGetErrorString(error);
  return status;
}

}  // namespace gradext
