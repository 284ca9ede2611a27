#include <cuda_runtime.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

#include "kernel.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr std::size_t kStack = 256 << 10;
constexpr int kWarp = 32;
// What no kernel here exceeds; a GPU itself takes 1024 threads.
constexpr unsigned kMostThreads = 256;

struct Settings {
  std::int64_t max_blocks, first_block, blocks;
  int reversed, multiprocessors, l2_bytes;
};
Settings settings{};
std::int64_t launches, last_grid, stores[17];
std::string problem;

// The stack of a fiber or, with size 0, of the scheduler.
struct Context {
  ucontext_t saved{};
  std::unique_ptr<char[]> stack;
  const void* bottom = nullptr;
  std::size_t size = 0;
  void* fake = nullptr;
};

void change(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
  swapcontext(&from.saved, &to.saved);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

struct Thread : Context {
  uint3 index{};
  Barrier at = Barrier::none;
  bool done = false;
};

Context scheduler;
std::vector<Thread> threads;
std::vector<std::uint64_t> slots;
const std::function<void()>* body;
std::size_t current;

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
  while (true) {
    (*body)();
    threads[current].done = true;
    change(threads[current], scheduler);
  }
}

void prepare(dim3 block) {
  threads = std::vector<Thread>(block.x * block.y * block.z);
  slots.assign(threads.size() + kWarp, 0);
  for (std::size_t t = 0; t < threads.size(); ++t) {
    Thread& thread = threads[t];
    thread.index = {static_cast<unsigned>(t % block.x), static_cast<unsigned>(t / block.x % block.y),
                    static_cast<unsigned>(t / block.x / block.y)};
    thread.stack = std::make_unique<char[]>(kStack);
    thread.bottom = thread.stack.get();
    thread.size = kStack;
    getcontext(&thread.saved);
    thread.saved.uc_stack = {};
    thread.saved.uc_stack.ss_sp = thread.stack.get();
    thread.saved.uc_stack.ss_size = kStack;
    makecontext(&thread.saved, run_thread, 0);
  }
}

// Lets go the threads [begin, end) if all of them wait at such a barrier.
bool open(Barrier barrier, std::size_t begin, std::size_t end) {
  for (std::size_t t = begin; t < end; ++t)
    if (threads[t].done || threads[t].at != barrier) return false;
  for (std::size_t t = begin; t < end; ++t) threads[t].at = Barrier::none;
  return true;
}

// Runs the threads of a warp until all have ended or wait for other warps.
void run_warp(std::size_t begin, std::size_t end) {
  do {
    for (std::size_t n = 0; n < end - begin; ++n) {
      current = settings.reversed ? end - 1 - n : begin + n;
      Thread& thread = threads[current];
      if (thread.done || thread.at != Barrier::none) continue;
      threadIdx = thread.index;
      change(scheduler, thread);
    }
  } while (open(Barrier::warp, begin, end));
}

// Each warp as far as it can, then the next: what lacks a barrier between warps goes wrong forwards or backwards. False
// where some threads wait for others that never come.
bool run_block() {
  for (Thread& thread : threads) thread.done = false, thread.at = Barrier::none;
  const std::size_t warps = (threads.size() + kWarp - 1) / kWarp;
  do {
    for (std::size_t n = 0; n < warps; ++n) {
      const std::size_t begin = (settings.reversed ? warps - 1 - n : n) * kWarp;
      run_warp(begin, std::min(begin + kWarp, threads.size()));
    }
  } while (open(Barrier::block, 0, threads.size()));
  return std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.done; });
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  ++launches;
  if (block.x * block.y * block.z == 0 || block.x * block.y * block.z > kMostThreads || block.z > 64 || grid.x == 0 ||
      grid.x > 2147483647u || grid.y != 1 || grid.z != 1 || config.dynamicSmemBytes != 0)
    return cudaErrorInvalidConfiguration;
  gridDim = grid;
  last_grid = grid.x;
  if (settings.max_blocks > 0) gridDim.x = static_cast<unsigned>(std::min<std::int64_t>(grid.x, settings.max_blocks));
  blockDim = block;
  body = &kernel;
  prepare(block);
  const std::int64_t begin = settings.blocks ? settings.first_block : 0;
  const std::int64_t end = settings.blocks ? begin + settings.blocks : gridDim.x;
  for (std::int64_t n = begin; n < end; ++n) {
    blockIdx = {static_cast<unsigned>(settings.reversed ? begin + end - 1 - n : n), 0, 0};
    if (!run_block()) {
      problem = "some threads of a block wait at a barrier that others never reach";
      return cudaErrorLaunchFailure;
    }
  }
  return problem.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void wait(Barrier barrier) {
  threads[current].at = barrier;
  change(threads[current], scheduler);
}

int lane() { return static_cast<int>(current % kWarp); }

void* lane_slot(int lane) { return &slots[current / kWarp * kWarp + lane]; }

void count_store(const void* to, std::size_t bytes) {
  ++stores[bytes];
  if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0)
    problem = "a store of " + std::to_string(bytes) + " bytes is misaligned";
}

}  // namespace emulator

using namespace emulator;

// For the tests: how to run what follows, and what the last launches did.
#pragma GCC visibility push(default)
extern "C" {
void emulator_configure(std::int64_t max_blocks, std::int64_t first_block, std::int64_t blocks, int reversed,
                        int multiprocessors, int l2_bytes) {
  settings = {max_blocks, first_block, blocks, reversed, multiprocessors, l2_bytes};
  launches = 0;
  std::fill(std::begin(stores), std::end(stores), 0);
  problem.clear();
}
std::int64_t emulator_launches() { return launches; }
std::int64_t emulator_last_grid() { return last_grid; }
void emulator_divide(std::int64_t by, std::uint32_t n, std::uint32_t* quotient_and_rest) {
  quotient_and_rest[0] = gradext::Divisor(by)(n);
  quotient_and_rest[1] = n;
}
std::int64_t emulator_stores(int bytes) { return stores[bytes]; }
}
#pragma GCC visibility pop

// One device, number -1 as torch counts the CPU.
extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = -1, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? settings.multiprocessors
           : attribute == cudaDevAttrL2CacheSize            ? settings.l2_bytes
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->ptxVersion = 90, cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaError";
}
const char* cudaGetErrorString(cudaError_t) { return problem.empty() ? "refused" : problem.c_str(); }
}
