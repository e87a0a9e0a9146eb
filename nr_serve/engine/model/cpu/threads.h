// Threads that share an operator's work: torch's, or our own.

#pragma once

#include <ATen/Parallel.h>
#include <c10/util/FunctionRef.h>
#include <omp.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

namespace nr_serve {

// How many of our own threads share the calling thread's work; set by `share_among`.
inline thread_local int64_t own_threads = 0;

// Makes torch's own operators single-threaded when called from this thread, except MKL's products, which no step
// uses.
inline void keep_torch_to_one() {
  at::get_num_threads();  // the first call in a thread sets the number, so make it before setting it
  omp_set_num_threads(1);
}

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads of our own, which help a caller as long as they have a core.  At the end of an operator, torch waits for
// all its threads: a thread that lost its core, to another thread of this process or of the machine, holds up the
// step. Here, if a thread is not running when a job begins, others take its parts. Only a thread that has begun a
// part is waited for.
class ThreadPool {
 public:
  using Part = c10::function_ref<void(int64_t)>;

  static ThreadPool& shared() {
    static ThreadPool* const pool = new ThreadPool();  // never destroyed: it may be running when the process ends
    return *pool;
  }

  // Makes sure that the pool has at least this many threads.
  void start(int64_t threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (; started_ < threads; ++started_) std::thread([this] { work(); }).detach();
  }

  // Calls part(i) for each i in [0, parts), on this thread and the pool's. Rethrows an exception of a part.
  void run(int64_t parts, Part part) {
    if (busy_.test_and_set(std::memory_order_acquire)) {  // by another thread that uses the pool
      for (int64_t i = 0; i < parts; ++i) part(i);
      return;
    }
    part_ = &part, parts_ = parts, error_ = nullptr;
    done_.store(0, std::memory_order_relaxed);
    left_.store(static_cast<int32_t>(parts), std::memory_order_seq_cst);
    for (int64_t i = 1; i < parts; ++i) left_.notify_one();
    while (take()) {
    }
    for (int i = 0; done_.load(std::memory_order_acquire) < parts; ++i) {
      if (i < LOOKS)
        pause_briefly();
      else
        std::this_thread::yield();  // the thread that runs a part has lost its core
    }
    const std::exception_ptr error = error_;
    busy_.clear(std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

 private:
  // How often a thread looks for work before it sleeps: longer than what one thread does between two operators.
  static constexpr int LOOKS = 20000;

  // Runs one part of the current job; false if all parts are taken.
  bool take() {
    int32_t left = left_.load(std::memory_order_acquire);
    do {
      if (left == 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    // The job stays valid until all its parts are done, and this part is not.
    try {
      (*part_)(parts_ - left);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  [[noreturn]] void work() {
    keep_torch_to_one();
    for (;;) {
      for (int i = 0; i < LOOKS; ++i) {
        if (take())
          i = 0;
        else
          pause_briefly();
      }
      left_.wait(0, std::memory_order_seq_cst);
    }
  }

  std::mutex mutex_;
  int64_t started_ = 0;
  std::atomic_flag busy_;
  const Part* part_ = nullptr;
  int64_t parts_ = 0;
  std::exception_ptr error_;
  alignas(64) std::atomic<int32_t> left_{0};  // parts not taken yet; once it is 0 the job may have ended
  alignas(64) std::atomic<int64_t> done_{0};
};

// Calls f(from, to) for parts of [0, n), of at least `grain` items each.
inline void share(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> f) {
  if (own_threads == 0) return at::parallel_for(0, n, grain, f);
  // At most one part per thread: a thread's prefetching ends with its part.
  const int64_t parts = std::min(n / grain, own_threads);
  if (parts > 1)
    ThreadPool::shared().run(parts, [&](int64_t i) { f(n * i / parts, n * (i + 1) / parts); });
  else if (n > 0)
    f(0, n);
}

// From now on, share this thread's work among `threads` threads of our own, itself included; 0: torch's threads.
inline void share_among(int64_t threads) {
  TORCH_CHECK(threads >= 0);
  ThreadPool::shared().start(threads - 1);
  own_threads = threads;
  if (threads > 0) keep_torch_to_one();
}

}  // namespace nr_serve
