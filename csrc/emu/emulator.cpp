// One block of threads after another: who runs, who waits where, and when those who wait may go on.
#include "emulator.h"

#include <signal.h>

#include <csetjmp>
#include <map>

#include "access.h"

namespace pymerge::emu {
namespace {

enum class Order { kForward, kReversed, kShuffled };

struct Machine {
  Order order = Order::kForward;
  uint64_t random = 1;
  std::string failure;  // the first thing that went wrong; nothing is launched while it is set
  std::string kernel;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned count = 0;  // threads of a block
  unsigned running = 0;
  bool inside = false;  // a kernel runs
  int predicates = 0;   // true ones at the last barrier
  Context scheduler;
  sigjmp_buf abandoned;
  void (*body)(void*) = nullptr;
  void* data = nullptr;
  std::vector<std::unique_ptr<Exchange>> exchanges;
  std::vector<Exchange*> free_exchanges;
};

Machine machine;

std::string triple(const dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void give_way(State state) {
  Thread& thread = self();
  thread.state = state;
  switch_to(&thread.context, machine.scheduler);
}

void enter_thread() {
  machine.body(machine.data);
  give_way(State::kDone);
}

Exchange* new_exchange() {
  if (machine.free_exchanges.empty()) {
    machine.exchanges.push_back(std::make_unique<Exchange>());
    machine.free_exchanges.push_back(machine.exchanges.back().get());
  }
  Exchange* exchange = machine.free_exchanges.back();
  machine.free_exchanges.pop_back();
  return exchange;
}

// Whether all lanes that the mask names wait at this collective.
bool complete(unsigned warp, const Thread& waiting) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((waiting.mask >> lane & 1u) == 0) continue;
    if (warp + lane >= machine.count) return false;
    const Thread& other = *machine.threads[warp + lane];
    if (other.state != State::kCollective || other.mask != waiting.mask) return false;
    if (!same_place(other.place, waiting.place)) return false;
  }
  return true;
}

void release_lanes(unsigned warp, const Thread& waiting) {
  Exchange* exchange = new_exchange();
  exchange->readers = 0;
  const unsigned mask = waiting.mask;
  if (waiting.orders) order_warp(warp / kLanes);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    Thread& thread = *machine.threads[warp + lane];
    std::memcpy(exchange->offer[lane], thread.offer, kOffer);
    thread.exchange = exchange;
    thread.state = State::kReady;
    ++exchange->readers;
  }
}

bool release_collectives(unsigned warp) {
  bool moved = false;
  for (unsigned i = warp; i < warp + kLanes && i < machine.count; ++i) {
    const Thread& thread = *machine.threads[i];
    if (thread.state != State::kCollective || !complete(warp, thread)) continue;
    release_lanes(warp, thread);
    moved = true;
  }
  return moved;
}

// Where the threads are, for the message about a block that cannot go on.
std::string whereabouts() {
  std::map<std::string, unsigned> groups;
  for (unsigned i = 0; i < machine.count; ++i) {
    const Thread& thread = *machine.threads[i];
    const char* what = thread.state == State::kBarrier ? "wait at the barrier " : "wait in the collective ";
    ++groups[thread.state == State::kDone ? "have returned" : what + text(thread.place)];
  }
  std::string all;
  for (const auto& [where, count] : groups) {
    all += (all.empty() ? "" : ", ") + std::to_string(count) + " threads " + where;
  }
  return all;
}

uint64_t random_number() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

// 0 .. n - 1 as the order of the run has them.
std::vector<unsigned> arranged(unsigned n) {
  std::vector<unsigned> at(n);
  for (unsigned i = 0; i < n; ++i) at[i] = machine.order == Order::kReversed ? n - 1 - i : i;
  if (machine.order != Order::kShuffled) return at;
  for (unsigned i = n; i > 1; --i) std::swap(at[i - 1], at[random_number() % i]);
  return at;
}

bool run_thread(unsigned i) {
  Thread& thread = *machine.threads[i];
  if (thread.state != State::kReady) return false;
  machine.running = i;
  threadIdx = thread.index;
  switch_to(&machine.scheduler, thread.context);
  return true;
}

// Lets each warp go as far as it can before the next begins; shuffled: random threads at every step.
void run_to_barrier() {
  if (machine.order == Order::kShuffled) {
    for (bool moved = true; moved;) {
      moved = false;
      for (unsigned i : arranged(machine.count)) moved |= run_thread(i);
      for (unsigned warp = 0; warp < machine.count; warp += kLanes) moved |= release_collectives(warp);
    }
    return;
  }
  const std::vector<unsigned> lanes = arranged(kLanes);
  for (unsigned warp : arranged((machine.count + kLanes - 1) / kLanes)) {
    do {
      for (unsigned lane : lanes) {
        if (warp * kLanes + lane < machine.count) run_thread(warp * kLanes + lane);
      }
    } while (release_collectives(warp * kLanes));
  }
}

// Opens the barrier at which all threads wait; false once all have returned.
bool open_barrier() {
  unsigned done = 0, waiting = 0;
  bool same = true;
  machine.predicates = 0;
  for (unsigned i = 0; i < machine.count; ++i) {
    const Thread& thread = *machine.threads[i];
    done += thread.state == State::kDone;
    waiting += thread.state == State::kBarrier;
    machine.predicates += thread.predicate;
    same &= same_place(thread.place, machine.threads[0]->place);
  }
  if (done == machine.count) return false;
  if (waiting != machine.count || !same) {
    record("threads wait at different places: " + whereabouts());
    return false;
  }
  for (unsigned i = 0; i < machine.count; ++i) machine.threads[i]->state = State::kReady;
  begin_barrier_interval();
  return true;
}

