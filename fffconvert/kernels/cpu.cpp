// A fast feedforward layer on a CPU, forward and backward. reference.py defines what is computed.
//
// Everything is built of two loops: `dots` (a few tokens against a few neurons, both read along d_model)
// and `combine` (rows summed with coefficients). Forward, a leaf is dots -> activation -> combine. Backward
// with respect to x it is the same with input and output weights exchanged; the weights' gradients are
// `combine` over the leaf's tokens. Tokens are sorted by leaf, so a leaf's weights, once in registers,
// serve several tokens. The trunk is a tree of depth 0, and the nodes that emit are further neurons of
// every leaf below them.
//
// Each token is summed in the same order however many come with it: its output does not depend on its
// company. Comparisons keep their IEEE meaning (never build with -ffast-math): NaN goes left.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/dlpack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using bf16 = uint16_t;  // bits only; arithmetic is float32

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HVec __attribute__((vector_size(LANES * 2)));

constexpr int64_t LINE = 16;    // floats in a line of the cache
constexpr int64_t BLOCK = 32;   // neurons taken at once: their weights stay in the L2 cache
constexpr int64_t ROW = 2 * BLOCK;  // of a token's products: those of a block of neurons, then their gates'
constexpr int64_t TOKENS = 64;  // tokens taken at once by the weights' gradients
constexpr int64_t SIDE = 4;     // tokens routed in turn, so that none waits for its score
constexpr int64_t WORTH_A_THREAD = 1 << 19;  // multiplications below which waking a thread costs more

using Full = std::integral_constant<int64_t, LANES>;

