// From the dtype of a call to storage types: the only switch over dtypes.
#pragma once
#include "storage.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Calls kernel<Q, K>(), with the storage types of queries and of keys. Tile registers multiply
// bfloat16 only: in that tier, `entry` of the tier below takes the other dtypes.
template <class Call, class Kernel>
static void dispatch(Dtype dtype, const Call& call, void (*Kernels::*entry)(const Call&),
                     const Kernel& kernel) {
  switch (dtype) {
    case Dtype::bf16: return kernel.template operator()<bf16, bf16>();
#if defined(__AMX_BF16__)
    default: return (kernels_avx512_bf16.*entry)(call);
#else
    case Dtype::f16: return kernel.template operator()<f16, f16>();
    default: return kernel.template operator()<float, float>();
#endif
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
