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

// See `share_among`.
inline thread_local int64_t own_threads = 0;

// Torch's own operators use a single thread when called from this one, but for MKL's products, of which a step has none.
inline void keep_torch_to_one() {
  at::get_num_threads();  // asked for the first time in a thread, it sets it
  omp_set_num_threads(1);
}

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads of our own, which help whoever calls while they have a core.
//
// Torch's are all waited for at the end of an operator: one that lost its core, to another thread of this process or of
// the machine, holds up the step. Here one that is not there when a job begins is not missed: others take its parts. One
// that has begun a part is waited for.
class ThreadPool {
 public:
  using Part = c10::function_ref<void(int64_t)>;

  static ThreadPool& shared() {
    static ThreadPool* const pool = new ThreadPool();  // never destroyed: it may be at work when the process ends
    return *pool;
  }

  // It has so many threads from now on, or more if anyone asked for more.
  void start(int64_t threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (; started_ < threads; ++started_) std::thread([this] { work(); }).detach();
  }

  // part(i) for each i in [0, parts), by this thread and the pool's. Throws what a part threw.
  void run(int64_t parts, Part part) {
    if (busy_.test_and_set(std::memory_order_acquire)) {  // by another thread that has operators computed
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
        std::this_thread::yield();  // one that has a part lost its core
    }
    const std::exception_ptr error = error_;
    busy_.clear(std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

 private:
  // So many times a thread looks for work before it sleeps: for longer than Python takes between two layers.
  static constexpr int LOOKS = 20000;

  // Does a part of the job at hand; false if all are taken.
  bool take() {
    int32_t left = left_.load(std::memory_order_acquire);
    do {
      if (left == 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    // The job stays until all its parts are done, of which this is one.
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
  alignas(64) std::atomic<int32_t> left_{0};  // parts that nobody has taken; a job without any may have ended
  alignas(64) std::atomic<int64_t> done_{0};
};

// f(from, to) for parts of [0, n), of at least `grain` each.
inline void share(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> f) {
  if (own_threads == 0) return at::parallel_for(0, n, grain, f);
  // Not more than there are threads: what a thread reads ahead ends with its part.
  const int64_t parts = std::min(n / grain, own_threads);
  if (parts > 1)
    ThreadPool::shared().run(parts, [&](int64_t i) { f(n * i / parts, n * (i + 1) / parts); });
  else if (n > 0)
    f(0, n);
}

// What this thread calls is shared among so many threads of our own from now on, itself included; 0: torch's.
inline void share_among(int64_t threads) {
  TORCH_CHECK(threads >= 0);
  ThreadPool::shared().start(threads - 1);
  own_threads = threads;
  if (threads > 0) keep_torch_to_one();
}

}  // namespace nr_serve