// The first n lanes; the others are 0 and nothing past them is read.
template <class N>
inline Vec load(const float* p, N n) {
  Vec v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

template <class N>
inline Vec load(const bf16* p, N n) {
  HVec h = {};
  std::memcpy(&h, p, n * sizeof(bf16));
  return (Vec)(__builtin_convertvector(h, IVec) << 16);
}

template <class N>
inline void store(float* p, Vec v, N n) {
  std::memcpy(p, &v, n * sizeof(float));
}

inline Vec all(float f) { return f - Vec{}; }

// a * b + c. Asked for by name: left to itself, GCC splits some of them when it tunes for AMD.
inline Vec fma(Vec a, Vec b, Vec c) {
#if __has_builtin(__builtin_elementwise_fma)
  return __builtin_elementwise_fma(a, b, c);
#elif defined(__AVX512F__)
  return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
#elif defined(__AVX__) && defined(__FMA__)
  return __builtin_ia32_vfmaddps256(a, b, c);
#else
  return a * b + c;
#endif
}

inline float scalar(float v) { return v; }
inline float scalar(bf16 v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

// As PyTorch rounds: to the nearest, of two to the even one.
inline bf16 rounded(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(v));
  return v != v ? bf16(0x7fc0) : bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The lanes of a vector added up to four.
inline Quad quad(Vec v) {
  Quad part[LANES / 4];
  std::memcpy(part, &v, sizeof(v));
  for (int half = LANES / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

inline float total(Vec v) {
  Quad q = quad(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sums of four vectors' lanes, in the order that `total` has.
inline void totals(const Vec* v, float* to) {
#if __has_builtin(__builtin_shufflevector)
  Quad q[4];
  for (int i = 0; i < 4; ++i) q[i] = quad(v[i]);
  Quad ab = __builtin_shufflevector(q[0], q[1], 0, 1, 4, 5) + __builtin_shufflevector(q[0], q[1], 2, 3, 6, 7);
  Quad cd = __builtin_shufflevector(q[2], q[3], 0, 1, 4, 5) + __builtin_shufflevector(q[2], q[3], 2, 3, 6, 7);
  Quad all = __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
  std::memcpy(to, &all, sizeof(all));
#else
  for (int i = 0; i < 4; ++i) to[i] = total(v[i]);
#endif
}

// The start of a row that will be read soon; the processor's own prefetching follows from there.
inline void prefetch(const void* row) {
  for (int i = 0; i < 4; ++i) __builtin_prefetch(static_cast<const char*>(row) + 64 * i);
}

// Memory that is read next, brought nearer while something else is computed. Line after line, for that is what the
// processor's own prefetching follows; the loops themselves read a dozen rows at once.
struct Ahead {
  const char *line = nullptr, *end = nullptr;

  void fetch(int64_t bytes) {
    for (; bytes > 0 && line < end; bytes -= 64, line += 64) __builtin_prefetch(line, 0, 2);
  }
};

template <class E>
inline Ahead rows_ahead(const E* rows, int64_t n, int64_t d) {
  auto first = reinterpret_cast<const char*>(rows);
  return {first, first + n * d * sizeof(E)};
}

// ---- Activations: float accuracy, NaN in gives NaN out, infinities their limits.

inline Vec poly(Vec x, std::initializer_list<float> highest_first) {
  Vec y = {};
  for (float c : highest_first) y = y * x + c;
  return y;
}

inline Vec exp(Vec x) {
  Vec clipped = x < -87.3f ? all(-87.3f) : x > 88.7228f ? all(88.7228f) : x;
  Vec n = (clipped * 1.44269504f + 12582912.0f) - 12582912.0f;  // the nearest whole number
  Vec r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;    // ln 2 in two parts
  Vec y = poly(r, {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f});
  IVec half = __builtin_convertvector(n * 0.5f, IVec);  // 2^n in two steps: 2^128 is no float
  IVec rest = __builtin_convertvector(n, IVec) - half;
  y = y * (Vec)((half + 127) << 23) * (Vec)((rest + 127) << 23);
  return x > 88.7228f ? all(std::numeric_limits<float>::infinity()) : x < -87.3f ? Vec{} : y;
}

// x P(x^2) / Q(x^2), and the sign of x from `limit` on. Fitted for least relative error (below 4e-7).
inline Vec odd_ratio(Vec x, float limit, std::initializer_list<float> p, std::initializer_list<float> q) {
  Vec y = x * poly(x * x, p) / poly(x * x, q);
  return x >= limit ? all(1.0f) : x <= -limit ? all(-1.0f) : y;
}

inline Vec erf(Vec x) {
  return odd_ratio(x, 4.0f,
                   {1.98656995e-6f, 2.84470162e-4f, 3.88107527e-3f, 5.30946297e-2f, 1.93498614e-1f, 1.12837914f},
                   {3.74129189e-5f, 1.18493648e-3f, 1.52027547e-2f, 1.15329919e-1f, 5.04816252e-1f, 1.0f});
}

inline Vec tanh(Vec x) {
  return odd_ratio(x, 9.0f, {1.33528610e-8f, 2.06080048e-5f, 3.49553412e-3f, 1.33809847e-1f, 0.99999998f},
                   {7.77588404e-7f, 3.28553801e-4f, 2.58767904e-2f, 4.67143006e-1f, 1.0f});
}

// What PyTorch calls gelu, gelu(tanh), relu, silu, tanh and the identity; `of` and its derivative `at`.
struct Gelu {
  static Vec cdf(Vec x) { return 0.5f + 0.5f * erf(x * 0.70710678f); }
  static Vec of(Vec x) { return x * cdf(x); }
  static Vec at(Vec x) { return cdf(x) + x * 0.39894228f * exp(x * x * -0.5f); }
};
struct GeluTanh {
  static Vec inner(Vec x) { return tanh(0.79788456f * (x + 0.044715f * x * x * x)); }
  static Vec of(Vec x) { return 0.5f * x * (1.0f + inner(x)); }
  static Vec at(Vec x) {
    Vec t = inner(x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x);
  }
};
struct Relu {
  static Vec of(Vec x) { return x < 0.0f ? Vec{} : x; }
  static Vec at(Vec x) { return x <= 0.0f ? Vec{} : all(1.0f); }
};
struct Silu {
  static Vec gate(Vec x) { return 1.0f / (1.0f + exp(-x)); }
  static Vec of(Vec x) { return x / (1.0f + exp(-x)); }
  static Vec at(Vec x) { return gate(x) * (1.0f + x * (1.0f - gate(x))); }
};
struct Tanh {
  static Vec of(Vec x) { return tanh(x); }
  static Vec at(Vec x) { return 1.0f - tanh(x) * tanh(x); }
};
struct Identity {
  static Vec of(Vec x) { return x; }
  static Vec at(Vec x) { return all(1.0f); }
};

// Calls `f` with the activation of that number; cpu.py holds the same order.
template <class F>
void with_activation(int64_t number, F f) {
  switch (number) {
    case 0: return f(Gelu{});
    case 1: return f(GeluTanh{});
    case 2: return f(Relu{});
    case 3: return f(Silu{});
    case 4: return f(Tanh{});
    default: return f(Identity{});
  }
}

// c[i] = f(c[i], i), a vector at a time.
template <class F>
inline void each(float* c, int64_t n, F f) {  // in whole vectors: c is padded
  for (int64_t i = 0; i < n; i += LANES) store(c + i, f(load(c + i, Full{}), i), Full{});
}

// h becomes its activation.
void activate(int64_t activation, float* h, int64_t n) {
  with_activation(activation, [&](auto act) { each(h, n, [&](Vec v, int64_t) { return act.of(v); }); });
}

// h becomes its activation, and the gradient of that becomes the gradient of h.
void differentiate(int64_t activation, float* h, float* grad, int64_t n) {
  with_activation(activation, [&](auto act) {
    each(grad, n, [&](Vec g, int64_t i) { return g * act.at(load(h + i, Full{})); });
  });
  activate(activation, h, n);
}

// ---- The two loops.

// c[t * ROW + n] = a[t] . b[n]. Four tokens leave time to bring the row `next` nearer, too.
template <int T, int N, class E>
inline void dots(const float* const* a, const E* const* b, const float* next, int64_t d, float* c, Ahead& ahead) {
  Vec sum[T * N + 3] = {};
  auto add = [&](int64_t i, auto n) {
    Vec weight[N];
    for (int j = 0; j < N; ++j) weight[j] = load(b[j] + i, n);
    for (int t = 0; t < T; ++t) {
      Vec x = load(a[t] + i, n);
      for (int j = 0; j < N; ++j) sum[t * N + j] = fma(x, weight[j], sum[t * N + j]);
    }
  };
  int64_t i = 0;
  for (; i + LINE <= d; i += LINE) {
    ahead.fetch(N * LINE * sizeof(E));
    if (T == 4) __builtin_prefetch(next + i);
    for (int k = 0; k < LINE; k += LANES) add(i + k, Full{});
  }
  for (; i + LANES <= d; i += LANES) add(i, Full{});
  if (i < d) add(i, d - i);
  for (int k = 0; k < T * N; k += 4) {
    float four[4];
    totals(sum + k, four);
    for (int s = k; s < k + 4 && s < T * N; ++s) c[s / N * ROW + s % N] = four[s - k];
  }
}

// y[r] (+)= bias + sum over k of c[r * c_row + k * c_col] * rows[k], for the columns from `begin` to `end`
template <int R, class E>
[[gnu::noinline]] void combine(float* const* y, const float* c, int64_t c_row, int64_t c_col, const E* const* rows,
                    int64_t n_rows, const E* bias, bool accumulate, int64_t begin, int64_t end, Ahead ahead = {}) {
  constexpr int WIDE = R == 1 ? 8 : R == 2 ? 4 : 2;
  auto strip = [&](int64_t i, auto vectors, auto n) {
    constexpr int S = decltype(vectors)::value;
    Vec sum[R][S];
    ahead.fetch(n_rows * S * LANES * sizeof(E));
    for (int s = 0; s < S; ++s) {
      Vec start = bias ? load(bias + i + s * LANES, n) : Vec{};
      for (int r = 0; r < R; ++r) sum[r][s] = accumulate ? load(y[r] + i + s * LANES, n) + start : start;
    }
    for (int64_t k = 0; k < n_rows; ++k) {
      Vec row[S];
      for (int s = 0; s < S; ++s) row[s] = load(rows[k] + i + s * LANES, n);
      for (int r = 0; r < R; ++r) {
        Vec f = all(c[r * c_row + k * c_col]);
        for (int s = 0; s < S; ++s) sum[r][s] = fma(f, row[s], sum[r][s]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) store(y[r] + i + s * LANES, sum[r][s], n);
  };
  int64_t i = begin;
  for (; i + WIDE * LANES <= end; i += WIDE * LANES) strip(i, std::integral_constant<int, WIDE>{}, Full{});
  for (; i + LANES <= end; i += LANES) strip(i, std::integral_constant<int, 1>{}, Full{});
  if (i < end) strip(i, std::integral_constant<int, 1>{}, end - i);
}

// c[t * ROW + i] = a[t] . b[i] for all n. next: rows of the T tokens that come next, brought nearer like those `ahead`.
template <int T, class E>
[[gnu::noinline]] void all_dots(const float* const* a, const E* const* b, const float* const* next, int64_t n,
                                int64_t d, float* c, Ahead ahead) {
  constexpr int N = 12 / T;  // with their operands, as many sums as AVX2 has registers
  int64_t i = 0;
  for (; i + N <= n; i += N) dots<T, N>(a, b + i, next[i / N % T], d, c + i, ahead);
  for (; N > 3 && i + 3 <= n; i += 3) dots<T, 3>(a, b + i, a[0], d, c + i, ahead);
  for (; i < n; ++i) dots<T, 1>(a, b + i, a[0], d, c + i, ahead);
}

// The score of a token at a router, while `ahead` is brought nearer. The order of summation is fixed: the path of a
// token must not depend on its company.
template <class E>
inline float score(const float* x, const E* w, int64_t d, Ahead ahead = {}) {
  Vec sum[4] = {};
  int64_t i = 0;
  auto add = [&](int to, int64_t i, auto n) { sum[to] = fma(load(x + i, n), load(w + i, n), sum[to]); };
  for (; i + 4 * LANES <= d; i += 4 * LANES) {
    ahead.fetch(4 * LANES * sizeof(E));
    for (int k = 0; k < 4; ++k) add(k, i + k * LANES, Full{});
  }
  for (; i + LANES <= d; i += LANES) add(0, i, Full{});
  if (i < d) add(0, i, d - i);
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Calls f(position, T) for groups of T = 4 positions, and one of the rest, from `begin` to `end`.
template <class F>
inline void in_groups(int64_t begin, int64_t end, F f) {
  for (; begin + 4 <= end; begin += 4) f(begin, std::integral_constant<int, 4>{});
  if (end - begin == 3) f(begin, std::integral_constant<int, 3>{});
  if (end - begin == 2) f(begin, std::integral_constant<int, 2>{});
  if (end - begin == 1) f(begin, std::integral_constant<int, 1>{});
}

// The end of the run of equal `key(position)` that starts at `begin`.
template <class Key>
inline int64_t run_end(int64_t begin, int64_t limit, Key key) {
  int64_t end = begin + 1;
  while (end < limit && key(end) == key(begin)) ++end;
  return end;
}

// ---- One tree: its weights, or (as Tree<float>, written through) their gradients.

// Some neurons of a leaf: its own, of which there may be fewer than n or none, then those of the nodes above.
template <class E>
struct Neurons {
  int64_t n = 0, own = 0;
  const E *ins[BLOCK], *outs[BLOCK];
  const E* gates[BLOCK];  // input weights of the own ones' gates

  // The own ones' rows of d, which lie one after the other.
  Ahead ahead(const E* const* rows, int64_t d) const {
    return own ? rows_ahead(rows[0], own, d) : Ahead{};
  }
};

template <class E>
struct Tree {
  int64_t d, depth, width, emitting;  // emitting: the nodes on a path that are neurons, depth or 0
  int64_t inputs;                     // rows of input weights that a leaf's neuron has: 2 with a gate
  E *router, *router_bias;            // (n_nodes, d), (n_nodes)
  E* node_out;                        // (n_nodes, d) where nodes emit
  E *in, *in_bias, *out;  // (n_leaves, inputs * width, d), (n_leaves, inputs * width), (n_leaves, width, d)
  E* out_bias;            // (n_leaves, d); the trunk has none

  int64_t neurons() const { return width + emitting; }
  int64_t rows() const { return inputs * width; }
  int64_t kept() const { return rows() + emitting; }  // pre-activations of a token: leaf, its gates, nodes
  int64_t leaves() const { return int64_t{1} << depth; }
  int64_t node_above(int64_t leaf, int64_t level) const { return ((leaf + leaves()) >> (depth - level)) - 1; }

  // A block of a leaf's neurons from `first` on.
  Neurons<E> block(int64_t leaf, int64_t first) const {
    Neurons<E> b;
    b.n = std::min(BLOCK, neurons() - first);
    b.own = std::clamp<int64_t>(width - first, 0, b.n);
    for (int64_t i = 0; i < b.own; ++i) {
      b.ins[i] = in + (leaf * rows() + first + i) * d;
      b.gates[i] = b.ins[i] + (rows() - width) * d;
      b.outs[i] = out + (leaf * width + first + i) * d;
    }
    for (int64_t i = b.own; i < b.n; ++i) {
      int64_t node = node_above(leaf, first + i - width);
      b.ins[i] = router + node * d;
      b.outs[i] = node_out + node * d;
    }
    return b;
  }

  // Copies what is known of a block from an array of `kept()` numbers, and back.
  void get(const Neurons<E>& b, int64_t first, const float* kept, float* c, float* gates) const {
    std::copy_n(kept + first, b.own, c);
    if (inputs == 2) std::copy_n(kept + width + first, b.own, gates);
    std::copy_n(kept + rows() - width + first + b.own, b.n - b.own, c + b.own);
  }
  void put(const Neurons<E>& b, int64_t first, const float* c, const float* gates, float* kept) const {
    std::copy_n(c, b.own, kept + first);
    if (inputs == 2) std::copy_n(gates, b.own, kept + width + first);
    std::copy_n(c + b.own, b.n - b.own, kept + rows() - width + first + b.own);
  }
};

// The tokens of one tree in the order of their leaves. Both arrays have one entry per token.
struct Paths {
  int32_t* leaf;
  int32_t* token;
};

// The leaf of T tokens from `first`; scores are kept where nodes emit: (n_tokens, depth).
template <int T, class E>
inline void route(const Tree<E>& tree, const float* x, int32_t* leaf, float* scores, int64_t first) {
  int64_t node[T] = {};
  for (int64_t level = 0; level < tree.depth; ++level) {
    for (int t = 0; t < T; ++t) {
      if (T == 1 && level + 1 < tree.depth)  // nothing else to do meanwhile: both children
        for (int child = 1; child <= 2; ++child) prefetch(tree.router + (2 * node[0] + child) * tree.d);
      Ahead out;  // what the node emits will be wanted
      if (T == 1 && tree.emitting) out = rows_ahead(tree.node_out + node[t] * tree.d, 1, tree.d);
      float s = score(x + (first + t) * tree.d, tree.router + node[t] * tree.d, tree.d, out);
      s += scalar(tree.router_bias[node[t]]);
      if (tree.emitting) scores[(first + t) * tree.depth + level] = s;
      node[t] = 2 * node[t] + 1 + (s >= 0);  // a tie goes right, NaN goes left
      if (T > 1 && level + 1 < tree.depth) prefetch(tree.router + node[t] * tree.d);
    }
  }
  for (int t = 0; t < T; ++t) leaf[first + t] = int32_t(node[t] - (tree.leaves() - 1));
}

// Sorts tokens by leaf, stable, a digit of at most 11 bits at a time: nothing here grows with the tree.
void sort_by_leaf(const int32_t* leaf, int64_t n, int64_t depth, Paths paths) {
  std::vector<int32_t> source(depth > 11 ? n : 0);
  for (int64_t i = 0; i < n; ++i) paths.token[i] = int32_t(i);
  for (int64_t shift = 0; shift < depth && n > 1; shift += 11) {
    int64_t bits = std::min<int64_t>(11, depth - shift), starts[(1 << 11) + 1];
    std::fill(starts, starts + (1 << bits) + 1, 0);
    auto digit = [&](int32_t token) { return (leaf[token] >> shift) & ((1 << bits) - 1); };
    for (int64_t i = 0; i < n; ++i) ++starts[digit(int32_t(i)) + 1];
    for (int64_t b = 0; b < (1 << bits); ++b) starts[b + 1] += starts[b];
    if (shift) std::copy(paths.token, paths.token + n, source.data());
    for (int64_t i = 0; i < n; ++i) {
      int32_t token = shift ? source[i] : int32_t(i);
      paths.token[starts[digit(token)]++] = token;
    }
  }
  for (int64_t i = 0; i < n; ++i) paths.leaf[i] = leaf[paths.token[i]];
}

// T tokens through some neurons: to[t] (+)= bias + sum over them of finish(from[t] . ins) * outs. Backward, ins and
// outs are exchanged: the gradient enters where the output left. Those that come `then` are brought nearer.
template <int T, class E, class Finish>
inline void through(const Tree<E>& tree, const Neurons<E>& b, const Neurons<E>& then, bool backward,
                    const Paths& paths, int64_t position, int64_t last, const float* from, float* to, const E* bias,
                    bool accumulate, Finish finish) {
  alignas(64) float c[T * ROW] = {};
  const float *source[T], *next[T];
  float* target[T];
  int64_t d = tree.d;
  for (int t = 0; t < T; ++t) {
    source[t] = from + paths.token[position + t] * d;
    next[t] = from + paths.token[std::min(position + T + t, last)] * d;
    target[t] = to + paths.token[position + t] * d;
  }
  const E* const *ins = backward ? b.outs : b.ins, *const *outs = backward ? b.ins : b.outs;
  Ahead ins_then = then.ahead(backward ? then.outs : then.ins, d);
  Ahead outs_then = then.ahead(backward ? then.ins : then.outs, d);
  all_dots<T>(source, ins, next, backward ? b.n : b.own, d, c, ins_then);  // nodes' scores are known from routing
  if (tree.inputs == 2 && !backward)
    all_dots<T>(source, b.gates, next, b.own, d, c + BLOCK, then.ahead(then.gates, d));
  for (int t = 0; t < T; ++t) finish(position + t, c + t * ROW, c + t * ROW + BLOCK);
  combine<T>(target, c, ROW, 1, outs, b.n, bias, accumulate, 0, d, outs_then);
  const E* no_bias = nullptr;
  if (tree.inputs == 2 && backward) combine<T>(target, c + BLOCK, ROW, 1, b.gates, b.own, no_bias, true, 0, d);
}

// The tokens of one tree through their leaves. `finish(b, leaf, first, position, c, gates)` turns a token's inner
// products into coefficients.
template <class E, class Finish>
void leaves(const Tree<E>& tree, bool backward, const Paths& paths, int64_t n_tokens, const float* from, float* to,
            bool accumulate, Finish finish) {
  int64_t d = tree.d, cost = (tree.rows() + tree.width + 2 * tree.emitting + 1) * d + 1;
  torch::stable::parallel_for(0, n_tokens, WORTH_A_THREAD / cost + 1, [&](int64_t begin, int64_t end) {
    for (int64_t stop; begin < end; begin = stop) {
      int64_t leaf = paths.leaf[begin];
      stop = run_end(begin, end, [&](int64_t p) { return paths.leaf[p]; });
      for (int64_t first = 0; first == 0 || first < tree.neurons(); first += BLOCK) {
        Neurons<E> b = tree.block(leaf, first), then;
        if (first + BLOCK < tree.neurons())
          then = tree.block(leaf, first + BLOCK);
        else if (stop < end)
          then = tree.block(paths.leaf[stop], 0);
        const E* bias = tree.out_bias && !backward && first == 0 ? tree.out_bias + leaf * d : nullptr;
        auto done = [&](int64_t position, float* c, float* gates) { finish(b, leaf, first, position, c, gates); };
        in_groups(begin, stop, [&](int64_t p, auto count) {
          through<count()>(tree, b, then, backward, paths, p, end - 1, from, to, bias, accumulate || first > 0, done);
          then.own = 0;  // once is enough
        });
      }
    }
  });
}

// pre: (n_tokens, kept) by position, or null. scores: (n_tokens, depth) by token.
template <class E>
void tree_forward(const Tree<E>& tree, const Paths& paths, int64_t n_tokens, const float* x, float* y,
                  bool accumulate, int64_t activation, const float* scores, float* pre) {
  auto finish = [&](const Neurons<E>& b, int64_t leaf, int64_t first, int64_t position, float* c, float* gates) {
    const E* bias = tree.in_bias + leaf * tree.rows() + first;
    for (int64_t i = 0; i < b.own; ++i) c[i] += scalar(bias[i]);
    for (int64_t i = 0; i < b.own && tree.inputs == 2; ++i) gates[i] += scalar(bias[tree.width + i]);
    const float* known = scores + paths.token[position] * tree.emitting + first - tree.width;
    for (int64_t i = b.own; i < b.n; ++i) c[i] = known[i];
    if (pre) tree.put(b, first, c, gates, pre + position * tree.kept());
    activate(activation, c, b.n);
    for (int64_t i = 0; i < b.own && tree.inputs == 2; ++i) c[i] *= gates[i];
  };
  leaves(tree, false, paths, n_tokens, x, y, accumulate, finish);
}

// gx (+)= the gradient of x; a gets what each neuron gives before its output weights, and g the gradients of `pre`.
// Arrays of (n_tokens, kept) are by position, as `pre` is.
template <class E>
void tree_backward_x(const Tree<E>& tree, const Paths& paths, int64_t n_tokens, const float* gy, float* gx,
                     bool accumulate, int64_t activation, const float* pre, float* a, float* g) {
  auto finish = [&](const Neurons<E>& b, int64_t, int64_t first, int64_t position, float* c, float* gates) {
    int64_t at = position * tree.kept(), gated = tree.inputs == 2 ? b.own : 0;
    alignas(64) float h[BLOCK] = {}, factor[BLOCK];
    tree.get(b, first, pre + at, h, factor);
    for (int64_t i = 0; i < gated; ++i) {
      gates[i] = c[i];
      c[i] *= factor[i];
    }
    differentiate(activation, h, c, b.n);
    for (int64_t i = 0; i < gated; ++i) {
      gates[i] *= h[i];
      h[i] *= factor[i];
    }
    tree.put(b, first, h, h, a + at);
    tree.put(b, first, c, gates, g + at);
  };
  leaves(tree, true, paths, n_tokens, gy, gx, accumulate, finish);
}

// to[r] (+)= sum over n tokens of c[token * c_col + r] * rows[token], for n_rows rows of d
[[gnu::noinline]] void outer(float* to, int64_t n_rows, int64_t d, const float* c, int64_t c_col,
                             const float* const* rows, int64_t n, bool accumulate, int64_t begin,
                             int64_t end) {
  const float* no_bias = nullptr;
  int64_t r = 0;
  for (; r + 4 <= n_rows; r += 4) {
    float* y[4] = {to + r * d, to + (r + 1) * d, to + (r + 2) * d, to + (r + 3) * d};
    combine<4>(y, c + r, 1, c_col, rows, n, no_bias, accumulate, begin, end);
  }
  for (; r < n_rows; ++r) {
    float* y[1] = {to + r * d};
    combine<1>(y, c + r, 1, c_col, rows, n, no_bias, accumulate, begin, end);
  }
}

// to[i] (+)= sum over n rows of c[row * stride + i]
void column_sums(float* to, int64_t n_columns, const float* c, int64_t stride, int64_t n, bool accumulate) {
  if (!accumulate) std::fill(to, to + n_columns, 0.0f);
  for (int64_t k = 0; k < n; ++k)
    for (int64_t i = 0; i < n_columns; ++i) to[i] += c[k * stride + i];
}

// The weights' gradients. Each thread takes some columns of every leaf: no two write the same number, and
// the work is even however unevenly tokens fall. Leaves are written once, zeros included; the gradients of
// nodes start from zeros.
void tree_backward_weights(const Tree<float>& grad, const Paths& paths, int64_t n_tokens, const float* x,
                           const float* gy, const float* a, const float* g) {
  const int64_t d = grad.d, m = grad.kept(), rows = grad.rows(), unit = 64;
  const float one = 1.0f;
  auto columns = [&](int64_t begin, int64_t end) {
    const float *xs[TOKENS], *gs[TOKENS];
    auto gather = [&](int64_t first, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        xs[i] = x + paths.token[first + i] * d;
        gs[i] = gy + paths.token[first + i] * d;
      }
    };
    for (int64_t leaf = 0, start = 0, stop = 0; leaf < grad.leaves(); ++leaf, start = stop) {
      while (stop < n_tokens && paths.leaf[stop] == leaf) ++stop;
      for (int64_t p = start; p == start || p < stop; p += TOKENS) {
        int64_t n = std::min(TOKENS, stop - p);
        gather(p, n);
        outer(grad.in + leaf * rows * d, rows, d, g + p * m, m, xs, n, p > start, begin, end);
        outer(grad.out + leaf * grad.width * d, grad.width, d, a + p * m, m, gs, n, p > start, begin, end);
        if (grad.out_bias) outer(grad.out_bias + leaf * d, 1, d, &one, 0, gs, n, p > start, begin, end);
        if (begin == 0) column_sums(grad.in_bias + leaf * rows, rows, g + p * m, m, n, p > start);
      }
    }
    for (int64_t p = 0; grad.emitting && p < n_tokens; p += TOKENS) {
      int64_t limit = std::min(n_tokens, p + TOKENS);
      for (int64_t level = 0; level < grad.emitting; ++level) {
        auto node_of = [&](int64_t q) { return grad.node_above(paths.leaf[q], level); };
        for (int64_t start = p, stop; start < limit; start = stop) {
          stop = run_end(start, limit, node_of);
          int64_t node = node_of(start), at = start * m + rows + level;
          gather(start, stop - start);
          outer(grad.router + node * d, 1, d, g + at, m, xs, stop - start, true, begin, end);
          outer(grad.node_out + node * d, 1, d, a + at, m, gs, stop - start, true, begin, end);
          if (begin == 0) column_sums(grad.router_bias + node, 1, g + at, m, stop - start, true);
        }
      }
    }
  };
  int64_t grain = WORTH_A_THREAD / (2 * (n_tokens + grad.leaves()) * (m + 1) * unit) + 1;
  torch::stable::parallel_for(0, (d + unit - 1) / unit, grain, [&](int64_t begin, int64_t end) {
    columns(begin * unit, std::min(d, end * unit));
  });
}

// ---- Tensors in, tensors out.

using Weights = std::vector<Tensor>;  // ten, in the order of reference.FFFWeights

// A contiguous tensor, whichever way it came here.
struct View {
  void* data;
  const int64_t* sizes;
  int64_t dim;
  ScalarType type;

  int64_t size(int64_t i) const { return sizes[i]; }
  int64_t numel() const { return std::accumulate(sizes, sizes + dim, int64_t{1}, std::multiplies<int64_t>()); }
};

// Places in reference.FFFWeights.
enum {
  ROUTER, ROUTER_BIAS, NODE_OUT, LEAF_IN, LEAF_IN_BIAS, LEAF_OUT, LEAF_OUT_BIAS, TRUNK_IN, TRUNK_IN_BIAS, TRUNK_OUT,
  N_WEIGHTS
};

using Views = std::array<View, N_WEIGHTS>;

View view(const Tensor& t) {
  auto sizes = t.sizes();
  return {t.data_ptr(), sizes.data(), int64_t(sizes.size()), t.scalar_type()};
}

// Views of contiguous weights; those that are not contiguous are exchanged for copies that are.
Views views(Weights& w) {
  STD_TORCH_CHECK(w.size() == N_WEIGHTS, "fffconvert: weights must be as FFFWeights has them");
  Views result;
  for (int i = 0; i < N_WEIGHTS; ++i) {
    if (!w[i].is_contiguous()) w[i] = torch::stable::contiguous(w[i]);
    result[i] = view(w[i]);
  }
  return result;
}

using Sizes = std::vector<int64_t>;

Sizes sizes_of(const Tensor& t) {
  auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// An uninitialised contiguous tensor.
Tensor new_tensor(const Sizes& shape, ScalarType type) {
  Sizes strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  AtenTensorHandle handle;
  int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                  : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                 : aoti_torch_dtype_int32();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The trees and, as a last tree of depth 0, the trunk.
template <class E>
std::vector<Tree<E>> trees_of(const Views& w) {
  std::array<E*, N_WEIGHTS> p;
  for (int i = 0; i < N_WEIGHTS; ++i) p[i] = static_cast<E*>(w[i].data);
  int64_t n_trees = w[LEAF_IN].size(0), leaves = w[LEAF_IN].size(1), d = w[LEAF_IN].size(3);
  int64_t width = w[LEAF_OUT].size(2);
  int64_t inputs = w[LEAF_IN].size(2) > width ? 2 : 1, nodes = leaves - 1, depth = 0;
  int64_t out_nodes = w[NODE_OUT].numel() / std::max<int64_t>(d * n_trees, 1);
  while ((int64_t{1} << depth) < leaves) ++depth;
  std::vector<Tree<E>> trees;
  for (int64_t t = 0; t < n_trees; ++t) {
    int64_t leaf = t * leaves, row = leaf * width, in = inputs * row;
    trees.push_back({d, depth, width, out_nodes ? depth : 0, inputs, p[ROUTER] + t * nodes * d,
                     p[ROUTER_BIAS] + t * nodes, p[NODE_OUT] + t * out_nodes * d, p[LEAF_IN] + in * d,
                     p[LEAF_IN_BIAS] + in, p[LEAF_OUT] + row * d, p[LEAF_OUT_BIAS] + leaf * d});
  }
  if (w[TRUNK_IN].numel()) {
    int64_t trunk = w[TRUNK_OUT].size(0), trunk_inputs = w[TRUNK_IN].size(0) > trunk ? 2 : 1;
    trees.push_back({d, 0, trunk, 0, trunk_inputs, nullptr, nullptr, nullptr, p[TRUNK_IN], p[TRUNK_IN_BIAS],
                     p[TRUNK_OUT], nullptr});
  }
  return trees;
}

void expect(const View& t, const char* name, ScalarType type, const int64_t* shape, int64_t dim) {
  STD_TORCH_CHECK(t.dim == dim && std::equal(shape, shape + dim, t.sizes), "fffconvert: ", name,
                  " does not fit the other tensors");
  STD_TORCH_CHECK(t.type == type, "fffconvert: ", name, " has another dtype than the other tensors");
}

void expect(const View& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  expect(t, name, type, shape.begin(), int64_t(shape.size()));
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

int32_t* ints(const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); }

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor as(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// The number of tokens in x. Every later read is inside the shapes that are tested here.
int64_t check(const View& x, const Views& w) {
  auto type = w[LEAF_IN].type;  // of all weights: that of x, or narrower
  STD_TORCH_CHECK(x.type == ScalarType::Float || x.type == ScalarType::BFloat16,
                  "fffconvert: x must be float32 or bfloat16");
  STD_TORCH_CHECK(type == x.type || type == ScalarType::BFloat16,
                  "fffconvert: leaf_in_weight has another dtype than x");
  STD_TORCH_CHECK(x.dim > 0 && w[NODE_OUT].dim == 3 && w[LEAF_IN].dim == 4 && w[LEAF_OUT].dim == 4 &&
                      w[TRUNK_IN].dim == 2 && w[TRUNK_OUT].dim == 2,
                  "fffconvert: x must be (..., d_model), and weights as FFFWeights has them");
  int64_t n = 1, d = x.size(x.dim - 1), trees = w[LEAF_IN].size(0), leaves = w[LEAF_IN].size(1);
  int64_t width = w[LEAF_OUT].size(2);
  int64_t out_nodes = w[NODE_OUT].size(1), trunk = w[TRUNK_OUT].size(0);
  int64_t in = (w[LEAF_IN].size(2) > width ? 2 : 1) * width;  // with the rows of gates
  int64_t trunk_in = (w[TRUNK_IN].size(0) > trunk ? 2 : 1) * trunk;
  for (int64_t i = 0; i + 1 < x.dim; ++i) n *= x.size(i);
  STD_TORCH_CHECK(n < std::numeric_limits<int32_t>::max(), "fffconvert: too many tokens");
  STD_TORCH_CHECK(trees > 0, "fffconvert: there is no tree");
  STD_TORCH_CHECK(leaves > 0 && leaves <= (1 << 20) && (leaves & (leaves - 1)) == 0,
                  "fffconvert: the number of leaves is no power of two up to 2^20");
  expect(w[ROUTER], "router_weight", type, {trees, leaves - 1, d});
  expect(w[ROUTER_BIAS], "router_bias", type, {trees, leaves - 1});
  expect(w[NODE_OUT], "node_out_weight", type, {trees, out_nodes ? leaves - 1 : 0, d});
  expect(w[LEAF_IN], "leaf_in_weight", type, {trees, leaves, in, d});
  expect(w[LEAF_IN_BIAS], "leaf_in_bias", type, {trees, leaves, in});
  expect(w[LEAF_OUT], "leaf_out_weight", type, {trees, leaves, width, d});
  expect(w[LEAF_OUT_BIAS], "leaf_out_bias", type, {trees, leaves, d});
  expect(w[TRUNK_IN], "trunk_in_weight", type, {trunk_in, d});
  expect(w[TRUNK_IN_BIAS], "trunk_in_bias", type, {trunk_in});
  expect(w[TRUNK_OUT], "trunk_out_weight", type, {trunk, d});
  return n;
}

// What `pre` holds of each token.
template <class E>
int64_t kept_of(const std::vector<Tree<E>>& trees) {
  int64_t n = 0;
  for (auto& tree : trees) n += tree.kept();
  return n;
}

// Calls `f` with a value of the type that the weights' numbers have.
template <class F>
auto with_type(ScalarType type, F f) {
  return type == ScalarType::Float ? f(float{}) : f(bf16{});
}

// paths: (trees, 2, n_tokens); pre: each tree's (n_tokens, kept), one after the other, or null.
template <class E>
void layer_forward(const std::vector<Tree<E>>& trees, int64_t n, const float* x, float* y, int64_t activation,
                   int32_t* paths, float* pre) {
  std::unique_ptr<int32_t[]> leaf(new int32_t[n]);
  std::unique_ptr<float[]> scores(new float[n * trees[0].emitting]);
  for (size_t t = 0; t < trees.size(); ++t, paths += 2 * n) {
    const Tree<E>& tree = trees[t];
    Paths order{paths, paths + n};
    int64_t grain = WORTH_A_THREAD / (tree.d * (tree.depth + 1) + 1) + 1;
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      for (; begin + SIDE <= end; begin += SIDE) route<SIDE>(tree, x, leaf.get(), scores.get(), begin);
      for (; begin < end; ++begin) route<1>(tree, x, leaf.get(), scores.get(), begin);
    });
    sort_by_leaf(leaf.get(), n, tree.depth, order);
    tree_forward(tree, order, n, x, y, t > 0, activation, scores.get(), pre);
    if (pre) pre += n * tree.kept();
  }
}

// y (n, d) from x (n, d), of one type, keeping nothing for a backward pass.
void infer_layer(const Views& w, int64_t n, const View& x, const View& y, int64_t activation) {
  auto compute = [&](const float* from, float* to) {
    with_type(w[LEAF_IN].type, [&](auto element) {
      auto trees = trees_of<decltype(element)>(w);
      std::unique_ptr<int32_t[]> paths(new int32_t[trees.size() * 2 * n]);
      layer_forward(trees, n, from, to, activation, paths.get(), nullptr);
    });
  };
  if (x.type == ScalarType::Float) return compute(static_cast<float*>(x.data), static_cast<float*>(y.data));
  int64_t size = x.numel();
  std::unique_ptr<float[]> from(new float[size]), to(new float[size]);
  auto convert = [&](auto* source, auto* target, auto one) {
    torch::stable::parallel_for(0, size, WORTH_A_THREAD, [&](int64_t begin, int64_t end) {
      std::transform(source + begin, source + end, target + begin, one);
    });
  };
  convert(static_cast<const bf16*>(x.data), from.get(), [](bf16 v) { return scalar(v); });
  compute(from.get(), to.get());
  convert(to.get(), static_cast<bf16*>(y.data), [](float v) { return rounded(v); });
}

Tensor fff(Tensor x, Weights weights, int64_t activation) {
  Views w = views(weights);
  int64_t n = check(view(x), w);
  Tensor input = dense(x), y = new_tensor(sizes_of(x), x.scalar_type());
  infer_layer(w, n, view(input), view(y), activation);
  return y;
}

// Returns y and what the backward needs: paths (n_trees, and one if there is a trunk; 2; n_tokens) and the
// pre-activations, flat.
std::tuple<Tensor, Tensor, Tensor> fff_train(Tensor x, Weights weights, int64_t activation) {
  Views w = views(weights);
  int64_t n = check(view(x), w);
  Tensor input = dense(as(x, ScalarType::Float));
  Tensor y = new_tensor(sizes_of(x), ScalarType::Float);
  Tensor paths = new_tensor({w[LEAF_IN].size(0) + (w[TRUNK_IN].size(0) > 0), 2, n}, ScalarType::Int);
  Tensor pre;
  with_type(w[LEAF_IN].type, [&](auto element) {
    auto trees = trees_of<decltype(element)>(w);
    pre = new_tensor({n * kept_of(trees)}, ScalarType::Float);
    layer_forward(trees, n, floats(input), floats(y), activation, ints(paths), floats(pre));
  });
  return {as(y, x.scalar_type()), paths, pre};
}

// The gradients of x and of the ten weights; weights without a gradient get an empty tensor.
std::vector<Tensor> fff_backward(Tensor grad, Tensor x, Weights weights, Tensor paths, Tensor pre,
                                 int64_t activation, bool need_weights) {
  Views w = views(weights);
  View like = view(x);
  int64_t n = check(like, w), n_trees = w[LEAF_IN].size(0);
  auto type = w[LEAF_IN].type;
  bool emitting = w[NODE_OUT].size(1) > 0, trunk = w[TRUNK_IN].size(0) > 0;
  expect(view(grad), "grad", like.type, like.sizes, like.dim);
  expect(view(paths), "paths", ScalarType::Int, {n_trees + trunk, 2, n});
  Tensor xs = dense(as(x, ScalarType::Float)), gy = dense(as(grad, ScalarType::Float));
  Tensor gx = new_tensor(sizes_of(x), ScalarType::Float);
  Weights grads(N_WEIGHTS);
  for (int i = 0; i < N_WEIGHTS; ++i) {
    bool unused = (i <= NODE_OUT && !emitting) || (i >= TRUNK_IN && !trunk);
    grads[i] = new_tensor(!need_weights || unused ? Sizes{0} : sizes_of(weights[i]), ScalarType::Float);
    if (i <= NODE_OUT) torch::stable::zero_(grads[i]);
  }
  paths = dense(paths);
  pre = dense(pre);
  with_type(type, [&](auto element) {
    auto trees = trees_of<decltype(element)>(w);
    expect(view(pre), "pre", ScalarType::Float, {n * kept_of(trees)});
    std::vector<Tree<float>> grad_trees;
    if (need_weights) grad_trees = trees_of<float>(views(grads));
    std::unique_ptr<float[]> a(new float[pre.numel()]), g(new float[pre.numel()]);
    int32_t* path = ints(paths);
    int64_t at = 0;
    for (size_t t = 0; t < trees.size(); ++t, path += 2 * n) {
      Paths order{path, path + n};
      for (int64_t i = 0; i < n; ++i)
        STD_TORCH_CHECK(path[i] >= 0 && path[i] < trees[t].leaves() && path[n + i] >= 0 && path[n + i] < n &&
                            (i == 0 || path[i - 1] <= path[i]),
                        "fffconvert: paths are not those of a forward pass");
      tree_backward_x(trees[t], order, n, floats(gy), floats(gx), t > 0, activation, floats(pre) + at,
                      a.get() + at, g.get() + at);
      if (need_weights)
        tree_backward_weights(grad_trees[t], order, n, floats(xs), floats(gy), a.get() + at, g.get() + at);
      at += n * trees[t].kept();
    }
  });
  std::vector<Tensor> result = {as(gx, like.type)};
  for (Tensor& t : grads) result.push_back(as(t, type));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY(fffconvert, m) {
  m.def("fff(Tensor x, Tensor[] weights, int activation) -> Tensor");
  m.def("fff_train(Tensor x, Tensor[] weights, int activation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fff_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor paths, Tensor pre, int activation, "
      "bool need_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fffconvert, CPU, m) {
  m.impl("fff", TORCH_BOX(&fff));
  m.impl("fff_train", TORCH_BOX(&fff_train));
  m.impl("fff_backward", TORCH_BOX(&fff_backward));
}

// ---- The short way from Python: calling an operator takes longer than a token does.

extern "C" {
void* PyTuple_GetItem(void* tuple, intptr_t i);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void* state);
void PyErr_Clear();
}

namespace {

struct Unlocked {  // lets other threads of Python run
  void* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

// Whether nobody would miss the dispatcher: no transformation, no tracing, no mode of Python's, no profiler.
bool unobserved() {
  auto included = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
  return included.empty() && !at::impl::torch_function_mode_enabled() &&
         !c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE);
}

// A Python tensor as a view, where it is contiguous float32 or bfloat16 in the CPU's memory.
bool plain(const DLPackExchangeAPI* api, void* object, View& v) {
  DLTensor t;
  if (!object || api->dltensor_from_py_object_no_sync(object, &t) != 0) return false;
  bool wide = t.dtype.code == kDLFloat && t.dtype.bits == 32, narrow = t.dtype.code == kDLBfloat;
  v = {t.data, t.shape, t.ndim, wide ? ScalarType::Float : ScalarType::BFloat16};
  int64_t stride = 1;
  bool dense = t.data;
  for (int64_t i = t.ndim; i-- > 0; stride *= t.shape[i]) dense &= t.shape[i] == 1 || t.strides[i] == stride;
  return t.device.device_type == kDLCPU && (wide || narrow) && (dense || stride == 0);
}

bool infer(const DLPackExchangeAPI* api, void* x, void* weights, int64_t activation, void* y) {
  View from, to;
  Views w;
  if (!unobserved() || !plain(api, x, from) || !plain(api, y, to)) return false;
  for (int i = 0; i < N_WEIGHTS; ++i)
    if (!plain(api, PyTuple_GetItem(weights, i), w[i])) return false;
  int64_t n = check(from, w);
  expect(to, "y", from.type, from.sizes, from.dim);
  Unlocked others;
  infer_layer(w, n, from, to, activation);
  return true;
}

}  // namespace

// The operator `fff` on Python's tensors, into y; false where only the operator serves, which also says what is
// wrong. The caller holds the interpreter's lock.
extern "C" bool fffconvert_infer(const DLPackExchangeAPI* api, void* x, void* weights, int64_t activation, void* y) {
  try {
    if (infer(api, x, weights, activation, y)) return true;
  } catch (const std::exception&) {
  }
  PyErr_Clear();
  return false;
}
