// A decoder's forward pass as one call: every layer of a step within one job of the thread team.
//
// Letters: T tokens of the step, D hidden, F feed-forward width, V vocabulary, E head size, S rows of logits.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace gyrfalcon {

// The root of the mean square is removed where there is no bias, mean and variance where there is one.
struct Norm {
  const float* weight;  // [D]
  const float* bias;    // [D]; null: an RMS norm
  float epsilon;
};

enum class BlockForm : int32_t {
  kSequential,  // attention on the stream, then the MLP on the sum
  kParallel     // both on the same stream, their results added to it
};

struct Layer {
  BlockForm form;
  int32_t is_gated;  // the MLP is down(silu(gate) * up), `up` holding alternate panels of both; otherwise down(gelu(up))
  Norm attention_norm;
  Norm mlp_norm;  // weight null: the MLP reads the attention's norm (parallel only)
  Matrix qkv;     // outputs [Q | K | V], heads in order
  Matrix output;
  Matrix up;
  Matrix down;
};

struct DecoderSpec {
  int32_t num_layers;
  int32_t hidden_size;
  int32_t ffn_size;
  int32_t vocab_size;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t cache_is_bf16;
  const Layer* layers;
  Norm final_norm;
  Matrix head;
  const void* embedding;       // [V][D] of `embedding_storage`: kFloat32, kFloat16 or kBFloat16
  Storage embedding_storage;
  const float* frequencies;    // [E / 2] radians a position turns; null for ALiBi
  const float* slopes;         // [num_heads]; null with rotary positions
};

struct Step {
  Batch batch;
  const int32_t* ids;   // [T]
  int32_t block_size;   // positions in a block of the cache
  const Cache* caches;  // one a layer
};

class Decoder {
 public:
  // Keeps `spec` by value and everything it points at by reference. `kernels` must run on this processor.
  Decoder(const DecoderSpec& spec, const Kernels& kernels, int num_threads);

  // Runs a step and stores its keys and values; hidden: [T][D], after the final norm.
  void forward(const Step& step, float* hidden);

  // Runs a step and chooses the likeliest successor of S of its tokens, as the functions below would; then `num_ahead`
  // times another step, each of whose rows has one token: the one chosen before it. With num_ahead > 0 the first step's
  // rows have one token too, the S tokens are all of them in order, and the tables have room for those to come.
  // ids and log-probabilities [1 + num_ahead][S]; sound = 0 where there is none, and what comes after it says nothing.
  void choose_next(const Step& step, const int32_t* tokens, int num_chosen, int num_ahead, int32_t* ids,
                   float* logprobs, uint8_t* sound);

  // Scores of every vocabulary entry: logits [S][V].
  void logits(const float* hidden, int num_rows, float* logits);

  // For each row of logits the largest one's id and log-probability; sound[s] = 0 where there is none.
  void choose_greedy(const float* logits, int num_rows, int width, int32_t* ids, float* logprobs, uint8_t* sound);

 private:
  struct Buffer;
  struct Input;
  struct Workspace;
  struct Run;
  struct Pass;

  void choose_once(const Step& step, const int32_t* tokens, int num_chosen, int32_t* ids, float* logprobs,
                   uint8_t* sound);

  // Make the memory that a call's threads will ask for, so that none of them has to.
  void reserve(std::vector<Input>& inputs, const Matrix& w, int num_rows);
  void reserve_head(int num_rows);

  const DecoderSpec spec_;
  const std::vector<Layer> layers_;
  const Kernels& kernels_;
  ThreadTeam team_;
  std::shared_ptr<Workspace> workspace_;
};

}  // namespace gyrfalcon
