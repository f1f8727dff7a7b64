// The end of a matrix product: bias, activation and the columns' stores, and the order in which panels are taken.
#pragma once

#include "matrix.h"
#include "rows.inl.h"
#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

// x/2 (1 + erf(x / sqrt 2))
inline vec16 gelu(vec16 x) { return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.70710678f))); }

inline vec16 silu(vec16 x) { return x / (splat(1.0f) + exp(-x)); }

// Columns of a panel that exist: 16, or what is left of `total`.
inline int columns_from(int first, int total) {
  const int count = total - first;
  return count < kPanelWidth ? count : kPanelWidth;
}

inline void store_columns(const Output& out, int64_t row, int first, int count, vec16 value) {
  if (count <= 0) return;
  const int64_t index = row * out.stride + first;
  if (out.is_bf16) {
    uint16_t* const to = static_cast<uint16_t*>(out.data) + index;
    if (count == kPanelWidth) return store_bf16(to, value);
    uint16_t columns[kPanelWidth];
    store_bf16(columns, value);
    std::memcpy(to, columns, sizeof(uint16_t) * count);
    return;
  }
  float* const to = static_cast<float*>(out.data) + index;
  if (out.finish == Finish::kAdd) value = load_some(to, count) + value;
  if (count == kPanelWidth)
    store(to, value);
  else
    store_part(to, value, count);
}

// Panels computed together; with kGatedSilu they are pairs of gate and up.
struct PanelSet {
  int count;
  int panels[4];
};

// Finishes rows first_row .. first_row + num_rows. value(row, i) is the product of a row with panel set.panels[i].
template <class Value>
inline void finish_rows(const Matrix& w, const Output& out, const PanelSet& set, int first_row, int num_rows,
                        const Value& value) {
  const bool is_gated = out.finish == Finish::kGatedSilu;
  for (int i = 0; i < set.count; i += is_gated ? 2 : 1) {
    const int panel = set.panels[i], first = panel * kPanelWidth;
    if (is_gated) {
      // N / 2 outputs; gate and up have as many panels each as these fill, so a bias lies in whole panels.
      const int column = first / 2, count = columns_from(column, w.num_outputs / 2);
      const vec16 none = splat(0.0f);
      const vec16 gate_bias = w.bias ? load(w.bias + first) : none;
      const vec16 up_bias = w.bias ? load(w.bias + first + kPanelWidth) : none;
      for (int row = first_row; row < first_row + num_rows; ++row) {
        vec16 gate = value(row, i), up = value(row, i + 1);
        if (w.bias) {
          gate += gate_bias;
          up += up_bias;
        }
        store_columns(out, row, column, count, silu(gate) * up);
      }
      continue;
    }
    const int count = columns_from(first, w.num_outputs);
    const vec16 bias = w.bias ? load_some(w.bias + first, count) : splat(0.0f);
    for (int row = first_row; row < first_row + num_rows; ++row) {
      vec16 v = value(row, i);
      if (w.bias) v += bias;
      if (out.finish == Finish::kGelu) v = gelu(v);
      store_columns(out, row, first, count, v);
    }
  }
}

// Takes the panels of a range in sets of `together`, each position of a set walking through memory of its own: several
// streams read faster than one. What is left over comes in smaller sets.
class PanelWalk {
 public:
  PanelWalk(int first_panel, int last_panel, bool in_pairs, int together)
      : first_(first_panel), unit_(in_pairs ? 2 : 1), num_streams_(together / unit_) {
    num_units_ = (last_panel - first_panel) / unit_;
    run_ = num_units_ / num_streams_;
    rest_begin_ = run_ * num_streams_;
  }

  int num_sets() const { return run_ + (num_units_ - rest_begin_ + rest_units() - 1) / rest_units(); }

  PanelSet operator[](int index) const {
    PanelSet set{};
    if (index < run_) {
      for (int stream = 0; stream < num_streams_; ++stream) add(set, stream * run_ + index);
      return set;
    }
    const int begin = rest_begin_ + (index - run_) * rest_units();
    for (int unit = begin; unit < begin + rest_units() && unit < num_units_; ++unit) add(set, unit);
    return set;
  }

 private:
  // Sets have 4, 2 or 1 panels.
  int rest_units() const { return num_streams_ >= 4 ? 2 : 1; }

  void add(PanelSet& set, int unit) const {
    for (int i = 0; i < unit_; ++i) set.panels[set.count++] = first_ + unit * unit_ + i;
  }

  int first_, unit_, num_streams_, num_units_, run_, rest_begin_;
};

}  // namespace gyrfalcon::GYRFALCON_ISA
