/* Decode attention over packed rows (codecs/rows.py has the bytes of a row), for a few query rows a head.
 *
 * Levels and queries are 16-bit integers while they meet: a byte shuffle looks 32 levels up at once, and one instruction
 * multiplies and adds pairs. They keep 13 to 15 bits, each query and every 64 weights with a scale of their own; sums go to
 * fp32 before 32 bits could overflow. What this rounds away is below 1e-4 of the result; 8 bits a code round away 1e-2. The softmax is online (1805.02867) and in fp32.
 *
 * Queries that come in fp32 stay that, at less than half the speed.
 *
 * Each instruction set unpacks coordinates in the order that suits it. Nothing here knows that order: it is read off once a
 * call by unpacking rows whose levels spell the number of the coordinate.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(TQAI_PLAIN)
#elif defined(__AVX512BW__) && defined(__AVX512F__) && defined(__AVX2__)
#define WIDE 1
#define VECTOR 1
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR 1
#endif
#ifdef VECTOR
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define TOKENS 64 /* that share one rescaling */
#define UNIT 32   /* coordinates unpacked together */
#define LEVEL_K 16383
#define QUERY(top) ((top) > 255 ? 16383 : 32767) /* 8 x 16383 x 16383 < 2^31 */
#define LEVEL_V 8191
#define WEIGHT 32767
#define TINY 1e-33f
#define NEGLIGIBLE 1e-6f

typedef struct {
  int bits, top;     /* top: the largest integer level */
  int16_t level[16]; /* unused for 8 bits: 2 code - 255 */
  uint8_t low[16], high[16];
  float unit; /* level = integer * unit */
} Book;

typedef struct {
  const uint8_t *codes_k;
  const uint16_t *gain_k;
  const uint8_t *codes_v;
  const uint16_t *gain_v;
  int64_t tokens;
} Segment;

typedef struct {
  int64_t heads, kv_heads, group, count, d, dv, bits_k, bits_v; /* heads: batch x kv_heads; rows of a head: group x count */
  const float *level_k, *level_v;
  const Segment *segments;
  int64_t segment_count, first; /* column of the first packed token */
  const float *q, *shift;       /* [heads, rows, d], rotated; [heads, rows] or NULL: added to every packed score */
  const void *exact_k, *exact_v; /* [heads, exact, d] and [heads, exact, dv]; the first ones lie before the packed tokens */
  int64_t exact, front, exact_kind; /* 1: bf16, 2: fp32 */
  const float *q_exact;             /* not rotated */
  const void *mask;                 /* or NULL */
  int64_t mask_kind, mask_batch, mask_head, mask_row; /* 1: bytes, 0 hides; 2: fp32, added; strides in elements */
  int64_t seen;                                       /* columns that the first query sees, the next one more; 0: all */
  int64_t after;                                      /* column of the exact row number front */
  int64_t precise;                                    /* fp32 where the products are taken */
  float softcap;                                      /* 0: none */
  float *top, *weight;     /* [heads, rows]: where the softmax stands; changed */
  float *sum, *sum_exact;  /* [heads, rows, dv]: written; the first rotated */
  const uint8_t *read;     /* or NULL: which blocks of packed tokens a head reads, 0 leaves one out */
  int64_t read_head, read_block; /* blocks of a head; tokens of a block, a divisor of TOKENS and of each segment */
} Job;

INLINE float wide(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias)); /* eight, on any machine */
typedef int32_t Ints __attribute__((vector_size(32), aligned(4), may_alias));

INLINE Floats rounded(Floats x) { return (x + 12582912.0f) - 12582912.0f; } /* |x| < 2^22 */
INLINE Floats choose(Ints yes, Floats a, Floats b) { return (Floats)(((Ints)a & yes) | ((Ints)b & ~yes)); }
INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
INLINE float add_up(Floats x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }
INLINE float largest(Floats x) {
  float m = x[0];
  for (int i = 1; i < 8; i++) m = x[i] > m ? x[i] : m;
  return m;
}

/* exp for x <= 0, relative error 2e-7; 0 below -87 */
INLINE Floats small_exp(Floats x) {
  const Floats least = (Floats){0} - 87.0f;
  Floats y = choose(x < least, least, x);
  Floats n = rounded(y * 1.44269504f);
  Floats f = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
  Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  return choose(x < least, (Floats){0}, p * (Floats)bits);
}

