// What Python sees of _ops_nvrtc.so: who launches its kernels, and which there are.
#include "../cuda/common.cuh"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The table outlives every call of an operator.
EXPORTED void pymerge_nvrtc_connect(const pymerge::nvrtc::Device* device) { pymerge::nvrtc::device = device; }

EXPORTED void pymerge_nvrtc_kernels(void (*each)(const char* file, const char* name, const int64_t* sizes, int count)) {
  for (const pymerge::nvrtc::Entry* entry : pymerge::nvrtc::kernels()) {
    each(entry->file, entry->name.c_str(), entry->sizes.data(), static_cast<int>(entry->sizes.size()));
  }
}
