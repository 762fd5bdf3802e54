// A worker that gets no processor must not hold up the others: a region ends although one worker,
// stopped in a signal handler here, never comes. Prints "ok" or what went wrong.
#include <poll.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <thread>

#include "cpu/threads.hpp"

namespace {

using dsk::cpu::run_tasks;

std::atomic<bool> stopped{false}, may_go_on{false};

void stop_here(int) {
  stopped = true;
  while (!may_go_on) poll(nullptr, 0, 1);
}

struct Meeting {
  std::atomic<int> present{0};
  std::atomic<pthread_t> worker{};
};

// Two tasks that wait for each other: both threads are there.
void meet(void* context, int64_t, int thread) {
  Meeting& meeting = *static_cast<Meeting*>(context);
  if (thread == 1) meeting.worker = pthread_self();
  ++meeting.present;
  while (meeting.present < 2) std::this_thread::yield();
}

void count(void* context, int64_t, int) { ++*static_cast<std::atomic<int>*>(context); }

}  // namespace

int main() {
  Meeting meeting;
  run_tasks(2, 2, meet, &meeting);
  signal(SIGUSR1, stop_here);
  pthread_kill(meeting.worker, SIGUSR1);
  while (!stopped) std::this_thread::yield();

  std::atomic<int> done{0};
  run_tasks(100, 2, count, &done);  // would never return if it waited for the worker
  may_go_on = true;
  run_tasks(100, 2, count, &done);

  Meeting again;  // and the worker is not lost
  run_tasks(2, 2, meet, &again);
  const bool ok = done == 200 && again.present == 2;
  std::printf(ok ? "ok\n" : "wrong: %d tasks, %d present\n", done.load(), again.present.load());
  return ok ? 0 : 1;
}
