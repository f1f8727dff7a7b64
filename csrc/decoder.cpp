#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "pack.h"

namespace gyrfalcon {
namespace {

// Bytes of weights that a thread takes at a time while few rows are computed: long enough a run to stream at full
// speed, short enough that threads end together.
constexpr size_t kChunkBytes = 256 << 10;

// Pieces of a matrix for every thread while many rows are computed.
constexpr int kPiecesPerThread = 4;

// Panels of a task while many rows are computed: as many as the products keep in the second-level cache.
constexpr int kMostPanels = 32;

// Rows of a task of work that is done row by row.
constexpr int kRowsOfTask = 32;

constexpr size_t kAlignment = 64;

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  float value;
  if (exponent == 31) {
    const uint32_t bits = 0x7f800000 | mantissa << 13;
    std::memcpy(&value, &bits, 4);
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    value = std::ldexp(static_cast<float>(mantissa | 1024), static_cast<int>(exponent) - 25);
  }
  return sign ? -value : value;
}

float element(const void* values, Storage storage, size_t index) {
  if (storage == Storage::kFloat32) return static_cast<const float*>(values)[index];
  const uint16_t half = static_cast<const uint16_t*>(values)[index];
  if (storage == Storage::kFloat16) return half_to_float(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Where a packed float matrix holds an output's inner position.
size_t packed_index(const Matrix& w, int output, int position) {
  const size_t panel = output / kPanelWidth, column = output % kPanelWidth;
  const size_t padded = padded_width(w.storage, w.width, w.group);
  if (w.storage == Storage::kBFloat16)
    return ((panel * padded + position / 2 * 2) * kPanelWidth) + column * 2 + position % 2;
  return (panel * padded + position) * kPanelWidth + column;
}

bool same_input(const Matrix& a, const Matrix& b, const Kernels& kernels) {
  return kernels.form(a.storage) == kernels.form(b.storage) && a.group == b.group && a.order == b.order;
}

// Whether results can be written where the product reads them, without being prepared.
bool reads_plain(const Matrix& w, const Kernels& kernels) {
  const Form form = kernels.form(w.storage);
  return !w.order && (form == Form::kBFloat16 || form == Form::kFloat32);
}

// What lies between a row's width and its packed width, where results are written straight into a product's input.
void clear_padding(const Activations& x, int row) {
  if (x.form != Form::kBFloat16) return;
  const int padded = padded_width(Storage::kBFloat16, x.width, 0);
  std::memset(x.data + row * x.stride + 2 * static_cast<int64_t>(x.width), 0, 2 * (padded - x.width));
}

int num_groups(const Matrix& w) { return w.group ? padded_width(w.storage, w.width, w.group) / w.group : 0; }

}  // namespace

// Memory that grows and never shrinks, aligned for vectors.
struct Decoder::Buffer {
  std::vector<uint8_t> bytes;

  template <class T>
  T* get(size_t count) {
    const size_t needed = count * sizeof(T) + kAlignment;
    if (bytes.size() < needed) bytes = std::vector<uint8_t>(needed);
    const auto address = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
};

// The left side of a product.
struct Decoder::Input {
  Buffer data, scales, sums;

  Activations get(const Matrix& w, int num_rows, const Kernels& kernels) {
    const Form form = kernels.form(w.storage);
    const int64_t stride = static_cast<int64_t>(activation_stride(form, w.width, w.group));
    const size_t num_scales = static_cast<size_t>(num_rows) * std::max(1, num_groups(w));
    return {form,
            w.width,
            form == Form::kGroupedInt8 ? w.group : 0,
            data.get<uint8_t>(num_rows * stride),
            stride,
            scales.get<float>(num_scales),
            sums.get<int32_t>(num_scales)};
  }
};

struct Decoder::Workspace {
  Buffer stream, qkv, attended, expanded, cosines, sines;
  Input attention_input, mlp_input, output_input, down_input, head_input;
  std::vector<Buffer> normed;   // of each thread: a row
  std::vector<Buffer> scratch;  // of each thread: what its kernel asks for
  std::vector<AttentionTask> tasks;
};

Decoder::Decoder(const DecoderSpec& spec, const Kernels& kernels, int num_threads)
    : spec_(spec),
      layers_(spec.layers, spec.layers + spec.num_layers),
      kernels_(kernels),
      team_(num_threads),
      workspace_(std::make_shared<Workspace>()) {
  workspace_->normed.resize(team_.size());
  workspace_->scratch.resize(team_.size());
}

// What one call works with; its member functions are called by every thread of the team alike.
struct Decoder::Run {
  Decoder& decoder;
  const DecoderSpec& spec;
  const Kernels& kernels;
  ThreadTeam& team;
  Workspace& workspace;
  int thread;

  explicit Run(Decoder& owner, int thread_number)
      : decoder(owner), spec(owner.spec_), kernels(owner.kernels_), team(owner.team_), workspace(*owner.workspace_),
        thread(thread_number) {
    kernels.enter_thread();
  }

  void normalise(const Norm& norm, const float* x, float* out) const {
    if (norm.bias)
      kernels.layer_norm(x, norm.weight, norm.bias, norm.epsilon, spec.hidden_size, out);
    else
      kernels.rms_norm(x, norm.weight, norm.epsilon, spec.hidden_size, out);
  }

  float* own_row() const { return workspace.normed[thread].get<float>(spec.hidden_size); }

  // How many panels a task of the product takes.
  int panels_of_task(const Matrix& w, int num_rows, bool in_pairs) const {
    const int panels = num_panels(w);
    const int by_thread = std::max(1, panels / (kPiecesPerThread * team.size()));
    const size_t bytes = panel_bytes(w.storage, w.width, w.group);
    const int by_bytes = std::max<int>(1, static_cast<int>(kChunkBytes / bytes));
    int count = num_rows <= 16 ? std::min(by_thread, by_bytes) : std::min(by_thread, kMostPanels);
    if (count > 4) count = count / 4 * 4;  // whole register blocks
    if (in_pairs || count > 1) count = std::max(2, count / 2 * 2);
    return count;
  }

  // Rows one by one where they are few, else in runs: neighbouring tokens write to the same lines of the cache, which
  // two threads should not do in turns.
  template <class Task>
  void share_rows(int num_rows, const Task& task) const {
    const int size = std::max(1, std::min(kRowsOfTask, num_rows / (kPiecesPerThread * team.size())));
    team.share((num_rows + size - 1) / size, [&](int piece) {
      for (int row = piece * size; row < std::min(num_rows, (piece + 1) * size); ++row) task(row);
    });
  }

  struct Product {
    const Matrix* w;
    const Activations* x;
    Output out;
  };

  // Several products in one round of tasks.
  void multiply(const Product* products, int num_products, int num_rows) const {
    int sizes[2], counts[2] = {0, 0}, total = 0;
    for (int i = 0; i < num_products; ++i) {
      sizes[i] = panels_of_task(*products[i].w, num_rows, products[i].out.finish == Finish::kGatedSilu);
      counts[i] = (num_panels(*products[i].w) + sizes[i] - 1) / sizes[i];
      total += counts[i];
    }
    team.share(total, [&](int task) {
      const int which = task < counts[0] ? 0 : 1;
      const Product& p = products[which];
      const int first = (which ? task - counts[0] : task) * sizes[which];
      const int last = std::min(first + sizes[which], num_panels(*p.w));
      kernels.matmul(*p.w, *p.x, num_rows, first, last, p.out, scratch(*p.w, num_rows));
    });
  }

  // Two products added to the same outputs, in this order: each task does its columns of both.
  void multiply_and_add(const Product& one, const Product& other, int num_rows) const {
    const int size = std::min(panels_of_task(*one.w, num_rows, false), panels_of_task(*other.w, num_rows, false));
    const int panels = num_panels(*one.w);
    team.share((panels + size - 1) / size, [&](int task) {
      const int first = task * size, last = std::min(first + size, panels);
      kernels.matmul(*one.w, *one.x, num_rows, first, last, one.out, scratch(*one.w, num_rows));
      kernels.matmul(*other.w, *other.x, num_rows, first, last, other.out, scratch(*other.w, num_rows));
    });
  }

  void* scratch(const Matrix& w, int num_rows) const {
    return workspace.scratch[thread].get<uint8_t>(kernels.matmul_scratch_bytes(w, num_rows));
  }
};

void Decoder::forward(const Step& step, float* hidden) {
  if (step.batch.num_tokens == 0) return;
  Workspace& space = *workspace_;
  const int num_tokens = step.batch.num_tokens, width = spec_.hidden_size, ffn = spec_.ffn_size;
  const int half_head = spec_.head_size / 2;
  const int64_t qkv_width = static_cast<int64_t>(spec_.num_heads + 2 * spec_.num_kv_heads) * spec_.head_size;
  const int64_t query_width = static_cast<int64_t>(spec_.num_heads) * spec_.head_size;
  const AttentionShape shape{spec_.num_heads,  spec_.num_kv_heads,         spec_.head_size,
                             step.block_size,  spec_.cache_is_bf16 != 0,   1.0f / std::sqrt(float(spec_.head_size)),
                             spec_.slopes};

  float* const stream = space.stream.get<float>(static_cast<size_t>(num_tokens) * width);
  float* const qkv = space.qkv.get<float>(num_tokens * qkv_width);
  bool prepares_output = false, prepares_down = false;
  for (const Layer& layer : layers_) {
    prepares_output |= !reads_plain(layer.output, kernels_);
    prepares_down |= !reads_plain(layer.down, kernels_);
  }
  float* const attended = space.attended.get<float>(prepares_output ? num_tokens * query_width : 0);
  float* const expanded = space.expanded.get<float>(prepares_down ? static_cast<size_t>(num_tokens) * ffn : 0);
  float* const cosines = space.cosines.get<float>(static_cast<size_t>(num_tokens) * half_head);
  float* const sines = space.sines.get<float>(static_cast<size_t>(num_tokens) * half_head);

  const auto input_for = [&](const Matrix& w, Input& memory) { return memory.get(w, num_tokens, kernels_); };

  // Every layer asks for the same memory, or nearly: the buffers are made before the threads start.
  size_t scratch_bytes = kernels_.attend_scratch_bytes(shape);
  for (const Layer& layer : layers_) {
    for (const Matrix* w : {&layer.qkv, &layer.output, &layer.up, &layer.down})
      scratch_bytes = std::max(scratch_bytes, kernels_.matmul_scratch_bytes(*w, num_tokens));
    input_for(layer.qkv, space.attention_input);
    input_for(layer.up, space.mlp_input);
    input_for(layer.output, space.output_input);
    input_for(layer.down, space.down_input);
  }
  for (Buffer& scratch : space.scratch) scratch.get<uint8_t>(scratch_bytes);
  for (Buffer& row : space.normed) row.get<float>(width);

  // The longest tasks first, so that threads end together.
  space.tasks.clear();
  const int group = spec_.num_heads / spec_.num_kv_heads, products_of_task = kernels_.attend_products(shape);
  for (int row = 0; row < step.batch.num_rows; ++row) {
    const int num_products = (step.batch.query_starts[row + 1] - step.batch.query_starts[row]) * group;
    for (int kv_head = 0; kv_head < spec_.num_kv_heads; ++kv_head)
      for (int first = 0; first < num_products; first += products_of_task)
        space.tasks.push_back({row, kv_head, first, std::min(products_of_task, num_products - first)});
  }
  const auto cost = [&](const AttentionTask& task) {
    const int64_t last_token = (task.first_product + task.num_products - 1) / group;
    return task.num_products * (step.batch.context_lens[task.row] + last_token + 1);
  };
  std::stable_sort(space.tasks.begin(), space.tasks.end(),
                   [&](const AttentionTask& a, const AttentionTask& b) { return cost(a) > cost(b); });

  team_.run([&](int thread) {
    const Run run(*this, thread);
    float* const normed = run.own_row();
    const auto row_of = [](float* values, int64_t stride, int row) { return values + row * stride; };

    run.share_rows(num_tokens, [&](int token) {
      float* const x = row_of(stream, width, token);
      const int id = step.ids[token];
      for (int i = 0; i < width; ++i)
        x[i] = spec_.embedding ? element(spec_.embedding, spec_.embedding_storage, static_cast<size_t>(id) * width + i)
                               : element(spec_.head.panels, spec_.head.storage, packed_index(spec_.head, id, i));
      if (spec_.frequencies) {
        const float position = static_cast<float>(step.batch.positions[token]);
        for (int i = 0; i < half_head; ++i) {
          const float angle = position * spec_.frequencies[i];
          cosines[static_cast<int64_t>(token) * half_head + i] = std::cos(angle);
          sines[static_cast<int64_t>(token) * half_head + i] = std::sin(angle);
        }
      }
    });

    for (size_t index = 0; index < layers_.size(); ++index) {
      const Layer& layer = layers_[index];
      const Cache& cache = step.caches[index];
      const bool is_parallel = layer.form == BlockForm::kParallel;
      const bool shares_input = is_parallel && !layer.mlp_norm.weight && same_input(layer.qkv, layer.up, kernels_);

      const Activations attention_x = input_for(layer.qkv, space.attention_input);
      const Activations mlp_x = shares_input ? attention_x : input_for(layer.up, space.mlp_input);
      const Activations output_x = input_for(layer.output, space.output_input);
      const Activations down_x = input_for(layer.down, space.down_input);

      // Results that a product can read as they are go straight into its input.
      const auto out_to = [&](const Activations& next, const Matrix& w, float* plain, int64_t plain_stride,
                              Finish finish) {
        const bool is_bf16 = next.form == Form::kBFloat16;
        if (reads_plain(w, kernels_)) return Output{next.data, next.stride / (is_bf16 ? 2 : 4), is_bf16, finish};
        return Output{plain, plain_stride, false, finish};
      };
      const Output up_out =
          out_to(down_x, layer.down, expanded, ffn, layer.is_gated ? Finish::kGatedSilu : Finish::kGelu);
      const Output attend_out = out_to(output_x, layer.output, attended, query_width, Finish::kStore);
      const bool down_is_ready = reads_plain(layer.down, kernels_);
      const bool output_is_ready = reads_plain(layer.output, kernels_);
      const Output to_stream{stream, width, false, Finish::kAdd};
      const Run::Product make_qkv{&layer.qkv, &attention_x, {qkv, qkv_width, false, Finish::kStore}};
      const Run::Product make_up{&layer.up, &mlp_x, up_out};
      const Run::Product add_output{&layer.output, &output_x, to_stream};
      const Run::Product add_down{&layer.down, &down_x, to_stream};

      const auto prepare_mlp = [&](int token) {
        kernels_.prepare(normed, layer.up.order, mlp_x, token);
      };

      run.share_rows(num_tokens, [&](int token) {
        const float* const x = row_of(stream, width, token);
        run.normalise(layer.attention_norm, x, normed);
        kernels_.prepare(normed, layer.qkv.order, attention_x, token);
        if (!is_parallel || shares_input) return;
        if (layer.mlp_norm.weight) run.normalise(layer.mlp_norm, x, normed);
        prepare_mlp(token);
      });
      if (is_parallel) {
        const Run::Product both[] = {make_qkv, make_up};
        run.multiply(both, 2, num_tokens);
      } else {
        run.multiply(&make_qkv, 1, num_tokens);
      }
      run.share_rows(num_tokens, [&](int token) {
        const int64_t angles = static_cast<int64_t>(token) * half_head;
        const int32_t* const table =
            step.batch.block_tables + static_cast<int64_t>(step.batch.token_rows[token]) * step.batch.table_width;
        kernels_.rotate_and_store(row_of(qkv, qkv_width, token), spec_.frequencies ? cosines + angles : nullptr,
                                  spec_.frequencies ? sines + angles : nullptr, shape, cache, table,
                                  step.batch.positions[token]);
        if (output_is_ready) clear_padding(output_x, token);
        if (down_is_ready) clear_padding(down_x, token);
        if (is_parallel && !down_is_ready)
          kernels_.prepare(row_of(expanded, ffn, token), layer.down.order, down_x, token);
      });
      team_.share(static_cast<int>(space.tasks.size()), [&](int task) {
        kernels_.attend(space.tasks[task], qkv, qkv_width, shape, cache, step.batch, attend_out.data,
                        attend_out.stride, attend_out.is_bf16, space.scratch[thread].get<uint8_t>(1));
      });
      if (!output_is_ready)
        run.share_rows(num_tokens, [&](int token) {
          kernels_.prepare(row_of(attended, query_width, token), layer.output.order, output_x, token);
        });
      if (is_parallel) {
        run.multiply_and_add(add_down, add_output, num_tokens);
        continue;
      }
      run.multiply(&add_output, 1, num_tokens);
      run.share_rows(num_tokens, [&](int token) {
        run.normalise(layer.mlp_norm, row_of(stream, width, token), normed);
        prepare_mlp(token);
      });
      run.multiply(&make_up, 1, num_tokens);
      if (!down_is_ready)
        run.share_rows(num_tokens, [&](int token) {
          kernels_.prepare(row_of(expanded, ffn, token), layer.down.order, down_x, token);
        });
      run.multiply(&add_down, 1, num_tokens);
    }

    run.share_rows(num_tokens, [&](int token) {
      run.normalise(spec_.final_norm, row_of(stream, width, token), row_of(hidden, width, token));
    });
  });
}

void Decoder::logits(const float* hidden, int num_rows, float* logits) {
  if (num_rows == 0) return;  // a step may run parts of prompts alone
  Workspace& space = *workspace_;
  const Matrix& head = spec_.head;
  const Activations x = space.head_input.get(head, num_rows, kernels_);
  for (Buffer& scratch : space.scratch) scratch.get<uint8_t>(kernels_.matmul_scratch_bytes(head, num_rows));
  team_.run([&](int thread) {
    const Run run(*this, thread);
    run.share_rows(num_rows, [&](int row) {
      kernels_.prepare(hidden + static_cast<int64_t>(row) * spec_.hidden_size, head.order, x, row);
    });
    const Run::Product product{&head, &x, {logits, spec_.vocab_size, false, Finish::kStore}};
    run.multiply(&product, 1, num_rows);
  });
}

void Decoder::choose_greedy(const float* logits, int num_rows, int width, int32_t* ids, float* logprobs,
                            uint8_t* sound) {
  team_.run([&](int) {
    kernels_.enter_thread();
    team_.share(num_rows, [&](int row) {
      sound[row] = kernels_.choose_greedy(logits + static_cast<int64_t>(row) * width, width, ids + row, logprobs + row);
    });
  });
}

}  // namespace gyrfalcon
