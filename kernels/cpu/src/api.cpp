// The C interface: specdec.kernels.backend and specdec.kernels.operations on plain pointers, fp32 activations.
//
// A call splits its work among `threads` OpenMP threads in a way that changes no result. Arrays are dense and
// row-major unless a stride is given (in elements).
#include <functional>

#include "decoder.h"
#include "verify.h"

using namespace specdec;

extern "C" {

// A table per struct that callers fill in, see layout.h; null ends them.
const LayoutEntry* const* sd_layout() {
  static const LayoutEntry* const tables[] = {
      Layout<Matrix>::table, Layout<MLP>::table, Layout<Routing>::table, Layout<Cache>::table, Layout<Batch>::table,
      Layout<Layer>::table, Layout<Decoder>::table, Layout<Forward>::table, Layout<Sampling>::table, Layout<Edits>::table,
      Layout<DraftSampling>::table, Layout<Chain>::table, Layout<Verification>::table, Layout<Residuals>::table, nullptr};
  return tables;
}

// weight [out, in] -> packed, zeroed by the caller, of the same dtype
void sd_pack(const void* weight, int32_t dtype, int64_t out, int64_t in, void* packed) {
  switch (dtype) {
    case FP32: return pack_rows(static_cast<const float*>(weight), out, in, static_cast<float*>(packed));
    case BF16: return pack_rows(static_cast<const bf16*>(weight), out, in, static_cast<bf16*>(packed));
    case INT8: return pack_rows(static_cast<const int8*>(weight), out, in, static_cast<int8*>(packed));
  }
}

// x [rows, in] -> y [rows, ldy], ldy at least `out` rounded up to 16
void sd_linear(const Matrix* m, const float* x, int64_t rows, float* y, int64_t ldy, int32_t threads) {
  parallel(threads, m->out * m->in, [&](const Team& team) { linear(*m, {x, m->in, nullptr, rows}, y, ldy, team); });
}

void sd_rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* y, int32_t threads) {
  parallel_rows(rows, rows * size, threads, [&](int64_t r) { rms_norm(x + r * size, weight, eps, size, y + r * size); });
}

// total = x + residual, y = norm(total)
void sd_add_rms_norm(const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t size,
                     float* y, float* total, int32_t threads) {
  parallel_rows(rows, rows * size, threads, [&](int64_t r) {
    add_rows(x + r * size, residual + r * size, size, total + r * size);
    rms_norm(total + r * size, weight, eps, size, y + r * size);
  });
}

// in place; x [rows, heads, dim] with row stride `stride`
void sd_rope(float* x, int64_t rows, int64_t heads, int64_t dim, int64_t stride, const int64_t* positions,
             const float* cos_sin, int64_t rotary, int32_t threads) {
  parallel_rows(rows, rows * heads * dim, threads, [&](int64_t r) {
    for (int64_t h = 0; h < heads; ++h) rotate(x + r * stride + h * dim, cos_sin + positions[r] * rotary, rotary);
  });
}

// gate_up [rows, 2 * size] -> y [rows, size]
void sd_silu_and_mul(const float* gate_up, int64_t rows, int64_t size, float* y, int32_t threads) {
  parallel_rows(rows, rows * size, threads, [&](int64_t r) {
    silu_and_mul(gate_up + r * 2 * size, gate_up + r * 2 * size + size, size, y + r * size);
  });
}

void sd_route(const float* logits, const float* bias, int64_t rows, const Routing* routing, int64_t* ids, float* weights,
              int32_t threads) {
  parallel_rows(rows, rows * routing->num_experts, threads, [&](int64_t r) {
    static thread_local RouteScratch scratch;
    route(*routing, logits + r * routing->num_experts, bias, ids + r * routing->top_k, weights + r * routing->top_k, scratch);
  });
}

// x [rows, hidden] -> y [rows, padded hidden]
void sd_mlp(const MLP* mlp, const float* x, int64_t rows, float* y, int32_t threads) {
  std::vector<float> both(rows * 2 * mlp->width()), inner(rows * mlp->width());
  MLPMemory memory{both.data(), inner.data(), y, padded(mlp->down.out)};
  const MLPWork work{{memory.place(*mlp, {x, mlp->gate_up.in, nullptr, rows})}};
  parallel(threads, mlp->gate_up.out * mlp->gate_up.in, [&](const Team& team) {
    work.inner(team);
    team.barrier();
    work.out(team);
  });
}

// x [rows, hidden], ids and weights [rows, k] -> y [rows, hidden]
void sd_moe(const MLP* experts, int64_t num_experts, const float* x, const int64_t* ids, const float* weights, int64_t rows,
            int64_t k, float* y, int32_t threads) {
  const int64_t hidden = experts->down.out, ld_out = padded(hidden);
  std::vector<float> both(rows * k * 2 * experts->width()), inner(rows * k * experts->width()), out(rows * k * ld_out);
  Assignments assignments;
  assignments.assign(ids, rows, k, num_experts);
  MLPMemory memory{both.data(), inner.data(), out.data(), ld_out};
  MLPWork work;
  add_experts(*experts, assignments, x, hidden, memory, work);
  parallel(threads, rows * k * hidden, [&](const Team& team) {
    work.inner(team);
    team.barrier();
    work.out(team);
    team.barrier();
    const Range mine = team.share(rows);
    std::vector<int64_t> order;
    for (int64_t r = mine.begin; r < mine.end; ++r)
      combine(ids + r * k, weights + r * k, assignments.places.data() + r * k, k, out.data(), ld_out, hidden, order,
              y + r * hidden);
  });
}

