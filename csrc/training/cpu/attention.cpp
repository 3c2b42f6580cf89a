// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <queue>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace vllm_training {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMaxHeadSize = 256;
constexpr int64_t kUnlimited = int64_t{1} << 40;

// ---- Arguments ----

void check_heads(const char* name, const Tensor& tensor, const Tensor& query,
                 int64_t heads) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, query is");
  STD_TORCH_CHECK(
      tensor.scalar_type() == query.scalar_type(), name, " has the dtype ",
      torch::headeronly::toString(tensor.scalar_type()), ", query has ",
      torch::headeronly::toString(query.scalar_type()),
      "; all of attention's tensors must have the same");
  STD_TORCH_CHECK(tensor.dim() == 3, name, " has ", tensor.dim(),
                  " dimensions; it must be [num_tokens, heads, head_size]");
  STD_TORCH_CHECK(tensor.size(0) == query.size(0) && tensor.size(1) == heads &&
                      tensor.size(2) == query.size(2),
                  name, " is [", tensor.size(0), ", ", tensor.size(1), ", ",
                  tensor.size(2), "]; it must be [", query.size(0), ", ", heads,
                  ", ", query.size(2), "]");
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) == 1,
                  "the last dimension of ", name, " has the stride ",
                  tensor.stride(2),
                  "; it must be contiguous: call .contiguous() first");
}

void check_per_head(const char* name, const std::optional<Tensor>& tensor,
                    int64_t heads) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->is_cpu(), name, " is not on the CPU, query is");
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == heads, name, " has ",
                  tensor->numel(), " elements in ", tensor->dim(),
                  " dimensions; it must be [num_heads] = [", heads, "]");
}

void check_cu_seqlens(const Tensor& cu_seqlens, int64_t num_tokens) {
  STD_TORCH_CHECK(cu_seqlens.is_cpu(),
                  "cu_seqlens is not on the CPU, query is");
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int,
                  "cu_seqlens has the dtype ",
                  torch::headeronly::toString(cu_seqlens.scalar_type()),
                  "; it must be int32");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0,
                  "cu_seqlens has ", cu_seqlens.numel(), " elements in ",
                  cu_seqlens.dim(),
                  " dimensions; it must be [num_sequences + 1]");
  const int32_t* data =
      static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t last = cu_seqlens.size(0) - 1;
  int32_t previous = 0;
  for (int64_t i = 0; i <= last; ++i) {
    const int32_t value = data[i * cu_seqlens.stride(0)];
    const bool right = value >= previous && (i > 0 || value == 0) &&
                       (i < last || value == num_tokens);
    STD_TORCH_CHECK(right,
                    "cu_seqlens must start at 0, never decrease and end at ",
                    num_tokens, "; element ", i, " of ", last + 1, " is ",
                    value, i > 0 ? ", the one before " : "",
                    i > 0 ? std::to_string(previous) : "");
    previous = value;
  }
}

AttentionInput input_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

struct Options {
  double scale;
  bool causal;
  int64_t window;
  double soft_cap;
};

// What the forward and the backward have in common; value is null for the
// log-sum-exp.
AttentionArguments checked_arguments(const Tensor& query, const Tensor& key,
                                     const Tensor* value,
                                     const Tensor& cu_seqlens,
                                     const std::optional<Tensor>& sinks,
                                     const std::optional<Tensor>& alibi_slopes,
                                     const Options& options) {
  STD_TORCH_CHECK(query.dim() == 3, "query has ", query.dim(),
                  " dimensions; it must be [num_tokens, num_heads, head_size]");
  STD_TORCH_CHECK(
      key.dim() == 3, "key has ", key.dim(),
      " dimensions; it must be [num_tokens, num_kv_heads, head_size]");
  const int64_t heads = query.size(1), kv_heads = key.size(1);
  STD_TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
                  "query has ", heads, " heads and key ", kv_heads,
                  "; there must be some, and the number for query a multiple "
                  "of that for key");
  STD_TORCH_CHECK(query.size(2) >= 1 && query.size(2) <= kMaxHeadSize,
                  "the head size is ", query.size(2), "; it must be 1 to ",
                  kMaxHeadSize);
  check_heads("query", query, query, heads);
  check_heads("key", key, query, kv_heads);
  if (value) check_heads("value", *value, query, kv_heads);
  check_per_head("sinks", sinks, heads);
  check_per_head("alibi_slopes", alibi_slopes, heads);
  STD_TORCH_CHECK(options.window >= 0, "window is ", options.window,
                  "; it must be positive, or 0 for none");
  STD_TORCH_CHECK(options.soft_cap >= 0, "soft_cap is ", options.soft_cap,
                  "; it must be positive, or 0 for none");
  check_cu_seqlens(cu_seqlens, query.size(0));

  AttentionArguments a{};
  a.dtype = dtype_of(query);
  a.num_tokens = query.size(0);
  a.num_heads = heads;
  a.num_kv_heads = kv_heads;
  a.head_size = query.size(2);
  a.query = input_of(query);
  a.key = input_of(key);
  if (value) a.value = input_of(*value);
  a.scale = static_cast<float>(options.scale);
  const int64_t reach = options.window > 0
                            ? std::min(options.window - 1, kUnlimited)
                            : kUnlimited;
  a.band = {options.causal ? 0 : -reach, reach};
  a.soft_cap = static_cast<float>(options.soft_cap);
  return a;
}

