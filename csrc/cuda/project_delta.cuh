// The product itself: 2 T m n r flops, W and W_0 read once from memory.
#pragma once

#include "projection.cuh"

namespace pymerge::cuda {

inline void launch_project_delta(const ProjectArgs& args, int dtype, bool split, Stream stream) {
  if (split) return launch_product<SplitProduct, false>(args, dtype, stream);
  launch_product<PlainProduct, false>(args, dtype, stream);
}

}  // namespace pymerge::cuda