void start_threads(dim3 block) {
  machine.count = block.x * block.y * block.z;
  while (machine.threads.size() < machine.count) machine.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& thread = *machine.threads[i];
    thread.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    thread.state = State::kReady;
    thread.copies.clear();
    thread.copy_groups = 0;
    prepare(thread.context, thread.stack, enter_thread);
  }
  machine.free_exchanges.clear();
  for (const auto& exchange : machine.exchanges) machine.free_exchanges.push_back(exchange.get());
}

// A guard page was touched: the launch is given up from here, as in `fail`.
void on_fault(int signal, siginfo_t* info, void*) {
  if (!machine.inside) {
    ::signal(signal, SIG_DFL);
    return;
  }
  record("thread " + triple(threadIdx) + ": out of bounds: touches " + describe(info->si_addr));
  siglongjmp(machine.abandoned, 1);
}

// While a kernel runs, faults are messages; the handler has a stack of its own.
class FaultGuard {
 public:
  FaultGuard() {
    stack_t stack = {};
    stack.ss_sp = stack_.begin();
    stack.ss_size = static_cast<size_t>(stack_.end() - stack_.begin());
    sigaltstack(&stack, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_action_);
    machine.inside = true;
  }
  FaultGuard(const FaultGuard&) = delete;
  ~FaultGuard() {
    machine.inside = false;
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  Pages stack_{64 << 10};
  stack_t old_stack_ = {};
  struct sigaction old_action_ = {};
};

void run_blocks(dim3 grid, dim3 block, size_t shmem) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned b : arranged(blocks)) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    begin_block(shmem);
    start_threads(block);
    do run_to_barrier();
    while (open_barrier());
    end_block();
    if (!machine.failure.empty()) return;
  }
}

}  // namespace

Thread& self() { return *machine.threads[machine.running]; }
int thread_index() { return static_cast<int>(machine.running); }
int lane_id() { return static_cast<int>(machine.running % kLanes); }

std::string text(const Place& place) {
  const char* slash = std::strrchr(place.file_name(), '/');
  return std::string(slash != nullptr ? slash + 1 : place.file_name()) + ":" + std::to_string(place.line());
}

void record(const std::string& what) {
  if (machine.failure.empty()) machine.failure = machine.kernel + ", block " + triple(blockIdx) + ": " + what;
}

void fail(const std::string& what) {
  record("thread " + triple(threadIdx) + ": " + what);
  siglongjmp(machine.abandoned, 1);
}

int wait_at_barrier(bool predicate, const Place& place) {
  self().predicate = predicate;
  self().place = place;
  give_way(State::kBarrier);
  return machine.predicates;
}

void wait_for_lanes(bool orders) {
  self().orders = orders;
  give_way(State::kCollective);
}

void release(Exchange* exchange) {
  if (--exchange->readers == 0) machine.free_exchanges.push_back(exchange);
}

void run(const char* kernel, dim3 grid, dim3 block, size_t shmem, void (*body)(void*), void* data) {
  if (!machine.failure.empty()) return;
  machine.kernel = kernel;
  machine.body = body;
  machine.data = data;
  gridDim = grid;
  blockDim = block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    return record("no device takes grid " + triple(grid) + " of blocks " + triple(block));
  }
  if (shmem > kMostShared) return record("no device has " + std::to_string(shmem) + " bytes of shared memory");
  const FaultGuard guard;
  if (sigsetjmp(machine.abandoned, 1) == 0) run_blocks(grid, block, shmem);
  end_launch();
}

}  // namespace pymerge::emu

using pymerge::emu::Access;
using pymerge::emu::machine;

extern "C" {

void emu_set_order(int order, uint64_t seed) {
  machine.order = static_cast<pymerge::emu::Order>(order);
  machine.random = seed * 2 + 1;
}

// The failure since the last call, or null.
const char* emu_take_failure() {
  static std::string taken;
  taken.swap(machine.failure);
  machine.failure.clear();
  return taken.empty() ? nullptr : taken.c_str();
}

void emu_add_shared_array(size_t offset, size_t bytes, const char* name) {
  pymerge::emu::add_shared_array(offset, bytes, name);
}
void* emu_allocate(size_t bytes, size_t misplaced) { return pymerge::emu::allocate(bytes, misplaced); }
void emu_deallocate(void* p) { pymerge::emu::deallocate(p); }

// What -fsanitize=thread makes the kernels call before each access.
void __tsan_init() {}

#define PYMERGE_ACCESS(bytes)                                                        \
  void __tsan_read##bytes(void* p) { report(p, bytes, bytes, Access::kRead); }       \
  void __tsan_write##bytes(void* p) { report(p, bytes, bytes, Access::kWrite); }     \
  void __tsan_unaligned_read##bytes(void* p) { report(p, bytes, 1, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* p) { report(p, bytes, 1, Access::kWrite); }

static void report(void* p, size_t bytes, size_t alignment, Access access) {
  if (machine.inside) pymerge::emu::touch(p, bytes, alignment, access);
}

PYMERGE_ACCESS(1)
PYMERGE_ACCESS(2)
PYMERGE_ACCESS(4)
PYMERGE_ACCESS(8)
PYMERGE_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { report(p, bytes, 1, Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { report(p, bytes, 1, Access::kWrite); }
}