/* Levels as integers up to limit, by the scale near it that rounds them least */
static Book book(int64_t bits, const float *level, int limit) {
  Book b;
  memset(&b, 0, sizeof b);
  b.bits = (int)bits;
  if (bits == 8) {
    b.unit = 0.5f;
    b.top = 255;
    return b;
  }
  float most = 0;
  int n = 1 << bits;
  for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(level[i]));
  float least = INFINITY;
  for (int top = limit; top > limit - 512; top--) {
    float unit = most / top, off = 0;
    for (int i = 0; i < n; i++) {
      float x = level[i] / unit, y = x - ((x + 12582912.0f) - 12582912.0f);
      off += y * y;
    }
    off *= unit * unit;
    if (off < least) least = off, b.unit = unit, b.top = top;
  }
  for (int i = 0; i < n; i++) b.level[i] = (int16_t)lrintf(level[i] / b.unit);
  for (int i = 0; i < 16; i++) b.low[i] = (uint8_t)b.level[i], b.high[i] = (uint8_t)((uint16_t)b.level[i] >> 8);
  return b;
}

/* ---- what an instruction set brings: unpack a unit, dot products of a row, weighted sums of pairs of rows */

#ifdef VECTOR
typedef struct {
  __m256i a, b;
} Pair;

INLINE __m256i table(const uint8_t *x) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)x)); }

INLINE __m256i codes2(const uint8_t *p) {
  int64_t x;
  memcpy(&x, p, 8);
  __m256i y = _mm256_srlv_epi64(_mm256_set1_epi64x(x), _mm256_setr_epi64x(0, 2, 4, 6));
  return _mm256_and_si256(y, _mm256_set1_epi8(3)); /* byte 8 i + m: coordinate 4 m + i */
}

INLINE Pair unpack(const Book *b, const int bits, const uint8_t *row, int64_t d, int64_t u) {
  Pair out;
  if (bits == 8) {
    const __m256i less = _mm256_set1_epi16(255);
    const __m128i *p = (const __m128i *)(row + u * 32);
    out.a = _mm256_sub_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(p)), 1), less);
    out.b = _mm256_sub_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(p + 1)), 1), less);
    return out;
  }
  __m256i c;
  if (bits == 4) {
    __m128i x = _mm_loadu_si128((const __m128i *)(row + u * 16));
    c = _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1), _mm256_set1_epi8(15));
  } else {
    c = codes2(row + u * 8);
    if (bits == 3) {
      int32_t x;
      memcpy(&x, row + d / 4 + u * 4, 4);
      const __m256i from = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
      const __m256i bit = _mm256_setr_epi64x(0x1001100110011001, 0x2002200220022002, 0x4004400440044004, (long long)0x8008800880088008ULL);
      __m256i h = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(x), from), bit);
      c = _mm256_or_si256(c, _mm256_and_si256(_mm256_cmpeq_epi8(h, bit), _mm256_set1_epi8(4)));
    }
  }
  __m256i low = _mm256_shuffle_epi8(table(b->low), c), high = _mm256_shuffle_epi8(table(b->high), c);
  out.a = _mm256_unpacklo_epi8(low, high);
  out.b = _mm256_unpackhi_epi8(low, high);
  return out;
}

INLINE void unpack_row(const Book *b, const int bits, const uint8_t *row, int64_t d, int16_t *out) {
  for (int64_t u = 0; u < d / UNIT; u++) {
    Pair x = unpack(b, bits, row, d, u);
    _mm256_storeu_si256((__m256i *)(out + u * UNIT), x.a);
    _mm256_storeu_si256((__m256i *)(out + u * UNIT + 16), x.b);
  }
}

/* a unit of tokens 2 i and 2 i + 1 as pairs */
INLINE void unpack_pair(const Book *b, const int bits, const uint8_t *even, const uint8_t *odd, int64_t d, int64_t u, int16_t *out) {
  Pair x = unpack(b, bits, even, d, u), y = unpack(b, bits, odd, d, u);
  _mm256_store_si256((__m256i *)out, _mm256_unpacklo_epi16(x.a, y.a));
  _mm256_store_si256((__m256i *)(out + 16), _mm256_unpackhi_epi16(x.a, y.a));
  _mm256_store_si256((__m256i *)(out + 32), _mm256_unpacklo_epi16(x.b, y.b));
  _mm256_store_si256((__m256i *)(out + 48), _mm256_unpackhi_epi16(x.b, y.b));
}

