// The few calls of the CUDA runtime that launchers make, answered by whoever is connected: no CUDA library is linked.
#pragma once

#include "launch.h"

#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(call) pymerge::nvrtc::check(call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)  // every launch has been checked
#define cudaFuncSetAttribute(kernel, attribute, value) 0     // launches that need more shared memory ask for it

namespace pymerge::cuda {

constexpr int cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;  // CUDA's numbers
constexpr int cudaMemcpyDeviceToHost = 2;

inline int cudaDeviceGetAttribute(int* value, int which, int device) {
  return nvrtc::device->attribute(device, which, value);
}

inline int cudaMemsetAsync(void* to, int value, size_t bytes, void* stream) {
  return nvrtc::device->fill(to, value, bytes, stream);
}

inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void* stream) {
  return nvrtc::device->read(to, from, bytes, stream);
}

inline int cudaStreamSynchronize(void*) { return 0; }  // `read` has waited

inline int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  nvrtc::check(nvrtc::device->stream(device, stream));
  return 0;
}

#ifdef PYMERGE_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#define CUDA PrivateUse1  // the key under which tests register the operators
#endif

}  // namespace pymerge::cuda
