// A cluster whose blocks are copies of one library: an address in one copy is the same distance from its `of_block` in every other.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {
struct cluster_group {
    void sync() const { pthread_barrier_wait(of_block.cluster); }
    void barrier_arrive() const {}
    void barrier_wait() const { sync(); }
    template <typename T> T * map_shared_rank(T * p, int rank) const { return (T *) (of_block.bases[rank] + ((const char *) p - (const char *) &of_block)); }
};
inline cluster_group this_cluster() { return {}; }
}
