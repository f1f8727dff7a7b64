// A team of threads that stays: each has a core of its own, waits awake for a moment between jobs, then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gyrfalcon {

class ThreadTeam {
 public:
  // `num_threads` counts the caller of `run`. Thread i stays on the i-th of the process's cores where there are that
  // many; the caller is left where the system puts it.
  explicit ThreadTeam(int num_threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return num_threads_; }

  // Calls job(thread) on every thread, 0 being the caller, and returns when all have returned. Not reentrant.
  void run(const std::function<void(int)>& job);

  // Within a job, called by every thread alike: tasks 0 .. num_tasks are each done once, by whoever comes first; none
  // returns before all are done.
  template <class Task>
  void share(int num_tasks, const Task& task) {
    for (int i = next_task_.fetch_add(1, std::memory_order_relaxed); i < num_tasks;
         i = next_task_.fetch_add(1, std::memory_order_relaxed))
      task(i);
    wait_for_all();
  }

 private:
  void work(int thread);
  void wait_for_all();

  const int num_threads_;
  std::vector<std::thread> threads_;

  alignas(64) std::atomic<int> next_task_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
  alignas(64) std::atomic<unsigned> job_number_{0};
  alignas(64) std::atomic<int> num_finished_{0};
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<bool> ends_{false};
  std::mutex mutex_;
  std::condition_variable has_job_;
};

}  // namespace gyrfalcon
