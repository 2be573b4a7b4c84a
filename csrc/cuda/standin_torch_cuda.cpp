// A stand-in for libtorch_cuda.so with the functions that the launchers call, so that _ops_cuda.so links on a machine
// whose torch has no CUDA. compile_check.sh builds it; it is never shipped.
#include <cstdint>

#define STAND_IN extern "C" __attribute__((visibility("default")))

STAND_IN int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
STAND_IN void torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
}
STAND_IN void torch_c10_cuda_free_error_msg(char*) {}
