// Attention mass over float32.
#include "attention_mass.h"

// Returns whether all blocks exist that the sequences need.
extern "C" int64_t octavo_attention_mass_f32(const MassCall<float>* call) { return attention_mass<FloatMath<float>>(*call); }
