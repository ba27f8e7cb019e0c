// The C interface: every operation of specdec.kernels.interface on plain pointers, fp32 activations.
//
// A call splits its work among `threads` OpenMP threads in a way that changes no result. Arrays are dense and
// row-major unless a stride is given (in elements).
#include <omp.h>

#include <numeric>

#include "attention.h"

using namespace specdec;

namespace {

// Rows [begin, end) of `total` on each thread; one thread where the work is too small to share.
template <class F>
void parallel_rows(int64_t total, int64_t work, int threads, F body) {
  if (threads == 1 || work < 1 << 15) {
    body(0, total);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Range r = share(total, omp_get_thread_num(), omp_get_num_threads());
    body(r.begin, r.end);
  }
}

// Experts in ascending order with the rows that chose them.
struct Assignments {
  std::vector<int64_t> rows, slots;     // by expert, then by row; slot is the index into a row's choices
  std::vector<int64_t> starts, active;  // of each active expert, and the experts themselves

  Assignments(const int64_t* ids, int64_t num_rows, int64_t k, int64_t num_experts) {
    std::vector<int64_t> counts(num_experts + 1, 0);
    for (int64_t i = 0; i < num_rows * k; ++i) ++counts[ids[i] + 1];
    for (int64_t e = 0; e < num_experts; ++e)
      if (counts[e + 1] > 0) active.push_back(e);
    std::partial_sum(counts.begin(), counts.end(), counts.begin());
    for (int64_t e : active) starts.push_back(counts[e]);
    starts.push_back(num_rows * k);
    rows.resize(num_rows * k);
    slots.resize(num_rows * k);
    for (int64_t r = 0; r < num_rows; ++r)
      for (int64_t j = 0; j < k; ++j) {
        int64_t at = counts[ids[r * k + j]]++;
        rows[at] = r;
        slots[at] = r * k + j;
      }
  }

  int64_t count(size_t a) const { return starts[a + 1] - starts[a]; }
};

int64_t packed_size(int64_t out, int64_t in) { return num_blocks(out) * in * LANES; }
int64_t bytes(int32_t dtype) { return dtype == BF16 ? 2 : 4; }

// One matrix per active expert over its own rows; work is shared as (expert, output block) pairs.
void expert_gemm(const Assignments& a, const void* packed, int32_t dtype, int64_t in, int64_t out, const float* x, float* y,
                 int64_t ldy, int thread, int num_threads) {
  const int64_t blocks = num_blocks(out);
  Range r = share(int64_t(a.active.size()) * blocks, thread, num_threads);
  for (int64_t at = r.begin; at < r.end;) {
    const size_t i = size_t(at / blocks);
    const int64_t b0 = at % blocks, b1 = std::min(blocks, b0 + (r.end - at));
    const char* w = static_cast<const char*>(packed) + a.active[i] * packed_size(out, in) * bytes(dtype);
    gemm(w, dtype, in, x + a.starts[i] * in, in, y + a.starts[i] * ldy, ldy, a.count(i), b0, b1);
    at += b1 - b0;
  }
}

}  // namespace

extern "C" {

// weight [out, in] -> packed, zeroed by the caller, of the same dtype
void sd_pack(const void* weight, int32_t dtype, int64_t out, int64_t in, void* packed) {
  if (dtype == BF16) {
    pack_rows(static_cast<const bf16*>(weight), out, in, static_cast<bf16*>(packed));
  } else {
    pack_rows(static_cast<const float*>(weight), out, in, static_cast<float*>(packed));
  }
}

// x [rows, in] -> y [rows, ldy], ldy at least `out` rounded up to 16
void sd_linear(const void* packed, int32_t dtype, const float* bias, int64_t out, int64_t in, const float* x, int64_t rows,
               float* y, int64_t ldy, int threads) {
  Linear l{packed, bias, out, in, dtype};
#pragma omp parallel num_threads(threads) if (threads > 1 && out * in >= 1 << 14)
  linear(l, x, in, y, ldy, rows, omp_get_thread_num(), omp_get_num_threads());
}

void sd_rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* y, int threads) {
  parallel_rows(rows, rows * size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) rms_norm(x + r * size, weight, eps, size, y + r * size);
  });
}

// total = x + residual, y = norm(total)
void sd_add_rms_norm(const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t size,
                     float* y, float* total, int threads) {
  parallel_rows(rows, rows * size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      add_rows(x + r * size, residual + r * size, size, total + r * size);
      rms_norm(total + r * size, weight, eps, size, y + r * size);
    }
  });
}

