// Kernels over one row of costs, in vector types of the compiler. host_solver.h includes this file
// once per instruction set, inside a namespace and with CROC_LANES doubles per vector: it has no
// include guard.
//
// A row is read in blocks of kBlock columns. Kernels that minimise leave the minima of every block
// in `low` (one vector each), so that the column is looked up in one block afterwards instead of
// being carried along with every comparison. Arrays indexed by columns are padded to whole blocks;
// costs are not, so the last vector of a row is read in part.

typedef double Doubles __attribute__((vector_size(8 * CROC_LANES)));
typedef int64_t Mask __attribute__((vector_size(8 * CROC_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * CROC_LANES)));
typedef float Floats __attribute__((vector_size(4 * CROC_LANES)));

CROC_INLINE Doubles broadcast(double x) { return x - Doubles{}; }

template <class V, class E>
CROC_INLINE V load(const E* p) {
  V x;
  std::memcpy(&x, p, sizeof(V));
  return x;
}

template <class V, class E>
CROC_INLINE void store(E* p, const V& x) {
  std::memcpy(p, &x, sizeof(V));
}

CROC_INLINE Doubles load_cost(const double* c) { return load<Doubles>(c); }
CROC_INLINE Doubles load_cost(const float* c) {
  return __builtin_convertvector(load<Floats>(c), Doubles);
}

// The last `count` costs of a row, fewer than CROC_LANES, and `fill` behind them. A masked load where
// there is one: what is copied in pieces and read back at once waits for the copy to arrive.
CROC_INLINE Doubles load_tail(const float* c, int count, float fill) {
#if CROC_LANES == 8
  const __mmask8 some = static_cast<__mmask8>((1u << count) - 1);
  const Floats x = (Floats)_mm256_mask_loadu_ps(_mm256_set1_ps(fill), some, c);
  return __builtin_convertvector(x, Doubles);
#elif CROC_LANES == 4
  const __m128i some = _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3));
  const __m128 costs = _mm_maskload_ps(c, some);
  const Floats x = (Floats)_mm_blendv_ps(_mm_set1_ps(fill), costs, _mm_castsi128_ps(some));
  return __builtin_convertvector(x, Doubles);
#else
  Floats x = Floats{} + fill;
  for (int k = 0; k < count; ++k) x[k] = c[k];
  return __builtin_convertvector(x, Doubles);
#endif
}
CROC_INLINE Doubles load_tail(const double* c, int count, double fill) {
#if CROC_LANES == 8
  const __mmask8 some = static_cast<__mmask8>((1u << count) - 1);
  return (Doubles)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), some, c);
#elif CROC_LANES == 4
  const __m256i lanes = _mm256_setr_epi64x(0, 1, 2, 3);
  const __m256i some = _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lanes);
  const __m256d x = _mm256_maskload_pd(c, some);
  return (Doubles)_mm256_blendv_pd(_mm256_set1_pd(fill), x, _mm256_castsi256_pd(some));
#else
  Doubles x = broadcast(fill);
  for (int k = 0; k < count; ++k) x[k] = c[k];
  return x;
#endif
}

CROC_INLINE Doubles minimum(const Doubles& a, const Doubles& b) { return a < b ? a : b; }
CROC_INLINE Doubles maximum(const Doubles& a, const Doubles& b) { return a > b ? a : b; }

CROC_INLINE bool any(const Mask& x) {
#if CROC_LANES == 8
  return _mm512_test_epi64_mask((__m512i)x, (__m512i)x) != 0;
#elif CROC_LANES == 4
  return _mm256_movemask_pd((__m256d)x) != 0;
#else
  int64_t all = 0;
  for (int k = 0; k < CROC_LANES; ++k) all |= x[k];
  return all != 0;
#endif
}

CROC_INLINE double smallest(const Doubles& x) {
  double best = x[0];
  for (int k = 1; k < CROC_LANES; ++k) best = x[k] < best ? x[k] : best;
  return best;
}

// Calls visit(column, costs of CROC_LANES columns) along the row and finish(block) behind every
// block. Costs that pad the last vector are 0: whatever they are compared with is padded with -inf
// duals or +inf distances.
template <class T, class Visit, class Finish>
CROC_INLINE void for_blocks(const T* c, int m, Visit visit, Finish finish) {
  int j = 0, block = 0;
  for (; j + kBlock <= m; ++block) {
    for (int end = j + kBlock; j < end; j += CROC_LANES) visit(j, load_cost(c + j));
    finish(block);
  }
  if (j == m) return;
  for (; j + CROC_LANES <= m; j += CROC_LANES) visit(j, load_cost(c + j));
  if (j < m) visit(j, load_tail(c + j, m - j, 0));
  finish(block);
}

// First column whose value equals `value`, one without a row (free_row[j] < 0) before any other.
template <class Value>
CROC_INLINE int find_column(double value, const double* low, int m, const int* row_of, Value at) {
  const Doubles wanted = broadcast(value);
  int first = -1;
  for (int block = 0, begin = 0; begin < m; ++block, begin += kBlock) {
    if (!any(load<Doubles>(low + block * CROC_LANES) == wanted)) continue;
    for (int j = begin, end = std::min(begin + kBlock, m); j < end; ++j) {
      if (at(j) != value) continue;
      if (row_of[j] < 0) return j;
      if (first < 0) first = j;
    }
  }
  return first;
}