INLINE float total(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

/* out[i] = row . q[i], integers; 64 coordinates never overflow 8 sums */
INLINE void dots(const int16_t *row, const int16_t *q, int64_t d, const int n, float *out) {
#ifdef WIDE
  __m512 f[4];
  for (int i = 0; i < n; i++) f[i] = _mm512_setzero_ps();
  for (int64_t j = 0; j < d; j += 64) {
    const int two = j + 32 < d;
    __m512i r0 = _mm512_loadu_si512(row + j), r1 = two ? _mm512_loadu_si512(row + j + 32) : _mm512_setzero_si512();
    for (int i = 0; i < n; i++) {
      const int16_t *p = q + i * d + j;
      __m512i s = _mm512_madd_epi16(r0, _mm512_loadu_si512(p));
      if (two) s = _mm512_add_epi32(s, _mm512_madd_epi16(r1, _mm512_loadu_si512(p + 32)));
      f[i] = _mm512_add_ps(f[i], _mm512_cvtepi32_ps(s));
    }
  }
  for (int i = 0; i < n; i++) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(f[i]), 1));
    out[i] = total(_mm256_add_ps(_mm512_castps512_ps256(f[i]), high));
  }
#else
  __m256 f[4];
  for (int i = 0; i < n; i++) f[i] = _mm256_setzero_ps();
  int64_t j = 0;
  for (; j + 64 <= d; j += 64) {
    const __m256i *r = (const __m256i *)(row + j);
    __m256i r0 = _mm256_loadu_si256(r), r1 = _mm256_loadu_si256(r + 1), r2 = _mm256_loadu_si256(r + 2), r3 = _mm256_loadu_si256(r + 3);
    for (int i = 0; i < n; i++) {
      const __m256i *p = (const __m256i *)(q + i * d + j);
      __m256i s = _mm256_add_epi32(_mm256_madd_epi16(r0, _mm256_loadu_si256(p)), _mm256_madd_epi16(r1, _mm256_loadu_si256(p + 1)));
      __m256i t = _mm256_add_epi32(_mm256_madd_epi16(r2, _mm256_loadu_si256(p + 2)), _mm256_madd_epi16(r3, _mm256_loadu_si256(p + 3)));
      f[i] = _mm256_add_ps(f[i], _mm256_cvtepi32_ps(_mm256_add_epi32(s, t)));
    }
  }
  if (j < d) {
    const __m256i *r = (const __m256i *)(row + j);
    __m256i r0 = _mm256_loadu_si256(r), r1 = _mm256_loadu_si256(r + 1);
    for (int i = 0; i < n; i++) {
      const __m256i *p = (const __m256i *)(q + i * d + j);
      __m256i s = _mm256_add_epi32(_mm256_madd_epi16(r0, _mm256_loadu_si256(p)), _mm256_madd_epi16(r1, _mm256_loadu_si256(p + 1)));
      f[i] = _mm256_add_ps(f[i], _mm256_cvtepi32_ps(s));
    }
  }
  if (n == 4) {
    __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(f[0], f[1]), _mm256_hadd_ps(f[2], f[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  } else {
    for (int i = 0; i < n; i++) out[i] = total(f[i]);
  }
#endif
}

/* sum[i] += scale[i] * (pairs weighted by w[i]), one unit; w: pairs of 16 bits, i apart by TOKENS */
INLINE void gather(const int16_t *pairs, int64_t count, const int16_t *w, const int n, const float *scale, float *sum, int64_t apart) {
#ifdef WIDE
  __m512i s[4][2];
  for (int i = 0; i < n; i++) s[i][0] = s[i][1] = _mm512_setzero_si512();
  for (int64_t t = 0; t < count; t++) {
    __m512i x0 = _mm512_loadu_si512(pairs + t * 64), x1 = _mm512_loadu_si512(pairs + t * 64 + 32);
    for (int i = 0; i < n; i++) {
      int32_t both;
      memcpy(&both, w + i * TOKENS + 2 * t, 4);
      __m512i y = _mm512_set1_epi32(both);
      s[i][0] = _mm512_add_epi32(s[i][0], _mm512_madd_epi16(x0, y));
      s[i][1] = _mm512_add_epi32(s[i][1], _mm512_madd_epi16(x1, y));
    }
  }
  for (int i = 0; i < n; i++)
    for (int j = 0; j < 2; j++) {
      float *p = sum + i * apart + 16 * j;
      _mm512_storeu_ps(p, _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[i][j]), _mm512_set1_ps(scale[i]), _mm512_loadu_ps(p)));
    }
