// What the CPU kernel offers to its dispatcher, once for each instruction set it is compiled for.
#pragma once

#include "../outer.h"

namespace gradext {

// Computes the elements [begin, end) of the flattened [B, O, I] output.
using OuterRange = void (*)(const OuterParams& p, std::int64_t begin, std::int64_t end, bool stream);

namespace baseline {
void outer_range(const OuterParams& p, std::int64_t begin, std::int64_t end, bool stream);
}
namespace avx2 {
void outer_range(const OuterParams& p, std::int64_t begin, std::int64_t end, bool stream);
}
namespace avx512bf16 {
void outer_range(const OuterParams& p, std::int64_t begin, std::int64_t end, bool stream);
}

}  // namespace gradext
