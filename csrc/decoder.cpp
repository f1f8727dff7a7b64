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

// Panels that a task takes at least, however wide they are: each is a stream of its own, and one or two streams read
// slower than four.
constexpr size_t kLeastStreams = 4;

// Bytes of weights that are worth a task of their own while few rows are computed.
constexpr size_t kLeastBytes = 64 << 10;

// Rows of a task of work that is done row by row.
constexpr int kRowsOfTask = 32;

// So few rows every thread prepares for itself: that takes less time than to wait for those who would share the work.
constexpr int kRowsOfEveryThread = 2;

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
  Buffer stream, qkv, attended, expanded, cosines, sines, logits;
  // What products write into is everybody's. What is prepared from rows is too, or each thread's where rows are few.
  Input output_input, down_input;
  std::vector<Input> attention_inputs, mlp_inputs, output_inputs, down_inputs, head_inputs;  // of each thread
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
  Workspace& space = *workspace_;
  for (std::vector<Input>* inputs : {&space.attention_inputs, &space.mlp_inputs, &space.output_inputs,
                                     &space.down_inputs, &space.head_inputs})
    inputs->resize(team_.size());
  space.normed.resize(team_.size());
  space.scratch.resize(team_.size());
}

// What a thread does in one call; its member functions are called by every thread of the team alike.
struct Decoder::Run {
  const DecoderSpec& spec;
  const Kernels& kernels;
  ThreadTeam& team;
  Workspace& workspace;
  int thread;
  int num_rows;
  bool repeats;  // what is done row by row: every thread for itself

  Run(Decoder& owner, int thread_number, int rows)
      : spec(owner.spec_), kernels(owner.kernels_), team(owner.team_), workspace(*owner.workspace_),
        thread(thread_number), num_rows(rows), repeats(rows <= kRowsOfEveryThread) {
    kernels.enter_thread();
  }

  void normalise(const Norm& norm, const float* x, float* out) const {
    if (norm.bias)
      kernels.layer_norm(x, norm.weight, norm.bias, norm.epsilon, spec.hidden_size, out);
    else
      kernels.rms_norm(x, norm.weight, norm.epsilon, spec.hidden_size, out);
  }

  float* own_row() const { return workspace.normed[thread].get<float>(spec.hidden_size); }

  // A product's left side where `prepare_rows` makes it.
  Activations prepared(const Matrix& w, std::vector<Input>& inputs) const {
    return inputs[repeats ? thread : 0].get(w, num_rows, kernels);
  }

  // A product's left side where results are written into it as they come, or else `prepare_rows` makes it.
  Activations written_or_prepared(const Matrix& w, Input& written, std::vector<Input>& inputs) const {
    return reads_plain(w, kernels) ? written.get(w, num_rows, kernels) : prepared(w, inputs);
  }

  // How many panels a task of the product takes.
  int panels_of_task(const Matrix& w, bool in_pairs) const {
    const int panels = num_panels(w);
    const int by_thread = std::max(1, panels / (kPiecesPerThread * team.size()));
    int count = std::min(by_thread, kMostPanels);
    if (num_rows <= 16) {
      const size_t bytes = panel_bytes(w.storage, w.width, w.group);
      const int least = std::min<int>(kLeastBytes / bytes, panels / team.size());
      count = std::min<int>(std::max(by_thread, least), std::max(kLeastStreams, kChunkBytes / bytes));
    }
    if (count > 4) count = count / 4 * 4;  // whole register blocks
    if (in_pairs || count > 1) count = std::max(2, count / 2 * 2);
    return std::max(1, count);
  }

  // Rows one by one where they are few, else in runs: neighbouring tokens write to the same lines of the cache, which
  // two threads should not do in turns.
  template <class Task>
  void share_rows(const Task& task) const {
    const int size = std::max(1, std::min(kRowsOfTask, num_rows / (kPiecesPerThread * team.size())));
    team.share((num_rows + size - 1) / size, [&](int piece) {
      for (int row = piece * size; row < std::min(num_rows, (piece + 1) * size); ++row) task(row);
    });
  }

  // Makes the left side of a product, in memory that `prepared` gave.
  template <class Task>
  void prepare_rows(const Task& task) const {
    if (!repeats) return share_rows(task);
    for (int row = 0; row < num_rows; ++row) task(row);
  }

