#include "checksum.h"

#include <cstring>

namespace {

constexpr int kLanes = 8;  // independent of each other, so that their multiplications overlap
constexpr size_t kStripe = kLanes * sizeof(uint64_t);
constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio, odd

inline void add_stripe(uint64_t (&lanes)[kLanes], const uint8_t* stripe) {
  for (int i = 0; i < kLanes; ++i) {
    uint64_t word;
    std::memcpy(&word, stripe + i * sizeof(word), sizeof(word));
    const uint64_t mixed = lanes[i] ^ word;
    lanes[i] = (mixed << 29 | mixed >> 35) * kMultiplier;
  }
}

}  // namespace

uint64_t gyrfalcon_checksum(const void* data, size_t size) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = kMultiplier * (2 * i + 1);
  const size_t whole = size / kStripe * kStripe;
  for (size_t at = 0; at < whole; at += kStripe) add_stripe(lanes, bytes + at);
  if (whole < size) {  // filled up with zeros; the size, below, tells them from the data's own
    uint8_t last[kStripe] = {};
    std::memcpy(last, bytes + whole, size - whole);
    add_stripe(lanes, last);
  }
  uint64_t result = size * kMultiplier;
  for (const uint64_t lane : lanes) {
    result = (result ^ lane) * kMultiplier;
    result ^= result >> 32;
  }
  return result;
}
