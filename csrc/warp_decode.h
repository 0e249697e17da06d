// Decode attention of few sequences: clusters of thread blocks that read straight into registers.
#pragma once

#include <cuda_runtime_api.h>

#include "decode_attention.h"

namespace moe_engine {

// Throws std::invalid_argument for sizes that do not fit.
void warp_decode(const DecodeAttentionArgs& args, cudaStream_t stream);

}  // namespace moe_engine