  struct Product {
    const Matrix* w;
    const Activations* x;
    Output out;
  };

  // Several products in one round of tasks.
  void multiply(const Product* products, int num_products) const {
    int sizes[2], counts[2] = {0, 0}, total = 0;
    for (int i = 0; i < num_products; ++i) {
      sizes[i] = panels_of_task(*products[i].w, products[i].out.finish == Finish::kGatedSilu);
      counts[i] = (num_panels(*products[i].w) + sizes[i] - 1) / sizes[i];
      total += counts[i];
    }
    team.share(total, [&](int task) {
      const int which = task < counts[0] ? 0 : 1;
      const Product& p = products[which];
      const int first = (which ? task - counts[0] : task) * sizes[which];
      const int last = std::min(first + sizes[which], num_panels(*p.w));
      kernels.matmul(*p.w, *p.x, num_rows, first, last, p.out, scratch(*p.w));
    });
  }

  // Two products added to the same outputs, in this order: each task does its columns of both.
  void multiply_and_add(const Product& one, const Product& other) const {
    const int size = std::min(panels_of_task(*one.w, false), panels_of_task(*other.w, false));
    const int panels = num_panels(*one.w);
    team.share((panels + size - 1) / size, [&](int task) {
      const int first = task * size, last = std::min(first + size, panels);
      kernels.matmul(*one.w, *one.x, num_rows, first, last, one.out, scratch(*one.w));
      kernels.matmul(*other.w, *other.x, num_rows, first, last, other.out, scratch(*other.w));
    });
  }

  void* scratch(const Matrix& w) const {
    return workspace.scratch[thread].get<uint8_t>(kernels.matmul_scratch_bytes(w, num_rows));
  }

  // Scores of every vocabulary entry. `fill(row, out)` tells the final hidden states of a row, for instance by storing
  // them at `out`.
  template <class Fill>
  void multiply_by_head(const Fill& fill, float* logits) const {
    const Activations x = prepared(spec.head, workspace.head_inputs);
    float* const own = own_row();
    prepare_rows([&](int row) { kernels.prepare(fill(row, own), spec.head.order, x, row); });
    const Product product{&spec.head, &x, {logits, spec.vocab_size, false, Finish::kStore}};
    multiply(&product, 1);
  }

  // For each row of logits the largest one.
  void choose(const float* logits, int width, int32_t* ids, float* logprobs, uint8_t* sound) const {
    team.share(num_rows, [&](int row) {
      sound[row] = kernels.choose_greedy(logits + static_cast<int64_t>(row) * width, width, ids + row, logprobs + row);
    });
  }
};

// A step's forward pass: the memory that all threads share, which is made before they start.
struct Decoder::Pass {
  Decoder& decoder;
  const DecoderSpec& spec;
  const Kernels& kernels;
  const Step& step;
  const int num_tokens, width, ffn, half_head;
  const int64_t qkv_width, query_width;
  const AttentionShape shape;
  bool task_is_whole;  // every attention task has all there is of its row and kv head
  float *stream, *qkv, *attended, *expanded, *cosines, *sines;

