// Which memory a kernel may touch and who touched it last: bounds of arrays and buffers, and hazards in shared memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pymerge::emu {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// A __shared__ array: `offset` bytes into the thread-local storage of this library.
struct SharedArray {
  size_t offset, bytes;
  std::string name;
};

constexpr size_t kMostShared = 227 << 10;  // bytes that a block of sm_90 can have
constexpr unsigned char kCanary = 0xA5, kPoison = 0xFF;

void add_shared_array(size_t offset, size_t bytes, const char* name);

// Device memory: ends where a page begins that nobody may touch, up to the rest to a multiple of 16 bytes. `misplaced`
// bytes behind a multiple of 16.
void* allocate(size_t bytes, size_t misplaced);
void deallocate(void* p);

// The address with its array or buffer, for messages.
std::string describe(const void* p);

void begin_block(size_t shmem);
void begin_barrier_interval();
void order_warp(unsigned warp);  // __syncwarp
void end_block();
void end_launch();

void touch(const void* p, size_t bytes, size_t alignment, Access access);

}  // namespace pymerge::emu