void sd_append(const Cache* cache, const float* k, const float* v, int64_t k_stride, int64_t v_stride, const int64_t* slots,
               int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < cache->kv_heads; ++h)
      append(*cache, slots[r], h, k + r * k_stride + h * cache->head_dim, v + r * v_stride + h * cache->head_dim);
}

// q [rows, heads, dim] with row stride q_stride -> out [rows, heads, dim]
void sd_attention(const Cache* cache, const Batch* batch, int64_t heads, const float* q, int64_t q_stride, float* out,
                  int32_t threads) {
  parallel(threads, LEAST_SHARED_WORK,
           [&](const Team& team) { attend(*cache, *batch, heads, q, q_stride, out, heads * cache->head_dim, team); });
}

void sd_decode(const Decoder* decoder, const Forward* forward, int32_t threads) { decode(*decoder, *forward, threads); }

// See specdec.kernels.backend.Backend.draft_chain
void sd_draft_chain(const Decoder* decoder, const Matrix* head, const Chain* chain, int32_t threads) {
  draft_chain(*decoder, *head, *chain, threads);
}

// x [rows, in] -> the best output's id per row, -1 where one is not finite
void sd_head_argmax(const Matrix* head, const float* x, int64_t rows, int64_t* ids, int32_t threads) {
  head_argmax(*head, {x, head->in, nullptr, rows}, ids, threads);
}

// See specdec.kernels.backend.Backend.verify
void sd_verify(const Decoder* decoder, const Matrix* head, const Forward* forward, const Verification* verification,
               int32_t threads) {
  verify(*decoder, *head, *forward, *verification, threads);
}

// logits [rows, size], in place; edits [rows], the drafts of row r from starts[r] to starts[r + 1]
void sd_edit(float* logits, const Edits* edits, const int64_t* starts, const int64_t* drafts, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; ++r) edits[r].run(drafts + starts[r], starts[r + 1] - starts[r], logits + r * size);
}

// logits [rows, size], in place; rows as many as `sampling` has
void sd_truncate(float* logits, const Sampling* sampling, int64_t size, int32_t threads) {
  parallel_rows(sampling->rows, sampling->rows * size, threads, [&](int64_t r) {
    static thread_local Truncation truncation;
    truncation.run(logits + r * size, size, sampling->scale(r), sampling->top_k(r), sampling->top_p(r), sampling->min_p(r));
  });
}

// logits [rows, size] -> ids [rows], -1 for a row of NaN
void sd_choose(const float* logits, const Sampling* sampling, int64_t size, int64_t* ids, int32_t threads) {
  parallel_rows(sampling->rows, sampling->rows * size, threads, [&](int64_t r) {
    static thread_local Choice choice;
    ids[r] = choice.run(logits + r * size, size, sampling->scale(r), sampling->greedy(r), sampling->key(r, 0));
  });
}

// logits [rows, size], scales [rows] -> probabilities
void sd_softmax(const float* logits, const double* scales, int64_t rows, int64_t size, float* probs, int32_t threads) {
  parallel_rows(rows, rows * size, threads,
                [&](int64_t r) { softmax(logits + r * size, float(scales[r]), size, probs + r * size); });
}

void sd_residual_mass(const Residuals* laws, double* masses, int32_t threads) {
  parallel_rows(laws->num, laws->num * laws->size, threads, [&](int64_t i) {
    static thread_local std::vector<double> sums;
    masses[i] = laws->law(i).mass(sums);
  });
}

// uniforms [num] -> ids [num], -1 where a law's sum is not finite
void sd_sample_residual(const Residuals* laws, const double* uniforms, int64_t* ids, int32_t threads) {
  parallel_rows(laws->num, laws->num * laws->size, threads, [&](int64_t i) {
    static thread_local std::vector<double> sums;
    ids[i] = sample(laws->law(i), laws->p_row(i), laws->size, uniforms[i], sums);
  });
}

// positions and starts: [num] each
void sd_uniforms(const uint64_t* seeds, int64_t stream, const int64_t* positions, const int64_t* starts, int64_t num,
                 double* uniforms) {
  for (int64_t i = 0; i < num; ++i)
    uniforms[i] = uniform({seeds[i], uint32_t(positions[i]), uint32_t(starts[i]), uint32_t(stream)});
}

// Reads `size` 64-bit words; their exclusive or goes to `result`, or the compiler would leave the reading out.
void sd_read(const uint64_t* words, int64_t size, uint64_t* result, int32_t threads) {
  std::vector<uint64_t> sums(threads);
  parallel(threads, size, [&](const Team& team) {
    const Range mine = team.share(size);
    uint64_t sum = 0;
    for (int64_t i = mine.begin; i < mine.end; ++i) sum ^= words[i];
    sums[team.thread] = sum;
  });
  *result = std::accumulate(sums.begin(), sums.end(), uint64_t{0}, std::bit_xor<uint64_t>());
}

}  // extern "C"
