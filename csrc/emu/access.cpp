#include "access.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>

#include "emulator.h"

namespace pymerge::emu {
namespace {

constexpr size_t kLine = 16;

// Who used a byte of shared memory: `barriers` and `syncs` say in which interval between barriers, in which between
// the __syncwarp of its warp.
struct Use {
  uint32_t barriers = 0, syncs = 0;
  int32_t thread = -1;
  Access access = Access::kRead;
};

struct Cell {
  Use write, read, other_read;  // other_read: by another thread than read
};

struct Buffer {
  std::unique_ptr<Pages> pages;
  unsigned char* begin;
  size_t bytes;
};

struct Memory {
  std::vector<SharedArray> arrays;
  std::vector<unsigned char> fresh;  // static shared memory as a block finds it
  unsigned char* fixed = nullptr;    // the thread-local storage that holds the __shared__ arrays
  size_t fixed_bytes = 0;
  Pages dynamic_pages{kMostShared};
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::vector<Cell> fixed_cells, dynamic_cells;
  std::map<uintptr_t, Buffer> buffers;  // by the end of their last page
  uintptr_t lowest = UINTPTR_MAX, highest = 0;
  uint32_t barriers = 1, syncs[32] = {};
};

Memory& memory() {
  static Memory* all = new Memory;
  return *all;
}

thread_local unsigned char anchor = 0;  // makes the loader give this thread its storage

int find_storage(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&memory);
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD) ours |= begin <= here && here < begin + header.p_memsz;
    if (header.p_type == PT_TLS) bytes = header.p_memsz;
  }
  if (!ours) return 0;
  memory().fixed = static_cast<unsigned char*>(info->dlpi_tls_data);
  memory().fixed_bytes = bytes;
  return 1;
}

void find_static_shared() {
  Memory& m = memory();
  *const_cast<volatile unsigned char*>(&anchor) = 0;
  dl_iterate_phdr(find_storage, nullptr);
  if (m.fresh.size() == m.fixed_bytes) return;
  m.fresh.assign(m.fixed_bytes, kCanary);
  for (const SharedArray& array : m.arrays) std::memset(m.fresh.data() + array.offset, kPoison, array.bytes);
  m.fixed_cells.assign(m.fixed_bytes, Cell());
}

const SharedArray* array_at(size_t offset) {
  const SharedArray* last = nullptr;
  for (const SharedArray& array : memory().arrays) {
    if (array.offset <= offset && (last == nullptr || last->offset < array.offset)) last = &array;
  }
  return last;
}

bool in_array(size_t offset, size_t bytes) {
  const SharedArray* array = array_at(offset);
  return array != nullptr && offset + bytes <= array->offset + array->bytes;
}

const char* word(Access access) {
  return access == Access::kRead ? "reads" : (access == Access::kWrite ? "writes" : "changes");
}

bool conflict(const Use& before, const Use& now) {
  if (before.thread < 0 || before.thread == now.thread || before.barriers != now.barriers) return false;
  const int warp = static_cast<int>(kLanes);
  if (before.thread / warp == now.thread / warp && before.syncs != now.syncs) return false;
  return before.access != now.access || now.access == Access::kWrite;
}

// One byte: whether an earlier use of it is unordered with this one; then remembers this one.
const Use* use_byte(Cell& cell, const Use& now) {
  const Use* found = nullptr;
  if (now.access == Access::kRead) {
    if (conflict(cell.write, now)) found = &cell.write;
    if (cell.read.thread != now.thread) cell.other_read = cell.read;
    if (found == nullptr) cell.read = now;
    return found;
  }
  if (conflict(cell.write, now)) found = &cell.write;
  if (conflict(cell.read, now)) found = &cell.read;
  if (conflict(cell.other_read, now)) found = &cell.other_read;
  if (found == nullptr) cell.write = now;
  return found;
}

