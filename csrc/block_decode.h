// Decode attention of many sequences: thread blocks that read ahead into shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include "decode_attention.h"

namespace moe_engine {

// num_warps: of a thread block, 12, which then has a multiprocessor for itself, or 6. Throws
// std::invalid_argument for others and for sizes that do not fit.
void block_decode(const DecodeAttentionArgs& args, int num_warps, cudaStream_t stream);

}  // namespace moe_engine
