#include "workspace.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

namespace gradext {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t cache_limit() {
  static const std::size_t limit = [] {
    std::size_t megabytes = 2048;
    if (const char* text = std::getenv("GRADEXT_WORKSPACE_MB")) {
      char* end = nullptr;
      const long long wanted = std::strtoll(text, &end, 10);
      if (end != text && *end == '\0' && wanted >= 0) megabytes = static_cast<std::size_t>(wanted);
    }
    return megabytes << 20;
  }();
  return limit;
}

// mmap aligns to small pages only: map one huge page more and cut off both ends.
void* map_block(std::size_t size) {
  if (size > SIZE_MAX - kHugePage) throw std::bad_alloc();
  void* mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<char*>(mapped);
  const std::size_t skip = (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (skip > 0) munmap(begin, skip);
  munmap(begin + skip + size, kHugePage - skip);
#if defined(MADV_HUGEPAGE)
  madvise(begin + skip, size, MADV_HUGEPAGE);  // only a hint: small pages give correct results too
#endif
  return begin + skip;
}

class Pool {
 public:
  WorkspaceBlock take(std::size_t bytes) {
    if (bytes > SIZE_MAX - kHugePage) throw std::bad_alloc();
    const std::size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = cached_.end();
    for (auto block = cached_.begin(); block != cached_.end(); ++block)
      if (block->size >= size && block->size - size <= size / 4 && (best == cached_.end() || block->size < best->size))
        best = block;
    WorkspaceBlock block{nullptr, size};
    if (best != cached_.end()) {
      block = *best;
      cached_.erase(best);
      stats_.bytes_cached -= block.size;
      ++stats_.hits;
    } else {
      try {
        block.data = map_block(size);
      } catch (const std::bad_alloc&) {
        evict_down_to(0);  // the cached blocks may be the memory that is missing
        block.data = map_block(size);
      }
      ++stats_.misses;
    }
    stats_.bytes_in_use += block.size;
    return block;
  }

  void give_back(WorkspaceBlock block) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_.bytes_in_use -= block.size;
    try {
      cached_.push_back(block);
    } catch (const std::bad_alloc&) {
      munmap(block.data, block.size);
      return;
    }
    stats_.bytes_cached += block.size;
    evict_down_to(cache_limit());
  }

  void empty_cache() {
    const std::lock_guard<std::mutex> lock(mutex_);
    evict_down_to(0);
  }

  WorkspaceStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

  // A fork while another thread holds the mutex would leave it locked forever in the child.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  void evict_down_to(std::size_t limit) {
    while (stats_.bytes_cached > limit) {
      munmap(cached_.front().data, cached_.front().size);
      stats_.bytes_cached -= cached_.front().size;
      cached_.pop_front();
    }
  }

  std::mutex mutex_;
  std::list<WorkspaceBlock> cached_;  // oldest first
  WorkspaceStats stats_{};
};

// Never destroyed: a tensor may return its block after static objects have been destroyed.
Pool& pool() {
  static Pool* const instance = [] {
    static Pool* const made = new Pool;
    pthread_atfork([] { made->before_fork(); }, [] { made->after_fork(); }, [] { made->after_fork(); });
    return made;
  }();
  return *instance;
}

}  // namespace

WorkspaceBlock workspace_take(std::size_t bytes) { return pool().take(bytes); }
void workspace_give_back(WorkspaceBlock block) noexcept { pool().give_back(block); }
void workspace_empty_cache() { pool().empty_cache(); }
WorkspaceStats workspace_stats() { return pool().stats(); }

}  // namespace gradext
