// The end of a matrix product: bias, activation and the columns' stores, and the order in which panels are taken.
#pragma once

#include <type_traits>

#include "matrix.h"
#include "rows.inl.h"
#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

// x/2 (1 + erf(x / sqrt 2))
inline vec16 gelu(vec16 x) { return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.70710678f))); }

inline vec16 silu(vec16 x) { return x / (splat(1.0f) + exp(-x)); }

// Panels computed together; with kGatedSilu they are pairs of gate and up.
struct PanelSet {
  int count;
  int panels[4];
};

template <Finish kFinish, bool kIsBf16>
inline void store_columns(void* to, int count, vec16 value) {
  if constexpr (kIsBf16) {
    if (count == kPanelWidth) return store_bf16(static_cast<uint16_t*>(to), value);
    uint16_t columns[kPanelWidth];
    store_bf16(columns, value);
    std::memcpy(to, columns, sizeof(uint16_t) * count);
  } else {
    float* const floats = static_cast<float*>(to);
    if (count == kPanelWidth) {
      store(floats, kFinish == Finish::kAdd ? load(floats) + value : value);
    } else {
      store_part(floats, kFinish == Finish::kAdd ? load_part(floats, count) + value : value, count);
    }
  }
}

template <Finish kFinish, bool kIsBf16, class Value>
inline void finish_rows_as(const Matrix& w, const Output& out, const PanelSet& set, int first_row, int num_rows,
                           const Value& value) {
  constexpr bool kIsGated = kFinish == Finish::kGatedSilu;
  constexpr int64_t kSize = kIsBf16 ? 2 : 4;
  for (int i = 0; i < set.count; i += kIsGated ? 2 : 1) {
    const int packed = set.panels[i] * kPanelWidth, first = kIsGated ? packed / 2 : packed;
    const int rest = (kIsGated ? w.num_outputs / 2 : w.num_outputs) - first;
    const int count = rest < kPanelWidth ? rest : kPanelWidth;
    uint8_t* to = static_cast<uint8_t*>(out.data) + (first_row * out.stride + first) * kSize;
    // Of gate and up the bias lies as their panels do, whole.
    vec16 bias = splat(0.0f), up_bias = splat(0.0f);
    if (w.bias) bias = kIsGated ? load(w.bias + packed) : load_some(w.bias + packed, count);
    if (w.bias && kIsGated) up_bias = load(w.bias + packed + kPanelWidth);
    for (int row = first_row; row < first_row + num_rows; ++row, to += out.stride * kSize) {
      vec16 v = value(row, i);
      if (w.bias) v += bias;
      if constexpr (kFinish == Finish::kGelu) v = gelu(v);
      if constexpr (kIsGated) {
        vec16 up = value(row, i + 1);
        if (w.bias) up += up_bias;
        v = silu(v) * up;
      }
      store_columns<kFinish, kIsBf16>(to, count, v);
    }
  }
}

// Finishes rows first_row .. first_row + num_rows. value(row, i) is the product of a row with panel set.panels[i].
template <class Value>
inline void finish_rows(const Matrix& w, const Output& out, const PanelSet& set, int first_row, int num_rows,
                        const Value& value) {
  const auto as = [&](auto finish, auto is_bf16) {
    finish_rows_as<decltype(finish)::value, decltype(is_bf16)::value>(w, out, set, first_row, num_rows, value);
  };
  const auto in_type = [&](auto finish) { out.is_bf16 ? as(finish, std::true_type()) : as(finish, std::false_type()); };
  switch (out.finish) {
    case Finish::kStore: return in_type(std::integral_constant<Finish, Finish::kStore>());
    case Finish::kAdd: return as(std::integral_constant<Finish, Finish::kAdd>(), std::false_type());
    case Finish::kGelu: return in_type(std::integral_constant<Finish, Finish::kGelu>());
    case Finish::kGatedSilu: return in_type(std::integral_constant<Finish, Finish::kGatedSilu>());
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