void use_shared(std::vector<Cell>& cells, size_t offset, size_t bytes, Access access, const void* p) {
  const Memory& m = memory();
  const int thread = thread_index();
  const Use now = {m.barriers, m.syncs[thread / static_cast<int>(kLanes)], thread, access};
  for (size_t i = offset; i < offset + bytes; ++i) {
    const Use* other = use_byte(cells[i], now);
    if (other == nullptr) continue;
    fail("no barrier: " + std::string(word(access)) + " " + describe(p) + ", which thread " +
         std::to_string(other->thread) + " " + word(other->access) + " too");
  }
}

const Buffer* buffer_at(const void* p) {
  const Memory& m = memory();
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (at < m.lowest || at >= m.highest) return nullptr;
  const auto next = m.buffers.upper_bound(at);
  if (next == m.buffers.end() || at < reinterpret_cast<uintptr_t>(next->second.pages->begin())) return nullptr;
  return &next->second;
}

std::string hex(const void* p) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%p", p);
  return digits;
}

std::string place_in(const char* what, const void* p, const unsigned char* begin, size_t bytes) {
  const long long at = static_cast<const unsigned char*>(p) - begin;
  return "byte " + std::to_string(at) + " of " + what + " (" + std::to_string(bytes) + " bytes)";
}

}  // namespace

void add_shared_array(size_t offset, size_t bytes, const char* name) {
  memory().arrays.push_back({offset, bytes, name});
}

void* allocate(size_t bytes, size_t misplaced) {
  Memory& m = memory();
  const size_t padded = (bytes + misplaced + kLine - 1) / kLine * kLine;
  Buffer buffer = {std::make_unique<Pages>(padded), nullptr, bytes};
  std::memset(buffer.pages->begin(), kCanary, buffer.pages->end() - buffer.pages->begin());
  buffer.begin = buffer.pages->end() - padded + misplaced;
  void* result = buffer.begin;
  const auto end = reinterpret_cast<uintptr_t>(buffer.pages->end());
  m.lowest = std::min(m.lowest, reinterpret_cast<uintptr_t>(buffer.pages->begin()));
  m.highest = std::max(m.highest, end);
  m.buffers.emplace(end, std::move(buffer));
  return result;
}

void deallocate(void* p) {
  auto& buffers = memory().buffers;
  const auto found = std::find_if(buffers.begin(), buffers.end(), [p](const auto& b) { return b.second.begin == p; });
  if (found != buffers.end()) buffers.erase(found);
}

std::string describe(const void* p) {
  const Memory& m = memory();
  const auto* at = static_cast<const unsigned char*>(p);
  if (at >= m.fixed && at < m.fixed + m.fixed_bytes) {
    const SharedArray* array = array_at(static_cast<size_t>(at - m.fixed));
    if (array != nullptr) return place_in(("shared " + array->name).c_str(), p, m.fixed + array->offset, array->bytes);
  }
  if (at >= m.dynamic_pages.begin() - Pages::kPage && at < m.dynamic_pages.end() + Pages::kPage) {
    return place_in("dynamic shared memory", p, m.dynamic, m.dynamic_bytes);
  }
  for (const auto& [end, buffer] : m.buffers) {
    if (at >= buffer.pages->begin() - Pages::kPage && at < buffer.pages->end() + Pages::kPage) {
      return place_in("a buffer", p, buffer.begin, buffer.bytes);
    }
  }
  return "address " + hex(p);
}

void begin_block(size_t shmem) {
  Memory& m = memory();
  find_static_shared();
  if (m.fixed_bytes > 0) std::memcpy(m.fixed, m.fresh.data(), m.fixed_bytes);
  const size_t padded = (shmem + kLine - 1) / kLine * kLine;
  m.dynamic = m.dynamic_pages.end() - padded;
  m.dynamic_bytes = shmem;
  std::memset(m.dynamic, kPoison, shmem);
  std::memset(m.dynamic + shmem, kCanary, padded - shmem);
  if (m.dynamic_cells.size() < shmem) m.dynamic_cells.resize(shmem);
  begin_barrier_interval();
}