  Pass(Decoder& owner, const Step& one_step)
      : decoder(owner),
        spec(owner.spec_),
        kernels(owner.kernels_),
        step(one_step),
        num_tokens(step.batch.num_tokens),
        width(spec.hidden_size),
        ffn(spec.ffn_size),
        half_head(spec.head_size / 2),
        qkv_width(static_cast<int64_t>(spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size),
        query_width(static_cast<int64_t>(spec.num_heads) * spec.head_size),
        shape{spec.num_heads,  spec.num_kv_heads,       spec.head_size,
              step.block_size, spec.cache_is_bf16 != 0, 1.0f / std::sqrt(float(spec.head_size)),
              spec.slopes} {
    Workspace& space = *owner.workspace_;
    bool prepares_output = false, prepares_down = false;
    for (const Layer& layer : owner.layers_) {
      prepares_output |= !reads_plain(layer.output, kernels);
      prepares_down |= !reads_plain(layer.down, kernels);
    }
    const size_t rows = num_tokens;
    stream = space.stream.get<float>(rows * width);
    qkv = space.qkv.get<float>(rows * qkv_width);
    attended = space.attended.get<float>(prepares_output ? rows * query_width : 0);
    expanded = space.expanded.get<float>(prepares_down ? rows * ffn : 0);
    cosines = space.cosines.get<float>(rows * half_head);
    sines = space.sines.get<float>(rows * half_head);

    const auto reserve_written = [&](Input& written, std::vector<Input>& inputs, const Matrix& w) {
      if (reads_plain(w, kernels))
        written.get(w, num_tokens, kernels);
      else
        owner.reserve(inputs, w, num_tokens);
    };
    // Every layer asks for the same memory, or nearly.
    size_t scratch_bytes = kernels.attend_scratch_bytes(shape);
    for (const Layer& layer : owner.layers_) {
      for (const Matrix* w : {&layer.qkv, &layer.output, &layer.up, &layer.down})
        scratch_bytes = std::max(scratch_bytes, kernels.matmul_scratch_bytes(*w, num_tokens));
      owner.reserve(space.attention_inputs, layer.qkv, num_tokens);
      owner.reserve(space.mlp_inputs, layer.up, num_tokens);
      reserve_written(space.output_input, space.output_inputs, layer.output);
      reserve_written(space.down_input, space.down_inputs, layer.down);
    }
    for (Buffer& scratch : space.scratch) scratch.get<uint8_t>(scratch_bytes);
    for (Buffer& row : space.normed) row.get<float>(width);
    cut_attention(space.tasks);
  }

  // Where a token's own part begins.
  static float* row_of(float* values, int64_t stride, int row) { return values + row * stride; }

  // The longest tasks first, so that threads end together.
  void cut_attention(std::vector<AttentionTask>& tasks) {
    const Batch& batch = step.batch;
    const int group = spec.num_heads / spec.num_kv_heads, products_of_task = kernels.attend_products(shape);
    tasks.clear();
    for (int row = 0; row < batch.num_rows; ++row) {
      const int num_products = (batch.query_starts[row + 1] - batch.query_starts[row]) * group;
      for (int kv_head = 0; kv_head < spec.num_kv_heads; ++kv_head)
        for (int first = 0; first < num_products; first += products_of_task)
          tasks.push_back({row, kv_head, first, std::min(products_of_task, num_products - first)});
    }
    task_is_whole = static_cast<int64_t>(tasks.size()) == static_cast<int64_t>(batch.num_rows) * spec.num_kv_heads;
    const auto cost = [&](const AttentionTask& task) {
      const int64_t last_token = (task.first_product + task.num_products - 1) / group;
      return task.num_products * (batch.context_lens[task.row] + last_token + 1);
    };
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](const AttentionTask& a, const AttentionTask& b) { return cost(a) > cost(b); });
  }

  // By one thread: the token's embedding, and what its position turns heads by.
  void embed(int token) const {
    float* const x = row_of(stream, width, token);
    const int id = step.ids[token];
    for (int i = 0; i < width; ++i)
      x[i] = spec.embedding ? element(spec.embedding, spec.embedding_storage, static_cast<size_t>(id) * width + i)
                            : element(spec.head.panels, spec.head.storage, packed_index(spec.head, id, i));
    if (!spec.frequencies) return;
    const float position = static_cast<float>(step.batch.positions[token]);
    for (int i = 0; i < half_head; ++i) {
      const float angle = position * spec.frequencies[i];
      row_of(cosines, half_head, token)[i] = std::cos(angle);
      row_of(sines, half_head, token)[i] = std::sin(angle);
    }
  }

  // Turns a token's heads of these kv heads and stores its keys and values.
  void store(int token, const Cache& cache, int first_kv_head, int last_kv_head) const {
    const int32_t* const table =
        step.batch.block_tables + static_cast<int64_t>(step.batch.token_rows[token]) * step.batch.table_width;
    kernels.rotate_and_store(row_of(qkv, qkv_width, token),
                             spec.frequencies ? row_of(cosines, half_head, token) : nullptr,
                             spec.frequencies ? row_of(sines, half_head, token) : nullptr, shape, cache, table,
                             step.batch.positions[token], first_kv_head, last_kv_head);
  }

  // By every thread: the stream after the last layer.
  void run_layers(const Run& run) const {
    run.share_rows([&](int token) { embed(token); });
    for (size_t index = 0; index < decoder.layers_.size(); ++index)
      run_layer(run, decoder.layers_[index], step.caches[index]);
  }

  void run_layer(const Run& run, const Layer& layer, const Cache& cache) const {
    Workspace& space = run.workspace;
    float* const normed = run.own_row();
    const bool is_parallel = layer.form == BlockForm::kParallel;
    const bool shares_input = is_parallel && !layer.mlp_norm.weight && same_input(layer.qkv, layer.up, kernels);
    const bool down_is_ready = reads_plain(layer.down, kernels);
    const bool output_is_ready = reads_plain(layer.output, kernels);

    const Activations attention_x = run.prepared(layer.qkv, space.attention_inputs);
    const Activations mlp_x = shares_input ? attention_x : run.prepared(layer.up, space.mlp_inputs);
    const Activations output_x = run.written_or_prepared(layer.output, space.output_input, space.output_inputs);
    const Activations down_x = run.written_or_prepared(layer.down, space.down_input, space.down_inputs);

    // Results that a product can read as they are go straight into its input.
    const auto out_to = [](const Activations& next, bool is_ready, float* plain, int64_t plain_stride, Finish finish) {
      const bool is_bf16 = next.form == Form::kBFloat16;
      if (is_ready) return Output{next.data, next.stride / (is_bf16 ? 2 : 4), is_bf16, finish};
      return Output{plain, plain_stride, false, finish};
    };
    const Output up_out =
        out_to(down_x, down_is_ready, expanded, ffn, layer.is_gated ? Finish::kGatedSilu : Finish::kGelu);
    const Output attend_out = out_to(output_x, output_is_ready, attended, query_width, Finish::kStore);
    const Output to_stream{stream, width, false, Finish::kAdd};
    const Run::Product make_qkv{&layer.qkv, &attention_x, {qkv, qkv_width, false, Finish::kStore}};
    const Run::Product make_up{&layer.up, &mlp_x, up_out};
    const Run::Product add_output{&layer.output, &output_x, to_stream};
    const Run::Product add_down{&layer.down, &down_x, to_stream};

    const auto prepare_mlp = [&](int token) { kernels.prepare(normed, layer.up.order, mlp_x, token); };
    const auto prepare_down = [&](int token) {
      kernels.prepare(row_of(expanded, ffn, token), layer.down.order, down_x, token);
    };

    run.prepare_rows([&](int token) {
      const float* const x = row_of(stream, width, token);
      run.normalise(layer.attention_norm, x, normed);
      kernels.prepare(normed, layer.qkv.order, attention_x, token);
      if (!is_parallel || shares_input) return;
      if (layer.mlp_norm.weight) run.normalise(layer.mlp_norm, x, normed);
      prepare_mlp(token);
    });
    if (is_parallel) {
      const Run::Product both[] = {make_qkv, make_up};
      run.multiply(both, 2);
    } else {
      run.multiply(&make_qkv, 1);
    }
    attend(run, cache, attend_out, [&](int token) {
      if (output_is_ready) clear_padding(output_x, token);
      if (down_is_ready) clear_padding(down_x, token);
    });
    if (!output_is_ready)
      run.prepare_rows([&](int token) {
        kernels.prepare(row_of(attended, query_width, token), layer.output.order, output_x, token);
      });
    if (is_parallel) {
      if (!down_is_ready) run.prepare_rows(prepare_down);
      return run.multiply_and_add(add_down, add_output);
    }
    run.multiply(&add_output, 1);
    run.prepare_rows([&](int token) {
      run.normalise(layer.mlp_norm, row_of(stream, width, token), normed);
      prepare_mlp(token);
    });
    run.multiply(&make_up, 1);
    if (!down_is_ready) run.prepare_rows(prepare_down);
    run.multiply(&add_down, 1);
  }

  // Keys and values into the cache, and attention. `clear(token)` is called once for every token on the way.
  template <class Clear>
  void attend(const Run& run, const Cache& cache, const Output& out, const Clear& clear) const {
    const std::vector<AttentionTask>& tasks = run.workspace.tasks;
    // A task that is whole reads no other's keys: it can store its own, and nobody waits for all of them.
    const bool stores_in_task = run.repeats && task_is_whole;
    if (!stores_in_task)
      run.share_rows([&](int token) {
        store(token, cache, 0, spec.num_kv_heads);
        clear(token);
      });
    run.team.share(static_cast<int>(tasks.size()), [&](int number) {
      const AttentionTask& task = tasks[number];
      if (stores_in_task)
        for (int token = step.batch.query_starts[task.row]; token < step.batch.query_starts[task.row + 1]; ++token) {
          store(token, cache, task.kv_head, task.kv_head + 1);
          if (task.kv_head == 0) clear(token);
        }
      kernels.attend(task, qkv, qkv_width, shape, cache, step.batch, out.data, out.stride, out.is_bf16,
                     run.workspace.scratch[run.thread].get<uint8_t>(1));
    });
  }
};

