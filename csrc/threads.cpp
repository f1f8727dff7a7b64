#include "threads.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <chrono>

namespace gyrfalcon {
namespace {

// How long a thread waits awake for the next job. The gap between two steps is shorter; to be woken takes about as long
// as a layer of a small model, and all others would wait for it.
constexpr auto kAwake = std::chrono::microseconds(1000);

// Turns of waiting for the others before the core is offered to someone else: a few microseconds. The others are then
// most likely not running at all.
constexpr int kTurns = 2000;

std::vector<int> cores_of_process() {
  std::vector<int> cores;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &set)) cores.push_back(core);
  return cores;
}

void stay_on(std::thread& thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // a refusal costs speed, nothing else
}

template <class Condition>
void wait_until(const Condition& holds) {
  for (int turn = 0; !holds(); ++turn) {
    if (turn < kTurns)
      _mm_pause();
    else
      sched_yield();
  }
}

}  // namespace

ThreadTeam::ThreadTeam(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
  const std::vector<int> cores = cores_of_process();
  for (int thread = 1; thread < num_threads_; ++thread) {
    threads_.emplace_back([this, thread] { work(thread); });
    if (static_cast<int>(cores.size()) >= num_threads_) stay_on(threads_.back(), cores[thread]);
  }
}

ThreadTeam::~ThreadTeam() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
  }
  has_job_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadTeam::run(const std::function<void(int)>& job) {
  next_task_.store(0, std::memory_order_relaxed);
  if (num_threads_ == 1) {
    job(0);
    return;
  }
  num_finished_.store(0, std::memory_order_relaxed);
  job_ = &job;
  {
    // The lock keeps the number from changing between a sleeper's last look and its sleep.
    const std::lock_guard<std::mutex> lock(mutex_);
    job_number_.fetch_add(1, std::memory_order_release);
  }
  has_job_.notify_all();
  job(0);
  wait_until([this] { return num_finished_.load(std::memory_order_acquire) == num_threads_ - 1; });
}

void ThreadTeam::work(int thread) {
  unsigned done = 0;
  while (true) {
    const auto start = std::chrono::steady_clock::now();
    const auto has_job = [this, &done] { return ends_ || job_number_.load(std::memory_order_acquire) != done; };
    while (!has_job() && std::chrono::steady_clock::now() - start < kAwake)
      for (int turn = 0; turn < 32 && !has_job(); ++turn) _mm_pause();
    if (!has_job()) {
      std::unique_lock<std::mutex> lock(mutex_);
      has_job_.wait(lock, has_job);
    }
    if (ends_) return;
    ++done;
    (*job_)(thread);
    num_finished_.fetch_add(1, std::memory_order_release);
  }
}

void ThreadTeam::wait_for_all() {
  if (num_threads_ == 1) {
    next_task_.store(0, std::memory_order_relaxed);
    return;
  }
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    num_arrived_.store(0, std::memory_order_relaxed);
    next_task_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  wait_until([this, phase] { return phase_.load(std::memory_order_acquire) != phase; });
}

}  // namespace gyrfalcon