#else
  __m256i s[4][4];
  for (int i = 0; i < n; i++)
    for (int j = 0; j < 4; j++) s[i][j] = _mm256_setzero_si256();
  for (int64_t t = 0; t < count; t++) {
    const __m256i *x = (const __m256i *)(pairs + t * 64);
    __m256i x0 = _mm256_load_si256(x), x1 = _mm256_load_si256(x + 1), x2 = _mm256_load_si256(x + 2), x3 = _mm256_load_si256(x + 3);
    for (int i = 0; i < n; i++) {
      int32_t both;
      memcpy(&both, w + i * TOKENS + 2 * t, 4);
      __m256i y = _mm256_set1_epi32(both);
      s[i][0] = _mm256_add_epi32(s[i][0], _mm256_madd_epi16(x0, y));
      s[i][1] = _mm256_add_epi32(s[i][1], _mm256_madd_epi16(x1, y));
      s[i][2] = _mm256_add_epi32(s[i][2], _mm256_madd_epi16(x2, y));
      s[i][3] = _mm256_add_epi32(s[i][3], _mm256_madd_epi16(x3, y));
    }
  }
  for (int i = 0; i < n; i++)
    for (int j = 0; j < 4; j++) {
      float *p = sum + i * apart + 8 * j;
      _mm256_storeu_ps(p, _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[i][j]), _mm256_set1_ps(scale[i]), _mm256_loadu_ps(p)));
    }
#endif
}
#else /* plain C */
INLINE void unpack_unit(const Book *b, const int bits, const uint8_t *row, int64_t d, int64_t u, int16_t *out, int step) {
  for (int i = 0; i < UNIT; i++) {
    int64_t j = u * UNIT + i;
    int16_t x;
    if (bits == 8)
      x = (int16_t)(2 * row[j] - 255);
    else if (bits == 4)
      x = b->level[row[j / 2] >> (4 * (j & 1)) & 15];
    else {
      int code = row[j / 4] >> (2 * (j & 3)) & 3;
      if (bits == 3) code |= (row[d / 4 + j / 8] >> (j & 7) & 1) << 2;
      x = b->level[code];
    }
    out[i * step] = x;
  }
}

INLINE void unpack_row(const Book *b, const int bits, const uint8_t *row, int64_t d, int16_t *out) {
  for (int64_t u = 0; u < d / UNIT; u++) unpack_unit(b, bits, row, d, u, out + u * UNIT, 1);
}

INLINE void unpack_pair(const Book *b, const int bits, const uint8_t *even, const uint8_t *odd, int64_t d, int64_t u, int16_t *out) {
  unpack_unit(b, bits, even, d, u, out, 2);
  unpack_unit(b, bits, odd, d, u, out + 1, 2);
}

INLINE void dots(const int16_t *row, const int16_t *q, int64_t d, const int n, float *out) {
  for (int i = 0; i < n; i++) {
    float all = 0;
    for (int64_t j = 0; j < d; j += 8) {
      int32_t s = 0;
      for (int k = 0; k < 8; k++) s += (int32_t)row[j + k] * q[i * d + j + k];
      all += (float)s;
    }
    out[i] = all;
  }
}

INLINE void gather(const int16_t *pairs, int64_t count, const int16_t *w, const int n, const float *scale, float *sum, int64_t apart) {
  for (int i = 0; i < n; i++) {
    int32_t s[UNIT] = {0};
    for (int64_t t = 0; t < count; t++)
      for (int j = 0; j < UNIT; j++)
        s[j] += (int32_t)pairs[t * 64 + 2 * j] * w[i * TOKENS + 2 * t] + (int32_t)pairs[t * 64 + 2 * j + 1] * w[i * TOKENS + 2 * t + 1];
    for (int j = 0; j < UNIT; j++) sum[i * apart + j] += scale[i] * (float)s[j];
  }
}
#endif

