// Threads that outlive the call: torch's, or, where there are none, workers of our own. Starting and joining a
// std::thread takes 20 to 70 us, the time to write 2 MB; a thread that still spins from the last call starts on a part
// in about 1 us.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gradext {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Workers {
 public:
  void run(int threads, int parts, const std::function<void(int)>& work) {
    const std::unique_lock<std::mutex> job(job_, std::try_to_lock);
    if (!job || threads <= 1) {
      for (int part = 0; part < parts; ++part) work(part);
      return;
    }
    start(threads - 1);
    work_ = &work;
    error_ = nullptr;
    failed_.store(false, std::memory_order_relaxed);
    unfinished_.store(parts, std::memory_order_relaxed);
    const std::uint64_t number = (open_.load() >> 32) + 1;
    open_.store(number << 32 | static_cast<std::uint64_t>(parts));
    if (sleeping_.load() > 0) {
      {
        const std::lock_guard<std::mutex> lock(sleep_);
      }  // after this a worker has either seen the job or is waiting for wake_
      wake_.notify_all();
    }
    take_parts();
    while (unfinished_.load(std::memory_order_acquire) > 0) pause();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void start(int wanted) {
    for (; count_ < wanted; ++count_) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::exception&) {  // no more threads can be started: the running ones take all parts
        return;
      }
    }
  }

  bool has_part() const { return static_cast<std::uint32_t>(open_.load()) > 0; }

  // A part is taken by counting down the low half of open_. The high half is the number of the job, so that a late
  // worker does not count down the next job by mistake. A job does not end before its taken parts do, so work_ stays
  // valid.
  void take_parts() {
    for (std::uint64_t open = open_.load(); static_cast<std::uint32_t>(open) > 0;) {
      if (!open_.compare_exchange_weak(open, open - 1)) continue;
      try {
        (*work_)(static_cast<int>(static_cast<std::uint32_t>(open)) - 1);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      unfinished_.fetch_sub(1, std::memory_order_release);
      open = open_.load();
    }
  }

  [[noreturn]] void serve() {
    for (;;) {
      take_parts();
      const auto until = std::chrono::steady_clock::now() + kSpin;
      while (!has_part() && std::chrono::steady_clock::now() < until) pause();
      if (has_part()) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [this] { return has_part(); });
      sleeping_.fetch_sub(1);
    }
  }

  std::mutex job_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0}, unfinished_{0};
  std::atomic<std::uint64_t> open_{0};  // number of the job << 32 | parts that nobody has taken
  std::atomic<bool> failed_{false};
  const std::function<void(int)>* work_ = nullptr;
  std::exception_ptr error_;
  int count_ = 0;
};

// Torch's own OpenMP threads, where there are any. They spin for milliseconds after every parallel region of torch, and
// other threads would have to wait for their cores; work given to these threads starts at once. Both libgomp and LLVM's
// OpenMP runtime export this entry point; torch loads the one it uses into the global namespace.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};  // OpenMP's threads do not survive a fork, and its runtime would wait for them forever

GompParallel team() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

struct Job {
  const std::function<void(int)>& work;
  const int parts;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  static void member(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (int part; (part = job.next.fetch_add(1, std::memory_order_relaxed)) < job.parts;) {
      try {
        job.work(part);
      } catch (...) {
        if (!job.failed.exchange(true)) job.error = std::current_exception();
      }
    }
  }
};

// Never destroyed: detached workers may wait in it until the process ends.
Workers* workers;

Workers& instance() {
  static const bool ready = [] {
    workers = new Workers;
    // Threads do not survive a fork, and locks may be held during it: the child starts with new ones.
    pthread_atfork(nullptr, nullptr, [] {
      workers = new Workers;
      forked.store(true, std::memory_order_relaxed);
    });
    return true;
  }();
  (void)ready;
  return *workers;
}

}  // namespace

void parallel(int threads, int parts, const std::function<void(int)>& work) {
  if (parts <= 1) return work(0);
  Workers& own = instance();
  if (const GompParallel run = team()) {
    Job job{work, parts};
    run(Job::member, &job, static_cast<unsigned>(threads), 0);
    if (job.error) std::rethrow_exception(job.error);
    return;
  }
  own.run(threads, parts, work);
}

}  // namespace gradext