void Decoder::reserve(std::vector<Input>& inputs, const Matrix& w, int num_rows) {
  const size_t count = num_rows <= kRowsOfEveryThread ? inputs.size() : 1;
  for (size_t i = 0; i < count; ++i) inputs[i].get(w, num_rows, kernels_);
}

void Decoder::reserve_head(int num_rows) {
  reserve(workspace_->head_inputs, spec_.head, num_rows);
  for (Buffer& scratch : workspace_->scratch)
    scratch.get<uint8_t>(kernels_.matmul_scratch_bytes(spec_.head, num_rows));
  for (Buffer& row : workspace_->normed) row.get<float>(spec_.hidden_size);
}

void Decoder::forward(const Step& step, float* hidden) {
  if (step.batch.num_tokens == 0) return;
  const Pass pass(*this, step);
  team_.run([&](int thread) {
    const Run run(*this, thread, pass.num_tokens);
    pass.run_layers(run);
    run.share_rows([&](int token) {
      run.normalise(spec_.final_norm, Pass::row_of(pass.stream, pass.width, token),
                    Pass::row_of(hidden, pass.width, token));
    });
  });
}

void Decoder::choose_next(const Step& step, const int32_t* tokens, int num_chosen, int num_ahead, int32_t* ids,
                          float* logprobs, uint8_t* sound) {
  choose_once(step, tokens, num_chosen, ids, logprobs, sound);
  const Batch& batch = step.batch;
  std::vector<int32_t> next_ids(num_chosen), context_lens(batch.context_lens, batch.context_lens + batch.num_rows);
  Step next = step;
  next.ids = next_ids.data();
  next.batch.context_lens = next.batch.positions = context_lens.data();
  for (int ahead = 0; ahead < num_ahead; ++ahead) {
    for (int row = 0; row < num_chosen; ++row) {
      next_ids[row] = sound[row] ? ids[row] : 0;
      ++context_lens[row];
    }
    ids += num_chosen, logprobs += num_chosen, sound += num_chosen;
    choose_once(next, tokens, num_chosen, ids, logprobs, sound);
  }
}

