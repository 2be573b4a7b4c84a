// gram64's kernels run by the emulator of csrc/emu, for ctypes: launches and workspaces as on a device.
#include <vector>

#include "../../csrc/cuda/gram64.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

extern "C" {

void emulate_gram64(const void* x, int32_t dtype, int64_t batch, int64_t depth, int64_t width, int32_t transposed,
                    int32_t splits, double* gram) {
  Gram64Args args = {};
  args.x = x, args.dtype = static_cast<Dtype>(dtype), args.gram = gram, args.transposed = transposed;
  args.batch = batch, args.depth = depth, args.width = width, args.splits = splits;
  std::vector<double> parts(static_cast<size_t>(splits > 1 ? splits * batch * width * width : 0));
  args.parts = splits > 1 ? parts.data() : gram;
  launch_gram64(args, 1, nullptr);
}
}
