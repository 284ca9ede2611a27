// The GPUs and the driver of this machine, found without creating a context on any GPU.
#pragma once

#include <string>
#include <vector>

namespace gradext {

struct CudaStatus {
  int driver_version;             // 13000 is 13.0; 0 without a driver
  int runtime_version;            // of the CUDA runtime that is linked in
  std::vector<int> capabilities;  // of each visible device, 90 is 9.0
  std::string reason;             // why no device can be used; empty where one can
};
CudaStatus cuda_status();

}  // namespace gradext