void Decoder::choose_once(const Step& step, const int32_t* tokens, int num_chosen, int32_t* ids, float* logprobs,
                          uint8_t* sound) {
  if (step.batch.num_tokens == 0) return;
  reserve_head(num_chosen);
  float* const logits = workspace_->logits.get<float>(static_cast<size_t>(num_chosen) * spec_.vocab_size);
  const Pass pass(*this, step);
  team_.run([&](int thread) {
    pass.run_layers(Run(*this, thread, pass.num_tokens));
    if (num_chosen == 0) return;  // a step may run parts of prompts alone
    const Run run(*this, thread, num_chosen);
    run.multiply_by_head(
        [&](int row, float* normed) {
          run.normalise(spec_.final_norm, Pass::row_of(pass.stream, pass.width, tokens[row]), normed);
          return normed;
        },
        logits);
    run.choose(logits, spec_.vocab_size, ids, logprobs, sound);
  });
}

void Decoder::logits(const float* hidden, int num_rows, float* logits) {
  if (num_rows == 0) return;
  reserve_head(num_rows);
  team_.run([&](int thread) {
    const Run run(*this, thread, num_rows);
    run.multiply_by_head([&](int row, float*) { return hidden + static_cast<int64_t>(row) * spec_.hidden_size; },
                         logits);
  });
}

void Decoder::choose_greedy(const float* logits, int num_rows, int width, int32_t* ids, float* logprobs,
                            uint8_t* sound) {
  team_.run([&](int thread) { Run(*this, thread, num_rows).choose(logits, width, ids, logprobs, sound); });
}

}  // namespace gyrfalcon