/* ---- the same for all */

static void set_code(uint8_t *row, int bits, int64_t d, int64_t j, int one) {
  if (bits == 8)
    row[j] = (uint8_t)(127 + one); /* integer levels -1 and 1 */
  else if (bits == 4)
    row[j / 2] |= (uint8_t)(one << (4 * (j & 1)));
  else
    row[j / 4] |= (uint8_t)(one << (2 * (j & 3)));
  (void)d;
}

/* order[position] = coordinate, of rows (for queries) and of weighted sums (for values) */
static void orders(const int bits, int64_t d, int32_t *rows, int32_t *sums, int16_t *out, int16_t *pairs, uint8_t *row) {
  Book b;
  memset(&b, 0, sizeof b);
  b.level[1] = 1, b.low[1] = 1;
  int16_t w[TOKENS] = {1};
  float one = 1.0f, got[UNIT];
  memset(rows, 0, (size_t)d * 4);
  memset(sums, 0, (size_t)d * 4);
  for (int bit = 0; bit < 10; bit++) {
    memset(row, 0, (size_t)d);
    for (int64_t j = 0; j < d; j++) set_code(row, bits, d, j, (int)(j >> bit & 1));
    unpack_row(&b, bits, row, d, out);
    for (int64_t j = 0; j < d; j++) rows[j] |= (out[j] > 0) << bit;
    for (int64_t u = 0; u < d / UNIT; u++) {
      unpack_pair(&b, bits, row, row, d, u, pairs);
      memset(got, 0, sizeof got);
      gather(pairs, 1, w, 1, &one, got, UNIT);
      for (int j = 0; j < UNIT; j++) sums[u * UNIT + j] |= (got[j] > 0) << bit;
    }
  }
}

#define PICK(bits, call) \
  do { \
    switch (bits) { \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    default: call(8); \
    } \
  } while (0)

INLINE void scores(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *q, int64_t rows, int64_t d,
                   int16_t *row, float *s, const uint8_t *next, int64_t next_bytes) {
  for (int64_t t = 0; t < n; t++) {
    float out[4];
    for (int64_t i = 0; i < next_bytes; i += 64) __builtin_prefetch(next + t * next_bytes + i);
    unpack_row(b, bits, codes + t * bytes, d, row);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      dots(row, q + r * d, d, 4, out);
      for (int i = 0; i < 4; i++) s[(r + i) * TOKENS + t] = out[i];
    }
    for (; r < rows; r++) dots(row, q + r * d, d, 1, s + r * TOKENS + t);
  }
}

INLINE void values(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *w, const float *scale,
                   int64_t rows, int64_t d, int16_t *pairs, float *sum) {
  for (int64_t u = 0; u < d / UNIT; u++) {
    for (int64_t t = 0; t < n; t += 2) { /* the weight of a missing last one is 0 */
      const uint8_t *even = codes + t * bytes;
      unpack_pair(b, bits, even, t + 1 < n ? even + bytes : even, d, u, pairs + 32 * t);
    }
    int64_t r = 0, count = (n + 1) / 2;
    float *at = sum + u * UNIT;
    for (; r + 2 <= rows; r += 2) gather(pairs, count, w + r * TOKENS, 2, scale + r, at + r * d, d);
    if (r < rows) gather(pairs, count, w + r * TOKENS, 1, scale + r, at + r * d, d);
  }
}

/* ---- the same with fp32 queries and weights: only levels are rounded, to 15 bits */

typedef int16_t Shorts __attribute__((vector_size(16), aligned(2), may_alias));

INLINE void floats(const int16_t *x, int64_t d, float *out) {
  for (int64_t j = 0; j < d; j += 8) *(Floats *)(out + j) = __builtin_convertvector(*(const Shorts *)(x + j), Floats);
}

INLINE float dot(const float *x, const float *y, int64_t d) {
  Floats a = {0}, b = {0};
  for (int64_t j = 0; j < d; j += 16) {
    a += *(const Floats *)(x + j) * *(const Floats *)(y + j);
    b += *(const Floats *)(x + j + 8) * *(const Floats *)(y + j + 8);
  }
  return add_up(a + b);
}