// min_j (c_j - v_j)
template <class T>
double row_minimum(const T* c, const double* v, int m) {
  Doubles best = broadcast(kInfinity);
  for_blocks(
      c, m,
      [&](int j, const Doubles& x) CROC_LAMBDA { best = minimum(x - load<Doubles>(v + j), best); },
      [](int) {});
  return smallest(best);
}

struct TwoMinima {
  double first, second;
};

// The two smallest c_j - v_j, equal if the smallest occurs twice.
template <class T>
TwoMinima two_minima(const T* c, const double* v, int m, double* low) {
  const Doubles infinity = broadcast(kInfinity);
  Doubles first = infinity, second = infinity, best = infinity;
  for_blocks(
      c, m,
      [&](int j, const Doubles& cost) CROC_LAMBDA {
        const Doubles x = cost - load<Doubles>(v + j);
        second = minimum(maximum(x, best), second);
        best = minimum(x, best);
      },
      [&](int block) CROC_LAMBDA {
        // `second` never sees the losing one of two blocks' minima: it is compared here.
        second = minimum(maximum(first, best), second);
        first = minimum(first, best);
        store(low + block * CROC_LANES, best);
        best = infinity;
      });
  TwoMinima result{first[0], second[0]};
  for (int k = 1; k < CROC_LANES; ++k) {
    const double a = first[k], larger = std::max(result.first, a);
    result.second = std::min(std::min(result.second, second[k]), larger);
    result.first = std::min(result.first, a);
  }
  return result;
}

// One step of a shortest path search: distance[j] = min(distance[j], c_j - v_j + shift), from[j] =
// the row where that is smaller. Columns that are done have v_j = -inf and distance +inf. Returns
// the smallest distance.
template <class T>
double relax(const T* c, const double* v, double shift, int row, int m, double* distance, int* from,
             double* low) {
  const Doubles offset = broadcast(shift);
  Ints source = Ints{} + row;
  Doubles best = broadcast(kInfinity), total = best;
  for_blocks(
      c, m,
      [&](int j, const Doubles& cost) CROC_LAMBDA {
        const Doubles x = (cost - load<Doubles>(v + j)) + offset;
        const Doubles old = load<Doubles>(distance + j);
        const Mask less = x < old;
        const Doubles now = less ? x : old;
        store(distance + j, now);
        const Ints less_int = __builtin_convertvector(less, Ints);
        store(from + j, less_int ? source : load<Ints>(from + j));
        best = minimum(now, best);
      },
      [&](int block) CROC_LAMBDA {
        store(low + block * CROC_LANES, best);
        total = minimum(best, total);
        best = broadcast(kInfinity);
      });
  return smallest(total);
}

struct RowSummary {
  double smallest, largest;  // the largest of the finite costs
  bool invalid, forbidden;   // NaN or -inf; +inf
};

// Adds the row to `sum` (+inf counts as `instead`).
template <class T>
RowSummary summarize(const T* c, int m, double instead, double* sum) {
  const Doubles infinity = broadcast(kInfinity), other = broadcast(instead);
  Doubles low = infinity, high = broadcast(-kInfinity);
  Mask invalid{}, forbidden{};
  const auto visit = [&](int j, const Doubles& x) CROC_LAMBDA {
    invalid |= ~(x > -infinity);
    const Mask none = x == infinity;
    forbidden |= none;
    low = minimum(x, low);
    high = maximum(none ? -infinity : x, high);
    store(sum + j, load<Doubles>(sum + j) + (none ? other : x));
  };
  int j = 0;
  for (; j + CROC_LANES <= m; j += CROC_LANES) visit(j, load_cost(c + j));
  // The tail repeats its first cost: 0 could be the smallest or the largest.
  if (j < m) visit(j, load_tail(c + j, m - j, c[j]));
  return {smallest(low), -smallest(-high), any(invalid), any(forbidden)};
}

// 2^x for x <= 0 to about 1e-7; below 2^-126 it is 2^-126.
CROC_INLINE Floats exp2_approximate(Floats x) {
  x = x < -126.0f ? Floats{} - 126.0f : x;
  const Ints whole = __builtin_convertvector(x - 0.5f, Ints);  // rounds towards 0: to the nearest
  const Floats f = (x - __builtin_convertvector(whole, Floats)) * 0.69314718f;
  Floats p = 1.0f / 720.0f * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return (Floats)((Ints)p + (whole << 23));
}

// share_j = exp((best - (c_j - v_j)) / temperature) for best = the row's minimum; returns the sum.
template <class T>
double soft_minimum(const T* c, const double* v, double best, double temperature, int m,
                    float* share) {
  const Doubles top = broadcast(best), scale = broadcast(1.4426950408889634 / temperature);
  Floats sum{};
  for_blocks(
      c, m,
      [&](int j, const Doubles& cost) CROC_LAMBDA {
        const Doubles x = (top - (cost - load<Doubles>(v + j))) * scale;
        // Padding has v = -inf, forbidden pairs cost +inf: both end at 2^-126.
        const Floats y =
            exp2_approximate(__builtin_convertvector(maximum(x, broadcast(-126.0)), Floats));
        store(share + j, y);
        sum += y;
      },
      [](int) {});
  double total = 0;
  for (int k = 0; k < CROC_LANES; ++k) total += sum[k];
  return total;
}