// in place; x [rows, heads, dim] with row stride `stride`
void sd_rope(float* x, int64_t rows, int64_t heads, int64_t dim, int64_t stride, const int64_t* positions,
             const float* cos_sin, int64_t rotary, int threads) {
  parallel_rows(rows, rows * heads * dim, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t h = 0; h < heads; ++h) rotate(x + r * stride + h * dim, cos_sin + positions[r] * rotary, rotary);
  });
}

// gate_up [rows, 2 * size] -> y [rows, size]
void sd_silu_and_mul(const float* gate_up, int64_t rows, int64_t size, float* y, int threads) {
  parallel_rows(rows, rows * size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* g = gate_up + r * 2 * size;
      silu_and_mul(g, g + size, size, y + r * size);
    }
  });
}

void sd_route(const float* logits, const float* bias, int64_t rows, int64_t num_experts, int64_t top_k, int64_t n_group,
              int64_t topk_group, int32_t norm_topk_prob, float scaling, int64_t* ids, float* weights, int threads) {
  Routing routing{num_experts, top_k, n_group, topk_group, norm_topk_prob, scaling};
  parallel_rows(rows, rows * num_experts, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * num_experts);
    for (int64_t r = begin; r < end; ++r)
      route(routing, logits + r * num_experts, bias, ids + r * top_k, weights + r * top_k, scratch.data());
  });
}

// x [rows, hidden], ids and weights [rows, k], packed gate_up [E, 2 * width, hidden] and down [E, hidden, width] -> y
void sd_moe(const float* x, const int64_t* ids, const float* weights, int64_t rows, int64_t k, int64_t num_experts,
            int64_t hidden, int64_t width, const void* gate_up, const void* down, int32_t dtype, float* y, int threads) {
  const Assignments a(ids, rows, k, num_experts);
  const int64_t n = rows * k;
  const int64_t ld_inner = num_blocks(2 * width) * LANES, ld_out = num_blocks(hidden) * LANES;
  std::vector<float> gathered(n * hidden), both(n * ld_inner), inner(n * width), routed(n * ld_out);
  std::vector<int64_t> place(n);  // where a row's j-th choice went
  for (int64_t i = 0; i < n; ++i) place[a.slots[i]] = i;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    Range mine = share(n, thread, count);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      std::memcpy(gathered.data() + i * hidden, x + a.rows[i] * hidden, sizeof(float) * hidden);
#pragma omp barrier
    expert_gemm(a, gate_up, dtype, hidden, 2 * width, gathered.data(), both.data(), ld_inner, thread, count);
#pragma omp barrier
    for (int64_t i = mine.begin; i < mine.end; ++i)
      silu_and_mul(both.data() + i * ld_inner, both.data() + i * ld_inner + width, width, inner.data() + i * width);
#pragma omp barrier
    expert_gemm(a, down, dtype, width, hidden, inner.data(), routed.data(), ld_out, thread, count);
#pragma omp barrier
    Range out = share(rows, thread, count);
    std::vector<int64_t> order(k);
    for (int64_t r = out.begin; r < out.end; ++r) {
      std::iota(order.begin(), order.end(), 0);  // a row adds its experts in ascending id
      std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return ids[r * k + i] < ids[r * k + j]; });
      for_vectors(hidden, [&](int64_t c, int m) {
        V sum = set1(0.0f);
        for (int64_t j : order)
          sum = fma(set1(weights[r * k + j]), load_n(routed.data() + place[r * k + j] * ld_out + c, m), sum);
        store_n(y + r * hidden + c, sum, m);
      });
    }
  }
}

void sd_append(void* cache, int32_t dtype, int64_t page_size, int64_t kv_heads, int64_t dim, const float* k, const float* v,
               int64_t k_stride, int64_t v_stride, const int64_t* slots, int64_t rows) {
  const Cache c{cache, dtype, page_size, kv_heads, dim};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < kv_heads; ++h) {
      const float *kr = k + r * k_stride + h * dim, *vr = v + r * v_stride + h * dim;
      if (dtype == BF16) {
        append<bf16>(c, slots[r], h, kr, vr);
      } else {
        append<float>(c, slots[r], h, kr, vr);
      }
    }
}

void sd_attention(void* cache, int32_t dtype, int64_t page_size, int64_t kv_heads, int64_t dim, int64_t heads,
                  const float* q, int64_t q_stride, int64_t num_sequences, const int64_t* query_starts,
                  const int64_t* kv_lens, const int64_t* page_starts, const int64_t* pages, float* out, int threads) {
  const Cache c{cache, dtype, page_size, kv_heads, dim};
  const Batch b{num_sequences, query_starts, kv_lens, page_starts, pages};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    AttentionScratch scratch;
    attend(c, b, heads, q, q_stride, out, heads * dim, omp_get_thread_num(), omp_get_num_threads(), scratch);
  }
}

}  // extern "C"