INLINE void scores_fp32(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const float *q, int64_t rows,
                        int64_t d, int16_t *row, float *wide_row, float *s) {
  for (int64_t t = 0; t < n; t++) {
    unpack_row(b, bits, codes + t * bytes, d, row);
    floats(row, d, wide_row);
    for (int64_t r = 0; r < rows; r++) s[r * TOKENS + t] = dot(wide_row, q + r * d, d);
  }
}

/* p: weights times gains, 0 after the last token */
INLINE void values_fp32(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const float *p, int64_t rows,
                        int64_t d, int16_t *row, float *wide_row, float *sum) {
  for (int64_t t = 0; t < n; t += 4) {
    for (int64_t i = 0; i < 4; i++) {
      unpack_row(b, bits, codes + (t + i < n ? t + i : t) * bytes, d, row);
      floats(row, d, wide_row + i * d);
    }
    for (int64_t r = 0; r < rows; r++) {
      const float *x = p + r * TOKENS + t;
      for (int64_t j = 0; j < d; j += 8) {
        const float *y = wide_row + j;
        *(Floats *)(sum + r * d + j) += (x[0] * *(const Floats *)y + x[1] * *(const Floats *)(y + d)) +
                                        (x[2] * *(const Floats *)(y + 2 * d) + x[3] * *(const Floats *)(y + 3 * d));
      }
    }
  }
}

/* Softcap and mask of n scores from a column on; -inf up to a multiple of 8 */
static void finish(const Job *job, int64_t head, int64_t r, int64_t column, int64_t n, float *s) {
  if (job->softcap > 0)
    for (int64_t t = 0; t < n; t++) s[t] = tanhf(s[t] / job->softcap) * job->softcap;
  if (job->mask) {
    int64_t b = head / job->kv_heads, h = head % job->kv_heads * job->group + r / job->count;
    int64_t at = b * job->mask_batch + h * job->mask_head + r % job->count * job->mask_row + column;
    if (job->mask_kind == 1) {
      const uint8_t *m = (const uint8_t *)job->mask + at;
      for (int64_t t = 0; t < n; t++) s[t] = m[t] ? s[t] : -INFINITY;
    } else {
      const float *m = (const float *)job->mask + at;
      for (int64_t t = 0; t < n; t++) s[t] += m[t];
    }
  }
  if (job->seen) {
    int64_t seen = job->seen + r % job->count - column;
    for (int64_t t = seen < 0 ? 0 : seen; t < n; t++) s[t] = -INFINITY;
  }
  for (int64_t t = n; t < (n + 7) / 8 * 8; t++) s[t] = -INFINITY;
}

/* One row of scores, padded with -inf to a multiple of 8 -> weights; the sum of the new weights comes back */
static float weigh(float *s, int64_t n, float *top, float *weight, float *one, int64_t d1, float *two, int64_t d2) {
  Floats *x = (Floats *)s, m = (Floats){0} + *top, a = {0};
  for (int64_t t = 0; t < n / 8; t++) m = larger(x[t], m);
  float high = largest(m);
  if (high > *top) {
    float shrink = small_exp((Floats){0} + (*top - high))[0];
    *weight *= shrink;
    for (int64_t j = 0; j < d1; j++) one[j] *= shrink;
    for (int64_t j = 0; j < d2; j++) two[j] *= shrink;
    *top = high;
  }
  for (int64_t t = 0; t < n / 8; t++) a += x[t] = small_exp(x[t] - high);
  float share = add_up(a);
  *weight += share;
  return share;
}

/* Weights times gains as 16-bit integers whose weighted sums of levels stay below 2^31; the scale of one comes back */
static float integers(const float *p, const float *gain, int64_t n, const Book *b, int16_t *w) {
  const Floats *x = (const Floats *)p, *g = (const Floats *)gain;
  Floats y[TOKENS / 8], m = {0}, a = {0};
  for (int64_t t = 0; t < n / 8; t++) {
    y[t] = x[t] * g[t];
    Floats z = (Floats)((Ints)y[t] & 0x7fffffff);
    a += z;
    m = larger(z, m);
  }
  float most = largest(m), all = add_up(a);
  if (!(most > TINY)) {
    memset(w, 0, TOKENS * sizeof *w);
    return 0;
  }
  float limit = 2147000000.0f / (float)b->top - TOKENS, up = WEIGHT / most;
  if (all * up > limit) up = limit / all;
  for (int64_t t = 0; t < n / 8; t++) {
    Ints z = __builtin_convertvector(rounded(y[t] * up), Ints);
    for (int i = 0; i < 8; i++) w[8 * t + i] = (int16_t)z[i];
  }
  return b->unit / up;
}

