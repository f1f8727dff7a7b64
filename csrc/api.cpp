// What Python calls. Nothing here throws: what can be wrong is checked before.
#include <algorithm>

#include "decoder.h"
#include "export.h"
#include "pack.h"
#include "variants.h"

using gyrfalcon::Decoder;
using gyrfalcon::DecoderSpec;
using gyrfalcon::Kernels;
using gyrfalcon::Step;
using gyrfalcon::Storage;

// Sizes of the structures that Python lays out by itself; a difference means that one side is not up to date.
GYRFALCON_EXPORT void gyrfalcon_structure_sizes(int64_t* matrix, int64_t* layer, int64_t* decoder, int64_t* step) {
  *matrix = sizeof(gyrfalcon::Matrix);
  *layer = sizeof(gyrfalcon::Layer);
  *decoder = sizeof(DecoderSpec);
  *step = sizeof(Step);
}

GYRFALCON_EXPORT int64_t gyrfalcon_panel_bytes(int32_t storage, int32_t width, int32_t group) {
  return static_cast<int64_t>(gyrfalcon::panel_bytes(static_cast<Storage>(storage), width, group));
}

// Null when memory runs out.
GYRFALCON_EXPORT Decoder* gyrfalcon_decoder_new(const DecoderSpec* spec, const Kernels* kernels, int32_t num_threads) {
  try {
    return new Decoder(*spec, *kernels, num_threads);
  } catch (...) {
    return nullptr;
  }
}

GYRFALCON_EXPORT void gyrfalcon_decoder_free(Decoder* decoder) { delete decoder; }

// 0, or 1 when memory ran out: nothing was computed then.
GYRFALCON_EXPORT int32_t gyrfalcon_decoder_forward(Decoder* decoder, const Step* step, float* hidden) {
  try {
    decoder->forward(*step, hidden);
    return 0;
  } catch (...) {
    return 1;
  }
}

GYRFALCON_EXPORT int32_t gyrfalcon_decoder_choose_next(Decoder* decoder, const Step* step, const int32_t* tokens,
                                                       int32_t num_chosen, int32_t num_ahead, int32_t* ids,
                                                       float* logprobs, uint8_t* sound) {
  try {
    decoder->choose_next(*step, tokens, num_chosen, num_ahead, ids, logprobs, sound);
    return 0;
  } catch (...) {
    return 1;
  }
}

GYRFALCON_EXPORT int32_t gyrfalcon_decoder_logits(Decoder* decoder, const float* hidden, int32_t num_rows,
                                                  float* logits) {
  try {
    decoder->logits(hidden, num_rows, logits);
    return 0;
  } catch (...) {
    return 1;
  }
}

GYRFALCON_EXPORT void gyrfalcon_decoder_choose_greedy(Decoder* decoder, const float* logits, int32_t num_rows,
                                                      int32_t width, int32_t* ids, float* logprobs, uint8_t* sound) {
  decoder->choose_greedy(logits, num_rows, width, ids, logprobs, sound);
}

// Row-major `source` into `num_panels` panels, by as many threads as there are cores. rows: [16 * num_panels], the source
// row of each output slot, -1 for none. sums: of int8 codes, [16 * num_panels].
GYRFALCON_EXPORT void gyrfalcon_pack(int32_t storage, const void* source, int32_t width, int32_t group,
                                     const int32_t* rows, int32_t num_panels, void* panels, int32_t* sums) {
  const int num_slots = num_panels * gyrfalcon::kPanelWidth;
  const auto pack = [&](int first, int last) {
    switch (static_cast<Storage>(storage)) {
      case Storage::kInt8:
        gyrfalcon::pack_int8(static_cast<const int8_t*>(source), width, rows, num_slots, first, last, panels, sums);
        break;
      case Storage::kInt4:
        gyrfalcon::pack_int4(static_cast<const uint8_t*>(source), width, group, rows, num_slots, first, last, panels);
        break;
      default:
        gyrfalcon::pack_floats(static_cast<Storage>(storage), source, width, rows, num_slots, first, last, panels);
    }
  };
  const int num_threads = std::max(1, std::min<int>(std::thread::hardware_concurrency(), num_panels));
  std::vector<std::thread> others;
  for (int thread = 1; thread < num_threads; ++thread)
    others.emplace_back(pack, num_panels * thread / num_threads, num_panels * (thread + 1) / num_threads);
  pack(0, num_panels / num_threads);
  for (std::thread& other : others) other.join();
}