void begin_barrier_interval() { ++memory().barriers; }
void order_warp(unsigned warp) { ++memory().syncs[warp]; }

// Writes that no single access reported: the spaces between arrays must be as they were.
void end_block() {
  const Memory& m = memory();
  for (size_t i = 0; i < m.fixed_bytes; ++i) {
    if (m.fresh[i] == kCanary && m.fixed[i] != kCanary) record("wrote outside of arrays: " + describe(m.fixed + i));
  }
  for (const unsigned char* p = m.dynamic + m.dynamic_bytes; p < m.dynamic_pages.end(); ++p) {
    if (*p != kCanary) record("wrote outside of arrays: " + describe(p));
  }
}

void end_launch() {
  for (const auto& [end, buffer] : memory().buffers) {
    for (const unsigned char* p = buffer.pages->begin(); p < buffer.pages->end(); ++p) {
      if (p == buffer.begin) p += buffer.bytes;
      if (p < buffer.pages->end() && *p != kCanary) return record("wrote outside of arrays: " + describe(p));
    }
  }
}

void touch(const void* p, size_t bytes, size_t alignment, Access access) {
  Memory& m = memory();
  const auto* at = static_cast<const unsigned char*>(p);
  const bool fixed = at >= m.fixed && at < m.fixed + m.fixed_bytes;
  const bool dynamic = at >= m.dynamic_pages.begin() && at < m.dynamic_pages.end();
  const Buffer* buffer = fixed || dynamic ? nullptr : buffer_at(p);
  if (!fixed && !dynamic && buffer == nullptr) return;  // the kernel's own variables, its parameters
  bool inside = true;
  if (fixed) inside = in_array(static_cast<size_t>(at - m.fixed), bytes);
  if (dynamic) inside = at >= m.dynamic && at + bytes <= m.dynamic + m.dynamic_bytes;
  if (buffer != nullptr) inside = at >= buffer->begin && at + bytes <= buffer->begin + buffer->bytes;
  const std::string what = std::string(word(access)) + " " + std::to_string(bytes) + " bytes at ";
  if (!inside) fail("out of bounds: " + what + describe(p));
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("not aligned: " + what + describe(p));
  if (fixed) use_shared(m.fixed_cells, static_cast<size_t>(at - m.fixed), bytes, access, p);
  if (dynamic) use_shared(m.dynamic_cells, static_cast<size_t>(at - m.dynamic), bytes, access, p);
}

unsigned char* dynamic_shared() { return memory().dynamic; }

void check_aligned(const void* p, int alignment, const char* what, const Place& place) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(alignment) == 0) return;
  fail(std::string(what) + " at " + text(place) + ": " + describe(p) + " is no multiple of " +
       std::to_string(alignment));
}

void check_shared(const void* p, int bytes, int alignment, const char* what, const Place& place) {
  const Memory& m = memory();
  const auto* at = static_cast<const unsigned char*>(p);
  const bool fixed = at >= m.fixed && at < m.fixed + m.fixed_bytes;
  if (!fixed && (at < m.dynamic || at + bytes > m.dynamic + m.dynamic_bytes)) {
    fail(std::string(what) + " at " + text(place) + ": " + describe(p) + " is not in shared memory");
  }
  check_aligned(p, alignment, what, place);
}

void write_shared(void* to, const void* from, int bytes) {
  touch(to, static_cast<size_t>(bytes), 1, Access::kWrite);
  if (from == nullptr) {
    std::memset(to, kPoison, static_cast<size_t>(bytes));
    return;
  }
  touch(from, static_cast<size_t>(bytes), 1, Access::kRead);
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void note_atomic(const void* p, int bytes) {
  touch(p, static_cast<size_t>(bytes), static_cast<size_t>(bytes), Access::kAtomic);
}

}  // namespace pymerge::emu
