// Paged attention over bfloat16. Apart from the float32 file, so that both compile at once.
#include "attention.h"

// Returns whether all blocks exist that the sequences need.
extern "C" int64_t octavo_paged_attention_bf16(const Call<BFloat16>* call) { return paged_attention<Bf16Math>(*call); }