// A vector of heads in fp32, which lives as long as the kernels run.
std::optional<Tensor> as_float(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(
      torch::stable::to(*tensor, ScalarType::Float));
}

const float* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// ---- Units of work ----

// A block and about how many scores it has.
struct Work {
  AttentionBlock block;
  double cost;
};

// The number of positions across the band from those of a tile, a little more
// at the edges.
double scores_of(Band band, int64_t start, int64_t end, int64_t length) {
  const int64_t first = std::max<int64_t>(0, start - band.high);
  const int64_t last = std::min(length, end - band.low);
  return static_cast<double>(end - start) * static_cast<double>(last - first);
}

// Tiles of all sequences, or whole sequences, the most expensive first. Seen
// from keys, the band is the other way round.
std::vector<Work> split(const Tensor& cu_seqlens, Band band, bool whole) {
  const int32_t* data =
      static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t stride = cu_seqlens.stride(0);
  std::vector<Work> works;
  for (int64_t i = 0; i + 1 < cu_seqlens.size(0); ++i) {
    const int64_t begin = data[i * stride],
                  length = data[(i + 1) * stride] - begin;
    for (int64_t start = 0; start < length; start += kTile) {
      const int64_t end = std::min(start + kTile, length);
      const double cost = scores_of(band, start, end, length);
      if (whole && start > 0) {
        works.back().cost += cost;
      } else {
        works.push_back({{begin, length, start}, cost});
      }
    }
  }
  std::stable_sort(
      works.begin(), works.end(),
      [](const Work& a, const Work& b) { return a.cost > b.cost; });
  return works;
}

// The time of the longest of `threads` that take works, each once for each
// head, one after another as they get free.
double makespan(const std::vector<Work>& works, int64_t heads,
                int64_t threads) {
  std::priority_queue<double, std::vector<double>, std::greater<double>> busy;
  for (int64_t i = 0; i < threads; ++i) busy.push(0);
  double latest = 0;
  for (const Work& work : works) {
    for (int64_t head = 0; head < heads; ++head) {
      const double end = busy.top() + work.cost;
      busy.pop();
      busy.push(end);
      latest = std::max(latest, end);
    }
  }
  return latest;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Runs a kernel over works and heads; a thread takes the next unit when it is
// free.
void run(Kernel<AttentionArguments> kernel, const AttentionArguments& arguments,
         const std::vector<Work>& works, int64_t heads, int64_t workspace) {
  std::vector<AttentionBlock> blocks;
  double cost = 0;
  for (const Work& work : works) {
    blocks.push_back(work.block);
    cost += work.cost;
  }
  // Less than 16k scores' work is not worth a thread.
  const int64_t units = static_cast<int64_t>(blocks.size()) * heads;
  const int64_t worth = static_cast<int64_t>(cost * heads / 16384) + 1;
  const int64_t threads =
      std::min({units, worth, int64_t{torch::stable::get_num_threads()}});
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    constexpr size_t kLine = 64;
    const size_t bytes =
        (workspace * sizeof(float) + kLine - 1) / kLine * kLine;
    std::unique_ptr<float, Free> memory(
        static_cast<float*>(std::aligned_alloc(kLine, bytes)));
    if (!memory) {
      out_of_memory = true;
      return;
    }
    AttentionArguments mine = arguments;
    mine.blocks = blocks.data();
    mine.workspace = memory.get();
    for (int64_t unit = next++; unit < units; unit = next++) {
      kernel(mine, unit, unit + 1);
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "attention could not allocate ",
                  workspace * sizeof(float), " bytes for a thread");
}

// ---- Ops ----

Tensor forward(AttentionArguments a, Tensor* output, const Tensor& query,
               const Tensor& cu_seqlens, const std::optional<Tensor>& sinks,
               const std::optional<Tensor>& alibi_slopes) {
  const std::optional<Tensor> sink_values = as_float(sinks);
  const std::optional<Tensor> slopes = as_float(alibi_slopes);
  Tensor lse = torch::stable::new_empty(query, {a.num_heads, a.num_tokens},
                                        ScalarType::Float);
  a.sinks = data_of(sink_values);
  a.alibi_slopes = data_of(slopes);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (output) a.output = output->mutable_data_ptr();
  run(kernels().attention_forward, a, split(cu_seqlens, a.band, false),
      a.num_heads, kernels().attention_forward_workspace(a.head_size));
  return lse;
}

std::tuple<Tensor, Tensor> cpu_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& cu_seqlens, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, double scale, bool causal,
    int64_t window, double soft_cap) {
  const AttentionArguments a =
      checked_arguments(query, key, &value, cu_seqlens, sinks, alibi_slopes,
                        {scale, causal, window, soft_cap});
  Tensor output =
      torch::stable::new_empty(query, {a.num_tokens, a.num_heads, a.head_size});
  Tensor lse = forward(a, &output, query, cu_seqlens, sinks, alibi_slopes);
  return {output, lse};
}

