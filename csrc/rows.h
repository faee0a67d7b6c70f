// A number of rows as a constant: a product keeps all of them in registers.
#pragma once
#include <stdint.h>

namespace hipserve {
namespace HIPSERVE_TIER {

// Calls f<rows>() for 1 <= rows <= kMax.
template <int kMax, class F> static inline void with_rows(int64_t rows, const F& f) {
  if constexpr (kMax > 1)
    if (rows < kMax) return with_rows<kMax - 1>(rows, f);
  f.template operator()<kMax>();
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
