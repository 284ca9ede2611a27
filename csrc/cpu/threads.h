// Worker threads for the CPU kernels.
#pragma once

#include <functional>

namespace gradext {

// Calls work(0), ..., work(parts - 1) on the calling thread and up to threads - 1 others, each taking the next part
// when it is done with one, and returns when all are done. The first exception of a part is thrown here. A call made
// while another is under way runs alone on its own thread.
void parallel(int threads, int parts, const std::function<void(int)>& work);

}  // namespace gradext