INLINE const float *exact_row(const void *x, int64_t kind, int64_t at, int64_t d, float *out) {
  if (kind == 2) return (const float *)x + at * d;
  const uint16_t *p = (const uint16_t *)x + at * d;
  for (int64_t j = 0; j < d; j++) out[j] = wide(p[j]);
  return out;
}

/* Exact rows a to b of a head, whose columns start at column */
static void exact(const Job *job, int64_t head, int64_t a, int64_t b, int64_t column, float *s, float *row, float *sum) {
  const int64_t d = job->d, dv = job->dv, rows = job->group * job->count;
  for (; a < b; a += TOKENS, column += TOKENS) {
    const int64_t n = b - a < TOKENS ? b - a : TOKENS, at = head * job->exact + a;
    for (int64_t t = 0; t < n; t++) {
      const float *k = exact_row(job->exact_k, job->exact_kind, at + t, d, row);
      for (int64_t r = 0; r < rows; r++) {
        const float *q = job->q_exact + (head * rows + r) * d;
        s[r * TOKENS + t] = dot(k, q, d);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      finish(job, head, r, column, n, s + r * TOKENS);
      weigh(s + r * TOKENS, (n + 7) / 8 * 8, job->top + head * rows + r, job->weight + head * rows + r, sum + r * dv, dv, NULL, 0);
    }
    for (int64_t t = 0; t < n; t++) {
      const float *v = exact_row(job->exact_v, job->exact_kind, at + t, dv, row);
      for (int64_t r = 0; r < rows; r++) {
        const float p = s[r * TOKENS + t];
        for (int64_t j = 0; j < dv; j += 8) *(Floats *)(sum + r * dv + j) += p * *(const Floats *)(v + j);
      }
    }
  }
}

/* 0, or 1 where memory ran out and nothing was changed. */
int tqai_attend(const Job *job) {
  const int64_t d = job->d, dv = job->dv, rows = job->group * job->count, wide_d = d > dv ? d : dv;
  const Book bk = book(job->bits_k, job->level_k, job->precise ? 32767 : LEVEL_K),
             bv = book(job->bits_v, job->level_v, job->precise ? 32767 : LEVEL_V);
  const int64_t bytes_k = d * job->bits_k / 8, bytes_v = dv * job->bits_v / 8;
  const int64_t sizes[] = {rows * d * 4, rows * dv * 4, rows * TOKENS * 4, rows * TOKENS * 2, rows * 4, rows * 4, rows,
                           wide_d * 16,  TOKENS * 64,   d * 4,             dv * 4,            wide_d * 4, wide_d};
  int64_t at[13], need = 64;
  for (int i = 0; i < 13; i++) at[i] = need, need += (sizes[i] + 63) / 64 * 64;
  uint8_t *memory = malloc((size_t)need);
  if (!memory) return 1;
  uint8_t *base = (uint8_t *)(((uintptr_t)memory + 63) / 64 * 64) - 64;
#define PART(type, i) ((type *)(base + at[i]))
  int16_t *q = PART(int16_t, 0), *w = PART(int16_t, 3), *row = PART(int16_t, 11), *pairs = PART(int16_t, 8);
  float *q_fp32 = PART(float, 0), *wide_row = PART(float, 7), *sum = PART(float, 1), *s = PART(float, 2), *unit = PART(float, 4), *scale = PART(float, 5);
  uint8_t *bad = PART(uint8_t, 6), *probe = PART(uint8_t, 12);
  int32_t *order_k = PART(int32_t, 9), *order_v = PART(int32_t, 10), *other = PART(int32_t, 7);
  float gain_k[TOKENS], gain_v[TOKENS];
  orders(bk.bits, d, order_k, other, row, pairs, probe);
  orders(bv.bits, dv, job->precise ? order_v : other, job->precise ? other : order_v, row, pairs, probe);

  for (int64_t head = 0; head < job->heads; head++) {
    float *top = job->top + head * rows, *weight = job->weight + head * rows;
    float *out = job->sum + head * rows * dv, *out_exact = job->sum_exact + head * rows * dv;
    memset(sum, 0, (size_t)(rows * dv) * 4);
    memset(out_exact, 0, (size_t)(rows * dv) * 4);
    exact(job, head, 0, job->front, 0, s, wide_row, out_exact);
    exact(job, head, job->front, job->exact, job->after, s, wide_row, out_exact);
    for (int64_t r = 0; r < rows; r++) {
      const float *x = job->q + (head * rows + r) * d;
      float most = 0;
      bad[r] = job->shift && !isfinite(job->shift[head * rows + r]);
      for (int64_t j = 0; j < d; j++) {
        most = fmaxf(most, fabsf(x[j]));
        bad[r] |= !isfinite(x[j]);
      }
      float up = bad[r] || !(most > TINY) ? 0 : QUERY(bk.top) / most;
      unit[r] = up > 0 ? bk.unit / up : 0;
      if (job->precise) {
        unit[r] = bk.unit;
        for (int64_t j = 0; j < d; j++) q_fp32[r * d + j] = x[order_k[j]];
        continue;
      }
      for (int64_t j = 0; j < d; j++) q[r * d + j] = up > 0 ? (int16_t)lrintf(x[order_k[j]] * up) : 0;
    }
    int64_t column = job->first;
    for (int64_t g = 0; g < job->segment_count; g++) {
      const Segment *seg = job->segments + g;
      const int64_t step = job->read ? job->read_block : TOKENS;
      for (int64_t t0 = 0; t0 < seg->tokens; t0 += step) {
        if (job->read && !job->read[head * job->read_head + (column - job->first + t0) / step]) continue;
        const int64_t n = seg->tokens - t0 < step ? seg->tokens - t0 : step, even = (n + 7) / 8 * 8;
        const int64_t at = head * seg->tokens + t0;
        for (int64_t t = 0; t < n; t++) gain_k[t] = wide(seg->gain_k[at + t]), gain_v[t] = wide(seg->gain_v[at + t]);
        for (int64_t t = n; t < even; t++) gain_k[t] = gain_v[t] = 0;
        const uint8_t *codes_k = seg->codes_k + at * bytes_k, *codes_v = seg->codes_v + at * bytes_v;
#define SCORES(bits) scores(&bk, bits, codes_k, bytes_k, n, q, rows, d, row, s, codes_v, bytes_v)
#define SCORES_FP32(bits) scores_fp32(&bk, bits, codes_k, bytes_k, n, q_fp32, rows, d, row, wide_row, s)
        if (job->precise)
          PICK(job->bits_k, SCORES_FP32);
        else
          PICK(job->bits_k, SCORES);
        int needed = 0;
        for (int64_t r = 0; r < rows; r++) {
          float *x = s + r * TOKENS, more = job->shift ? job->shift[head * rows + r] : 0.0f;
          for (int64_t t = 0; t < n; t++) x[t] = x[t] * unit[r] * gain_k[t] + more;
          finish(job, head, r, column + t0, n, x);
          float share = weigh(x, even, top + r, weight + r, sum + r * dv, dv, out_exact + r * dv, dv);
          needed |= share > weight[r] * NEGLIGIBLE;
          if (job->precise)
            for (int64_t t = 0; t < even; t++) x[t] *= gain_v[t] * bv.unit;
          else
            scale[r] = integers(x, gain_v, even, &bv, w + r * TOKENS);
        }
        if (!needed) continue;
#define VALUES(bits) values(&bv, bits, codes_v, bytes_v, n, w, scale, rows, dv, pairs, sum)
#define VALUES_FP32(bits) values_fp32(&bv, bits, codes_v, bytes_v, n, s, rows, dv, row, wide_row, sum)
        if (job->precise)
          PICK(job->bits_v, VALUES_FP32);
        else
          PICK(job->bits_v, VALUES);
      }
      column += seg->tokens;
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = 0; j < dv; j++) out[r * dv + order_v[j]] = bad[r] ? NAN : sum[r * dv + j];
      if (bad[r]) weight[r] = NAN;
    }
  }
  free(memory);
  return 0;
}

/* The name of the instruction set, for reports. */
const char *tqai_kind(void) {
#if defined(WIDE)
  return "avx512";
#elif defined(VECTOR)
  return "avx2";
#else
  return "plain C";
#endif
}
