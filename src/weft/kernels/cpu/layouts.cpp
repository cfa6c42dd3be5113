#include "layouts.h"

#include <cstring>

#include "operations.h"
#include "quantized_operations.h"

namespace weft {
namespace {

void multiply_panels(const PackedWeight& w, const LinearRows& r) {
  linear({nullptr, 0, static_cast<const uint8_t*>(w.data), w.bias, r.residual, r.residual_stride, r.out, r.out_stride,
          r.rows, w.in_features, w.out_features, w.dtype, r.out_dtype},
         r.x, r.x_stride);
}

void look_up_panels(const PackedWeight& w, const int32_t* ids, int64_t count, void* out) {
  embedding(ids, sizeof(int32_t), count, static_cast<const uint8_t*>(w.data), w.in_features, w.dtype, out);
}

void look_up_rows(const PackedWeight& w, const int32_t* ids, int64_t count, void* out) {
  take_rows(w.data, w.in_features, ids, count, w.in_features, w.dtype, out);
}

int64_t panels_bytes(const PackedWeight& w) {
  return panel_count(w.out_features) * panel_bytes(w.in_features, w.dtype);
}

constexpr Layout kLayouts[] = {
    {"panels", multiply_panels, look_up_panels, panels_bytes, nullptr, nullptr},
    {"quantized", quantized_linear, quantized_embedding, quantized_weight_bytes, quantize_rows, quantized_row_bytes},
    {"rows", nullptr, look_up_rows, nullptr, nullptr, nullptr},
};

}  // namespace

int32_t find_layout(const char* name, bool as_table) {
  int32_t place = 0;
  for (const Layout& layout : kLayouts) {
    const bool serves = as_table ? layout.embedding != nullptr : layout.linear != nullptr;
    if (serves && std::strcmp(layout.name, name) == 0) return place;
    ++place;
  }
  return -1;
}

const Layout& layout_at(int32_t place) { return kLayouts[place]; }

}  // namespace weft
