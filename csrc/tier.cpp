// Compiled once for each ISA tier; CMakeLists.txt gives the flags and the name.
#include "attention/attention.h"
#include "select/search.h"
#include "write_kv.h"

#define HIPSERVE_JOIN2(a, b) a##b
#define HIPSERVE_JOIN(a, b) HIPSERVE_JOIN2(a, b)

namespace hipserve {
const Kernels HIPSERVE_JOIN(kernels_, HIPSERVE_TIER) = {
    HIPSERVE_TIER::attention, HIPSERVE_TIER::select_by_tree, HIPSERVE_TIER::select_by_bound,
    HIPSERVE_TIER::write_kv, HIPSERVE_TIER::build_index};
}  // namespace hipserve
