// A pool of host memory for results that the caller did not allocate.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gradext {

// New memory of n bytes causes n / 4096 page faults, which take ten times as long as filling it. Returned blocks are
// kept, up to GRADEXT_WORKSPACE_MB (2048 by default), and lie on huge pages where the system allows.
struct WorkspaceBlock {
  void* data;
  std::size_t size;  // of the block, at least what was asked for
};
WorkspaceBlock workspace_take(std::size_t bytes);  // throws std::bad_alloc
void workspace_give_back(WorkspaceBlock block) noexcept;
void workspace_empty_cache();

struct WorkspaceStats {
  std::size_t bytes_cached, bytes_in_use;
  std::uint64_t hits, misses;
};
WorkspaceStats workspace_stats();

}  // namespace gradext
