// How a packed weight is multiplied by: one row per layout. A new layout is a row in layouts.cpp.
#pragma once

#include "kernels.h"
#include "program.h"

namespace weft {

// Rows of activations that meet a weight, and where the products go.
struct LinearRows {
  const void* x;  // rows of in_features in the weight's dtype
  int64_t x_stride;  // elements
  const void* residual;  // nullptr or rows of out_features in the weight's dtype
  int64_t residual_stride;
  void* out;
  int64_t out_stride;
  int64_t rows;
  DataType out_dtype;
  const void* prepared;  // nullptr, or what `prepare` made of x
};

// Rows of activations in the form in which a layout multiplies them.
struct PrepareRows {
  const PackedWeight* weight;
  const void* x;
  int64_t x_stride;
  void* prepared;
};

struct Layout {
  const char* name;  // `PackedLinear.layout`
  // nullptr: a table only.
  void (*linear)(const PackedWeight& weight, const LinearRows& rows);
  // Rows of the original weight, in its dtype. nullptr: no table to look rows up in.
  void (*embedding)(const PackedWeight& weight, const int32_t* ids, int64_t count, void* out);
  // Of `weight.data`. nullptr where there is no `linear`.
  int64_t (*bytes)(const PackedWeight& weight);
  // nullptr where rows are multiplied as they are. Otherwise `linear` prepares them unless it is given them prepared.
  void (*prepare)(const PrepareRows& arguments, int64_t first_row, int64_t end_row);
  int64_t (*prepared_row_bytes)(const PackedWeight& weight);
};

// Place of a layout in the table, or -1 when there is none of that name, or none that rows can be looked up in.
int32_t find_layout(const char* name, bool as_table);
const Layout& layout_at(int32_t place);

}  // namespace weft
