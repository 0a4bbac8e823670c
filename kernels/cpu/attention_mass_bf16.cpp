// Attention mass over bfloat16. Apart from the float32 file, so that both compile at once.
#include "attention_mass.h"

// Returns whether all blocks exist that the sequences need.
extern "C" int64_t octavo_attention_mass_bf16(const MassCall<BFloat16>* call) { return attention_mass<Bf16Math>(*call); }
