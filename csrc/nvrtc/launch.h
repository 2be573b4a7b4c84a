// LAUNCH for kernels that NVRTC compiles when they are first launched: the launchers of ../cuda, as g++ compiles them,
// name the kernel and hand grid, block and arguments to whoever is connected (pymerge/ops/_nvrtc.py). A kernel is only
// named, as a template argument, so none of its code is in the library.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#undef LAUNCH
#define LAUNCH(kernel, grid, block, shmem, stream, ...) \
  pymerge::nvrtc::launch<(kernel), pymerge::nvrtc::Text(__FILE__)>(grid, block, shmem, stream, __VA_ARGS__)

namespace pymerge::nvrtc {

struct Shape {
  uint32_t grid[3], block[3], shared;
};

// What the launchers need of a device. All but the last return 0, or something else after keeping a message.
struct Device {
  int (*launch)(const char* file, const char* kernel, const Shape* shape, void* stream, void** arguments);
  int (*attribute)(int device, int which, int* value);
  int (*stream)(int device, void** stream);
  int (*fill)(void* to, int value, uint64_t bytes, void* stream);
  int (*read)(void* to, const void* from, uint64_t bytes, void* stream);  // returns when they are there
  const char* (*message)();
};

inline const Device* device = nullptr;

inline void check(int failed) {
  if (failed != 0) throw std::runtime_error(device->message());
}

template <size_t kLength>
struct Text {
  char at[kLength];
  constexpr explicit Text(const char (&text)[kLength]) {
    for (size_t i = 0; i < kLength; ++i) at[i] = text[i];
  }
};

struct Entry {
  const char* file;
  std::string name;            // as C++ writes it, for NVRTC's name expressions
  std::vector<int64_t> sizes;  // of the arguments
};

inline std::vector<const Entry*>& kernels() {
  static std::vector<const Entry*> all;
  return all;
}

template <auto kKernel>
constexpr std::string_view name_of() {
  constexpr std::string_view text = __PRETTY_FUNCTION__, before = "kKernel = ";
  constexpr size_t begin = text.find(before) + before.size();
  return text.substr(begin, text.find(';', begin) - begin);
}

template <auto kKernel, Text kFile, class... Types>
struct Registered {
  Registered() { kernels().push_back(&entry); }
  Entry entry = {kFile.at, std::string(name_of<kKernel>()), {static_cast<int64_t>(sizeof(Types))...}};
  static inline const Registered one;
};

template <auto kKernel, Text kFile, class... Types>
void launch_as(void (*)(Types...), const Shape& shape, void* stream, std::type_identity_t<Types>... given) {
  const Entry& entry = Registered<kKernel, kFile, Types...>::one.entry;
  void* pointers[] = {&given...};
  check(device->launch(entry.file, entry.name.c_str(), &shape, stream, pointers));
#ifdef PYMERGE_EMULATED  // tests: the emulator is the device
  const dim3 grid(shape.grid[0], shape.grid[1], shape.grid[2]), block(shape.block[0], shape.block[1], shape.block[2]);
  emu::launch(entry.name.c_str(), grid, block, shape.shared, stream, [&] { kKernel(given...); });
#endif
}

template <auto kKernel, Text kFile, class... Given>
void launch(dim3 grid, dim3 block, size_t shared, void* stream, const Given&... given) {
  const Shape shape = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, static_cast<uint32_t>(shared)};
  const auto types = static_cast<decltype(kKernel)>(nullptr);  // the address itself would bring the kernel's code in
  launch_as<kKernel, kFile>(types, shape, stream, given...);
}

}  // namespace pymerge::nvrtc
