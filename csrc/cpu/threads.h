// Worker threads for the CPU kernels.
#pragma once

#include <functional>

namespace gradext {

// Calls work(0), ..., work(parts - 1) on the calling thread and up to threads - 1 others, and returns when all parts
// are done. Each thread takes the next part when it has finished one. The first exception of a part is thrown here. A
// call that is made while another one runs uses its calling thread alone.
void parallel(int threads, int parts, const std::function<void(int)>& work);

}  // namespace gradext