Tensor cpu_attention_lse(const Tensor& query, const Tensor& key,
                         const Tensor& cu_seqlens,
                         const std::optional<Tensor>& sinks,
                         const std::optional<Tensor>& alibi_slopes,
                         double scale, bool causal, int64_t window,
                         double soft_cap) {
  const AttentionArguments a =
      checked_arguments(query, key, nullptr, cu_seqlens, sinks, alibi_slopes,
                        {scale, causal, window, soft_cap});
  return forward(a, nullptr, query, cu_seqlens, sinks, alibi_slopes);
}

std::tuple<Tensor, Tensor, Tensor> cpu_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& output, const Tensor& lse,
    const Tensor& cu_seqlens, const std::optional<Tensor>& alibi_slopes,
    double scale, bool causal, int64_t window, double soft_cap) {
  // Sinks are in lse.
  AttentionArguments a =
      checked_arguments(query, key, &value, cu_seqlens, std::nullopt,
                        alibi_slopes, {scale, causal, window, soft_cap});
  check_heads("grad_output", grad_output, query, a.num_heads);
  check_heads("output", output, query, a.num_heads);
  STD_TORCH_CHECK(
      lse.is_cpu() && lse.scalar_type() == ScalarType::Float &&
          lse.dim() == 2 && lse.size(0) == a.num_heads &&
          lse.size(1) == a.num_tokens && lse.is_contiguous(),
      "lse must be that of the forward: contiguous fp32 [num_heads, "
      "num_tokens] = [",
      a.num_heads, ", ", a.num_tokens, "] on the CPU");
  auto empty = [&](int64_t heads) {
    return torch::stable::new_empty(query, {a.num_tokens, heads, a.head_size});
  };
  Tensor grad_query = empty(a.num_heads);
  Tensor grad_key = empty(a.num_kv_heads), grad_value = empty(a.num_kv_heads);
  const std::optional<Tensor> slopes = as_float(alibi_slopes);
  a.alibi_slopes = data_of(slopes);
  a.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  a.grad_output = input_of(grad_output);
  a.saved_output = input_of(output);
  a.grad_query = grad_query.mutable_data_ptr();
  a.grad_key = grad_key.mutable_data_ptr();
  a.grad_value = grad_value.mutable_data_ptr();

  // By sequence, a tile of scores takes 5 matrix products, but there may be too
  // few sequences and heads for the threads. By queries and by keys it takes 3
  // and 4, in small units of work. The gradients' bits are the same.
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<Work> whole = split(cu_seqlens, a.band, true);
  double total = 0;
  int64_t longest = 0;
  for (const Work& work : whole) {
    total += work.cost * a.num_kv_heads;
    longest = std::max(longest, work.block.length);
  }
  const auto workspace = kernels().attention_backward_workspace;
  if (5 * makespan(whole, a.num_kv_heads, threads) <= 7 * total / threads) {
    run(kernels().attention_backward_by_sequence, a, whole, a.num_kv_heads,
        workspace(a.head_size, longest));
  } else {
    run(kernels().attention_backward_by_queries, a,
        split(cu_seqlens, a.band, false), a.num_heads,
        workspace(a.head_size, 0));
    const Band from_keys = {-a.band.high, -a.band.low};
    run(kernels().attention_backward_by_keys, a,
        split(cu_seqlens, from_keys, false), a.num_kv_heads,
        workspace(a.head_size, kTile));
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_training, library) {
  library.def(
      "cpu_attention_forward(Tensor query, Tensor key, Tensor value, "
      "Tensor cu_seqlens, Tensor? sinks, Tensor? alibi_slopes, float scale, "
      "bool causal, int window, float soft_cap) -> (Tensor output, Tensor "
      "lse)");
  library.def(
      "cpu_attention_lse(Tensor query, Tensor key, Tensor cu_seqlens, Tensor? "
      "sinks, "
      "Tensor? alibi_slopes, float scale, bool causal, int window, float "
      "soft_cap) "
      "-> Tensor lse");
  library.def(
      "cpu_attention_backward(Tensor grad_output, Tensor query, Tensor key, "
      "Tensor value, Tensor output, Tensor lse, Tensor cu_seqlens, "
      "Tensor? alibi_slopes, float scale, bool causal, int window, float "
      "soft_cap) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_training, CPU, library) {
  library.impl("cpu_attention_forward", TORCH_BOX(&cpu_attention_forward));
  library.impl("cpu_attention_lse", TORCH_BOX(&cpu_attention_lse));
  library.impl("cpu_attention_backward", TORCH_BOX(&cpu_attention_backward));
}

}  // namespace vllm_training
