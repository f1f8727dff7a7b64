// How fast this machine reads memory: bandwidth THREADS [SECONDS] prints the best pass in GB/s.
//
// A gigabyte in huge pages, eight streams a thread: what a decode step that only streams weights could reach.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t Vec __attribute__((vector_size(64)));

enum { kStreams = 8 };
static const size_t kBytes = (size_t)1 << 30;

static pthread_barrier_t barrier;
static volatile int stop = 0;

typedef struct {
  const char* start;
  size_t bytes;
  uint64_t sum;
} Slice;

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t read_slice(const char* start, size_t bytes) {
  Vec sums[kStreams] = {{0}};
  // An odd number of lines apart, or all streams would fall into the same sets of the cache.
  const size_t stream = ((bytes / kStreams / sizeof(Vec) - 1) | 1) * sizeof(Vec);
  for (size_t at = 0; at < stream; at += sizeof(Vec)) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const char* p = start + (size_t)s * stream + at;
      __builtin_prefetch(p + 4096, 0, 3);  // the non-temporal hint makes it several times slower on some machines
      sums[s] ^= *(const Vec*)p;
    }
  }
  uint64_t sum = 0;
  for (int s = 0; s < kStreams; ++s)
    for (int i = 0; i < 8; ++i) sum ^= sums[s][i];
  return sum;
}

static void* work(void* argument) {
  Slice* slice = argument;
  for (;;) {
    pthread_barrier_wait(&barrier);
    if (stop) return NULL;
    slice->sum ^= read_slice(slice->start, slice->bytes);
    pthread_barrier_wait(&barrier);
  }
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 1;
  const double seconds = argc > 2 ? atof(argv[2]) : 1.5;
  if (threads < 1 || threads > 1024) {
    fprintf(stderr, "bandwidth: `%s` threads; expected 1 to 1024\n", argv[1]);
    return 2;
  }
  char* data = mmap(NULL, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    perror("bandwidth: 1 GiB");
    return 1;
  }
  madvise(data, kBytes, MADV_HUGEPAGE);
  memset(data, 1, kBytes);
  pthread_t* ids = calloc((size_t)threads, sizeof(pthread_t));
  Slice* slices = calloc((size_t)threads, sizeof(Slice));
  const size_t share = kBytes / (size_t)threads / 4096 * 4096;
  pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
  for (int i = 0; i < threads; ++i) {
    slices[i] = (Slice){data + (size_t)i * share, share, 0};
    if (pthread_create(&ids[i], NULL, work, &slices[i]) != 0) {
      fprintf(stderr, "bandwidth: thread %d cannot be started\n", i);
      return 1;
    }
  }
  double best_s = 1e9;
  uint64_t sum = 0;
  const double end_s = now_s() + seconds;
  while (now_s() < end_s) {
    const double start_s = now_s();
    pthread_barrier_wait(&barrier);
    pthread_barrier_wait(&barrier);
    const double took_s = now_s() - start_s;
    if (took_s < best_s) best_s = took_s;
  }
  stop = 1;
  pthread_barrier_wait(&barrier);
  for (int i = 0; i < threads; ++i) {
    pthread_join(ids[i], NULL);
    sum ^= slices[i].sum;
  }
  printf("%.3f\n", (double)share * threads / best_s / 1e9);
  return sum == 1 ? 3 : 0;  // the sum is used, so that nothing of the reading can be left out
}
