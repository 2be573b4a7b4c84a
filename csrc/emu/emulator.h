// Runs the kernels of ../cuda on the CPU, for tests. Blocks go one after another, every CUDA thread on a stack of its
// own that gives way at barriers and warp collectives, in an order that the test chooses. A launch stops, with a
// message that names kernel, block, thread and line, when
//   - threads of a block wait at different barriers, or some wait while others have returned;
//   - lanes that a collective's mask names do not all come to it, or a lane reads one that the mask leaves out;
//   - two threads touch the same shared memory, one of them writing, with no barrier between (whatever the order);
//   - an access leaves its shared array or its buffer, is not aligned, or reads a buffer's guard page.
// Shared memory is poisoned (all bits 1: NaN in every float type) before each block. Checks of single accesses need the
// kernels to be compiled with -fsanitize=thread, whose calls emulator.cpp answers; nothing of libtsan is linked.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pymerge::emu {

using Place = std::source_location;

constexpr unsigned kLanes = 32, kAllLanes = 0xFFFFFFFFu;
constexpr size_t kOffer = 64;  // bytes that a lane can show to its warp at once

enum class State : uint8_t { kReady, kBarrier, kCollective, kDone };

// What the lanes of one collective showed each other; kept until the last of them has looked.
struct Exchange {
  unsigned readers;
  alignas(16) unsigned char offer[kLanes][kOffer];
};

struct Copy {  // cp.async under way
  void* to;
  const void* from;  // null: zeros
  int bytes, group;
};

struct Thread {
  Context context;
  Pages stack{kStack};
  dim3 index;
  State state = State::kDone;
  Place place;
  unsigned mask = 0;    // of the collective it waits for
  bool orders = false;  // whether that collective orders accesses to memory (__syncwarp)
  bool predicate = false;
  Exchange* exchange = nullptr;
  alignas(16) unsigned char offer[kOffer];
  std::vector<Copy> copies;
  int copy_groups = 0;
};

Thread& self();
int thread_index();  // within its block
int lane_id();
std::string text(const Place& place);

// The first failure of a launch is kept for the test.
void record(const std::string& what);

// From within a kernel: gives the launch up.
[[noreturn]] void fail(const std::string& what);

// Returns how many of the block's threads passed a true predicate.
int wait_at_barrier(bool predicate, const Place& place);

// thread.offer, mask and place are set: waits for the lanes of the mask.
void wait_for_lanes(bool orders);
void release(Exchange* exchange);

// Accesses that the compiler does not report by itself.
void check_shared(const void* p, int bytes, int alignment, const char* what, const Place& place);
void check_aligned(const void* p, int alignment, const char* what, const Place& place);
void write_shared(void* to, const void* from, int bytes);  // from null: poison
void note_atomic(const void* p, int bytes);

// Dynamic shared memory of the running block.
unsigned char* dynamic_shared();

void run(const char* kernel, dim3 grid, dim3 block, size_t shmem, void (*body)(void*), void* data);

template <typename Body>
void launch(const char* kernel, dim3 grid, dim3 block, size_t shmem, void*, Body body) {
  run(kernel, grid, block, shmem, [](void* data) { (*static_cast<Body*>(data))(); }, &body);
}

// Shows `mine` to the lanes of the mask, and what they showed to this one.
template <typename T>
class Collected {
 public:
  Collected(unsigned mask, const T& mine, const Place& place, bool orders = false) : mask_(mask) {
    static_assert(sizeof(T) <= kOffer && std::is_trivially_copyable_v<T>);
    Thread& thread = self();
    if ((mask >> lane_id() & 1u) == 0) fail("the mask of the collective at " + text(place) + " leaves its caller out");
    std::memcpy(thread.offer, &mine, sizeof(T));
    thread.mask = mask;
    thread.place = place;
    wait_for_lanes(orders);
    exchange_ = thread.exchange;
  }
  Collected(const Collected&) = delete;
  ~Collected() { release(exchange_); }

  T from(int lane) const {
    if ((mask_ >> lane & 1u) == 0)
      fail("reads lane " + std::to_string(lane) + ", which is not in the collective's mask");
    T x;
    std::memcpy(&x, exchange_->offer[lane], sizeof(T));
    return x;
  }

 private:
  Exchange* exchange_;
  unsigned mask_;
};

}  // namespace pymerge::emu
