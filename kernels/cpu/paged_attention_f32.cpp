// Paged attention over float32.
#include "attention.h"

// Returns whether all blocks exist that the sequences need.
extern "C" int64_t octavo_paged_attention_f32(const Call<float>* call) { return paged_attention<FloatMath<float>>(*call); }
