// Whole operations on weights of few bits, see quantized.h. The caller holds a Session.
#pragma once

#include <cstdint>

#include "layouts.h"
#include "quantized.h"

namespace weft {

// The kernels in use: the best ones for the CPU within the instruction set that `select_kernels` chose, unless
// `select_quantized_kernels` names others.
const QuantizedKernels& quantized_kernels();
// Returns whether the CPU can run the named kernels; nullptr takes a choice back.
bool select_quantized_kernels(const char* name);

void quantize_weight(const QuantizeWeightArguments& arguments);
void pack_codes(const PackCodesArguments& arguments);
// Where the weight is `data` with its header, as in a program.
int64_t quantized_weight_bytes(const PackedWeight& weight);
int64_t quantized_row_bytes(const PackedWeight& weight);
// In the calling thread.
void quantize_rows(const PrepareRows& arguments, int64_t first_row, int64_t end_row);
void quantized_linear(const PackedWeight& weight, const LinearRows& rows);
void quantized_embedding(const PackedWeight& weight, const int32_t* ids, int64_t count, void* out);

}  // namespace weft
