/* Decode attention over packed rows (codecs/rows.py has the bytes of a row), for a few query rows a head.
 *
 * Levels and queries are 16-bit integers while they meet: a byte shuffle looks 32 or 64 levels up at once, and one instruction
 * multiplies and adds pairs. Levels are exact, each query and every 64 weights keep 15 bits and a scale of their own; sums go
 * to fp32 before 32 bits could overflow. What this rounds away is below 1e-4 of the result; 8 bits would round away 1e-2. The
 * softmax is online (1805.02867) and in fp32.
 *
 * Queries that come in fp32 keep 30 bits, as two digits of 15, and weights share a scale by 32 tokens: half of the rounding.
 *
 * Each instruction set unpacks coordinates in the order that suits it. Nothing here knows that order: it is read off once a
 * call by unpacking rows whose levels spell the number of the coordinate.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <pthread.h>
#endif

#if defined(TQAI_PLAIN)
#elif defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX2__)
#define WIDE 1 /* Ice Lake and later, Zen 4 and later; older AVX512 takes the path of AVX2 */
#define VECTOR 1
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR 1
#endif
#ifdef VECTOR
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define TOKENS 64 /* that share one rescaling */
#define FEWER 32  /* whose weights share a scale, of fp32 queries */
#define UNIT 32   /* coordinates unpacked together */
#define QUERY 32767 /* 8 x 8191 x 32767 < 2^31 */
#define DIGIT 32768 /* a unit of the first digit of a query in units of the second */
#define WEIGHT 32767
#define TINY 1e-33f
#define NEGLIGIBLE 1e-6f
#define RUNS 2
#define THREADS 64

typedef struct {
  int bits, top;     /* top: the largest integer level without its sign */
  int16_t level[64]; /* unused for 8 bits: 2 code - 255 */
  uint8_t low[64], high[64];
  float unit; /* level = integer * unit */
} Book;

typedef struct {
  const uint8_t *codes_k;
  const uint16_t *gain_k;
  const uint8_t *codes_v;
  const uint16_t *gain_v; /* [heads, tokens, runs] */
  int64_t tokens;
} Segment;

typedef struct { /* neighbouring coordinates of a row of values that have bits and a gain of their own */
  int64_t d, bits;
  const float *level, *back; /* back [d, d] takes them out of the rotated domain */
  int64_t back_head;         /* from one head's matrix to the next; 0: all share one */
} Run;

typedef struct {
  int64_t heads, kv_heads, group, count, d, dv, bits_k, runs; /* heads: batch x kv_heads; rows of a head: group x count */
  const float *level_k;
  const Run *run;
  const Segment *segments;
  int64_t segment_count, first; /* column of the first packed token */
  const float *q, *forward;     /* [heads, rows, d]; [d, d], into the rotated domain */
  const float *mean, *scale;    /* of the packed keys [heads, d], or both NULL */
  const int8_t *basis;          /* of the packed values [kv_heads, axes, dv]: reflections, the last one first; or NULL */
  int64_t axes, forward_head; /* from one head's forward to the next; 0: all share one */
  const void *exact_k, *exact_v; /* [heads, exact, d] and [heads, exact, dv]; the first ones lie before the packed tokens */
  int64_t exact, front, exact_kind; /* 1: bf16, 2: fp32 */
  const void *mask;                 /* or NULL */
  int64_t mask_kind, mask_batch, mask_head, mask_row; /* 1: bytes, 0 hides; 2: fp32, added; strides in elements */
  int64_t seen;                                       /* columns that the first query sees, the next one more; 0: all */
  int64_t after;                                      /* column of the exact row number front */
  int64_t precise;                                    /* queries of two digits */
  float softcap;                                      /* 0: none */
  float *top, *weight;     /* [heads, rows]: where the softmax stands; changed */
  float *sum;              /* [heads, rows, dv]: written */
  const uint8_t *read;     /* or NULL: which blocks of packed tokens a head reads, 0 leaves one out */
  int64_t read_head, read_block; /* blocks of a head; tokens of a block, a divisor of TOKENS and of each segment */
} Job;

INLINE float wide(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

#ifdef WIDE
#define LANES 16
#else
#define LANES 8
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* on any machine */
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE Floats rounded(Floats x) { return (x + 12582912.0f) - 12582912.0f; } /* |x| < 2^22 */
INLINE Floats choose(Ints yes, Floats a, Floats b) { return (Floats)(((Ints)a & yes) | ((Ints)b & ~yes)); }
INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
#ifdef WIDE
INLINE float add_up(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE float add_up(Floats x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }
INLINE float largest(Floats x) {
  float m = x[0];
  for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
  return m;
}
#endif
INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

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

/* Levels as integers: codecs/rows.py has them on multiples of 1 / 2048, below 4 */
static Book book(int64_t bits, const float *level) {
  Book b;
  memset(&b, 0, sizeof b);
  b.bits = (int)bits;
  b.unit = bits == 8 ? 0.5f : 1.0f / 2048;
  b.top = bits == 8 ? 255 : 1;
  if (bits < 8)
    for (int i = 0; i < 1 << bits; i++) {
      b.level[i] = (int16_t)lrintf(level[i] * 2048);
      b.top = abs(b.level[i]) > b.top ? abs(b.level[i]) : b.top;
    }
  for (int i = 0; i < 64; i++) b.low[i] = (uint8_t)b.level[i], b.high[i] = (uint8_t)((uint16_t)b.level[i] >> 8);
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
  __m256i c, over = _mm256_setzero_si256(); /* over: bits 4 and 5 of a code */
  if (bits >= 4) {
    __m128i x = _mm_loadu_si128((const __m128i *)(row + u * 16));
    c = _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1), _mm256_set1_epi8(15));
    if (bits == 5) { /* byte m of the first half: coordinate 2 m, of the second 2 m + 1 */
      int32_t y;
      memcpy(&y, row + d / 2 + u * 4, 4);
      const __m256i from = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      const __m256i bit = _mm256_setr_epi64x(0x4010040140100401, 0x4010040140100401, (long long)0x8020080280200802ULL, (long long)0x8020080280200802ULL);
      __m256i h = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(y), from), bit);
      over = _mm256_and_si256(_mm256_cmpeq_epi8(h, bit), _mm256_set1_epi8(16));
    } else if (bits == 6) {
      __m128i y = _mm_loadl_epi64((const __m128i *)(row + d / 2 + u * 8));
      y = _mm_unpacklo_epi8(y, _mm_srli_epi16(y, 4)); /* half byte m: coordinates 2 m and 2 m + 1 */
      over = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_slli_epi16(_mm_and_si128(y, _mm_set1_epi8(3)), 4)),
                                     _mm_slli_epi16(_mm_and_si128(y, _mm_set1_epi8(12)), 2), 1);
    }
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
  for (int i = 1; i < (bits == 6 ? 4 : bits == 5 ? 2 : 1); i++) {
    __m256i here = _mm256_cmpeq_epi8(over, _mm256_set1_epi8((char)(16 * i)));
    low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(table(b->low + 16 * i), c), here);
    high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(table(b->high + 16 * i), c), here);
  }
  out.a = _mm256_unpacklo_epi8(low, high);
  out.b = _mm256_unpackhi_epi8(low, high);
  return out;
}

#ifdef WIDE
typedef struct {
  __m512i a, b;
} Wide;

/* 64 codes; byte m < 32: coordinate 2 m, m >= 32: 2 (m - 32) + 1, and for 2 and 3 bits byte 16 i + m: coordinate 4 m + i */
INLINE __m512i codes64(const int bits, const uint8_t *row, int64_t d, int64_t u) {
  /* the place of a coordinate's bit, so that it ends up at bit 2 or 4: of byte m + 1 always the same number further on */
#define EIGHT(first, step) ((((first) + 0ULL * (step)) & 63) | (((first) + 1ULL * (step)) & 63) << 8 | (((first) + 2ULL * (step)) & 63) << 16 | \
  (((first) + 3ULL * (step)) & 63) << 24 | (((first) + 4ULL * (step)) & 63) << 32 | (((first) + 5ULL * (step)) & 63) << 40 | \
  (((first) + 6ULL * (step)) & 63) << 48 | (((first) + 7ULL * (step)) & 63) << 56)
#define PLACES(f, step) _mm512_setr_epi64((long long)EIGHT(f(0), step), (long long)EIGHT(f(1), step), (long long)EIGHT(f(2), step), \
  (long long)EIGHT(f(3), step), (long long)EIGHT(f(4), step), (long long)EIGHT(f(5), step), (long long)EIGHT(f(6), step), (long long)EIGHT(f(7), step))
  if (bits >= 4) {
    __m256i x = _mm256_loadu_si256((const __m256i *)(row + u * 32));
    __m512i c = _mm512_and_si512(_mm512_inserti64x4(_mm512_castsi256_si512(x), _mm256_srli_epi16(x, 4), 1), _mm512_set1_epi8(15));
    if (bits == 5) {
#define AT5(q) (16ULL * ((q) & 3) + ((q) >> 2) + 60)
      int64_t y;
      memcpy(&y, row + d / 2 + u * 8, 8);
      __m512i h = _mm512_multishift_epi64_epi8(PLACES(AT5, 2), _mm512_set1_epi64(y));
      c = _mm512_ternarylogic_epi64(c, h, _mm512_set1_epi8(16), 0xf8); /* c | h & 16 */
    } else if (bits == 6) {
#define AT6(q) (32ULL * ((q) & 1) + 2 * ((q) >> 2) + 60)
      __m128i y = _mm_loadu_si128((const __m128i *)(row + d / 2 + u * 16));
      __m512i from = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 0, 0, 1, 1), _mm512_castsi128_si512(y));
      c = _mm512_ternarylogic_epi64(c, _mm512_multishift_epi64_epi8(PLACES(AT6, 4), from), _mm512_set1_epi8(48), 0xf8);
    }
    return c;
  }
  __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(row + u * 16)));
  __m512i c = _mm512_and_si512(_mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6)), _mm512_set1_epi8(3));
  if (bits == 3) {
#define AT3(q) (32ULL * ((q) & 1) + ((q) >> 1) + 62)
    int64_t y;
    memcpy(&y, row + d / 4 + u * 8, 8);
    __m512i h = _mm512_multishift_epi64_epi8(PLACES(AT3, 4), _mm512_set1_epi64(y));
    c = _mm512_ternarylogic_epi64(c, h, _mm512_set1_epi8(4), 0xf8);
  }
  return c;
}

INLINE Wide unpack64(const Book *b, const int bits, const uint8_t *row, int64_t d, int64_t u) {
  Wide out;
  if (bits == 8) {
    const __m512i less = _mm512_set1_epi16(255);
    const __m256i *p = (const __m256i *)(row + u * 64);
    out.a = _mm512_sub_epi16(_mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(p)), 1), less);
    out.b = _mm512_sub_epi16(_mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(p + 1)), 1), less);
    return out;
  }
  __m512i c = codes64(bits, row, d, u);
  __m512i low = _mm512_permutexvar_epi8(c, _mm512_loadu_si512(b->low)), high = _mm512_permutexvar_epi8(c, _mm512_loadu_si512(b->high));
  out.a = _mm512_unpacklo_epi8(low, high);
  out.b = _mm512_unpackhi_epi8(low, high);
  return out;
}

/* the last 32 of an odd number of units */
INLINE __m512i unpack32(const Book *b, const int bits, const uint8_t *row, int64_t d) {
  Pair x = unpack(b, bits, row, d, d / UNIT - 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(x.a), x.b, 1);
}

INLINE void unpack_row(const Book *b, const int bits, const uint8_t *row, int64_t d, int16_t *out) {
  int64_t j = 0;
  for (; j + 64 <= d; j += 64) {
    Wide x = unpack64(b, bits, row, d, j / 64);
    _mm512_storeu_si512(out + j, x.a);
    _mm512_storeu_si512(out + j + 32, x.b);
  }
  if (j < d) _mm512_storeu_si512(out + j, unpack32(b, bits, row, d));
}

/* four accumulators -> in every quarter the four sums of that quarter */
INLINE __m512 fold(const __m512 *x) {
  __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)), high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

/* four of those -> quarter i: the sums of the i-th */
INLINE __m512 join(const __m512 *x) {
  __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
  __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* out[i] = row i of four, d apart, . q: 16 partial sums each; 128 coordinates never overflow them. The second digit lies apart */
INLINE void dots(const int16_t *row, const int16_t *q, int64_t apart, const int digits, int64_t d, __m512 *out) {
  for (int64_t first = 0; first < d; first += 128) {
    const int64_t last = first + 128 < d ? first + 128 : d;
    __m512i s[4][2];
    for (int i = 0; i < 4; i++) s[i][0] = s[i][1] = _mm512_setzero_si512();
    for (int64_t j = first; j < last; j += 32)
      for (int g = 0; g < digits; g++) {
        __m512i y = _mm512_loadu_si512(q + g * apart + j);
        for (int i = 0; i < 4; i++) s[i][g] = _mm512_dpwssd_epi32(s[i][g], y, _mm512_loadu_si512(row + i * d + j));
      }
    for (int i = 0; i < 4; i++) {
      __m512 x = _mm512_cvtepi32_ps(s[i][0]);
      if (digits == 2) x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[i][1]), _mm512_set1_ps(1.0f / DIGIT), x);
      out[i] = first > 0 ? _mm512_add_ps(out[i], x) : x;
    }
  }
}

INLINE void scores(const Book *b, const int bits, const int digits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *q,
                   int64_t rows, int64_t apart, int64_t d, int16_t *row, float *s, const uint8_t *next, int64_t next_bytes) {
  __m512 f[4], g[4];
  for (int i = 0; i < 4; i++) f[i] = g[i] = _mm512_setzero_ps();
  for (int64_t t = 0; t < n; t++)
    for (int64_t i = 0; i < next_bytes; i += 64) __builtin_prefetch(next + t * next_bytes + i);
  for (int64_t t = 0; t < n; t += 4) {
    for (int64_t i = 0; i < 4; i++) unpack_row(b, bits, codes + (t + i < n ? t + i : n - 1) * bytes, d, row + i * d);
    if (rows == 1) {
      dots(row, q, apart, digits, d, f);
      g[t / 4 % 4] = fold(f);
      if (t % 16 == 12 || t + 4 >= n) _mm512_storeu_ps(s + t / 16 * 16, join(g));
      continue;
    }
    for (int64_t r = 0; r < rows; r += 4) { /* scores of padding are never read */
      for (int64_t j = 0; j < 4 && r + j < rows; j++) {
        dots(row, q + (r + j) * d, apart, digits, d, f);
        g[j] = fold(f);
      }
      __m512 x = join(g);
      float *to = s + r * TOKENS + t;
      _mm_storeu_ps(to, _mm512_castps512_ps128(x));
      _mm_storeu_ps(to + TOKENS, _mm512_extractf32x4_ps(x, 1));
      _mm_storeu_ps(to + 2 * TOKENS, _mm512_extractf32x4_ps(x, 2));
      _mm_storeu_ps(to + 3 * TOKENS, _mm512_extractf32x4_ps(x, 3));
    }
  }
}

/* sum[i] += scale[i] * (rows weighted by w[i]), 64 coordinates or the last 32 */
INLINE void gather(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *w, const float *scale,
                   const int m, int64_t d, int64_t u, const int parts, float *sum, int64_t apart) {
  __m512i s[4][4];
  for (int i = 0; i < m; i++)
    for (int j = 0; j < parts; j++) s[i][j] = _mm512_setzero_si512();
  for (int64_t t = 0; t < n; t += 2) { /* the weight of a missing last one is 0 */
    const uint8_t *even = codes + t * bytes, *odd = t + 1 < n ? even + bytes : even;
    __m512i x[4];
    if (parts == 4) {
      Wide y = unpack64(b, bits, even, d, u), z = unpack64(b, bits, odd, d, u);
      x[0] = _mm512_unpacklo_epi16(y.a, z.a), x[1] = _mm512_unpackhi_epi16(y.a, z.a);
      x[2] = _mm512_unpacklo_epi16(y.b, z.b), x[3] = _mm512_unpackhi_epi16(y.b, z.b);
    } else {
      __m512i y = unpack32(b, bits, even, d), z = unpack32(b, bits, odd, d);
      x[0] = _mm512_unpacklo_epi16(y, z), x[1] = _mm512_unpackhi_epi16(y, z);
    }
    for (int i = 0; i < m; i++) {
      int32_t both;
      memcpy(&both, w + i * TOKENS + t, 4);
      __m512i y = _mm512_set1_epi32(both);
      for (int j = 0; j < parts; j++) s[i][j] = _mm512_dpwssd_epi32(s[i][j], x[j], y);
    }
  }
  for (int i = 0; i < m; i++)
    for (int j = 0; j < parts; j++) {
      float *p = sum + i * apart + 16 * j;
      _mm512_storeu_ps(p, _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[i][j]), _mm512_set1_ps(scale[i]), _mm512_loadu_ps(p)));
    }
}

INLINE void values(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *w, const float *scale,
                   int64_t rows, int64_t d, int16_t *pairs, float *sum, int64_t apart) {
  (void)pairs;
  for (int64_t r = 0; r < rows; r += 4) {
    const int16_t *own = w + r * TOKENS;
    float *at = sum + r * apart;
    int64_t u = 0;
    for (; u < d / 64; u++)
      if (rows == 1)
        gather(b, bits, codes, bytes, n, own, scale + r, 1, d, u, 4, at + u * 64, apart);
      else
        gather(b, bits, codes, bytes, n, own, scale + r, 4, d, u, 4, at + u * 64, apart);
    if (u * 64 < d) {
      if (rows == 1)
        gather(b, bits, codes, bytes, n, own, scale + r, 1, d, u, 2, at + u * 64, apart);
      else
        gather(b, bits, codes, bytes, n, own, scale + r, 4, d, u, 2, at + u * 64, apart);
    }
  }
}
#else /* AVX2 */
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
}

/* sum[i] += scale[i] * (pairs weighted by w[i]), one unit; w: pairs of 16 bits, i apart by TOKENS */
INLINE void gather(const int16_t *pairs, int64_t count, const int16_t *w, const int n, const float *scale, float *sum, int64_t apart) {
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
}
#endif
#else /* plain C */
INLINE void unpack_unit(const Book *b, const int bits, const uint8_t *row, int64_t d, int64_t u, int16_t *out, int step) {
  for (int i = 0; i < UNIT; i++) {
    int64_t j = u * UNIT + i;
    int16_t x;
    if (bits == 8)
      x = (int16_t)(2 * row[j] - 255);
    else if (bits >= 4) {
      int code = row[j / 2] >> (4 * (j & 1)) & 15;
      if (bits == 5) code |= (row[d / 2 + j / 8] >> (j & 7) & 1) << 4;
      if (bits == 6) code |= (row[d / 2 + j / 4] >> (2 * (j & 3)) & 3) << 4;
      x = b->level[code];
    } else {
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

#ifndef WIDE
INLINE void scores(const Book *b, const int bits, const int digits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *q,
                   int64_t rows, int64_t apart, int64_t d, int16_t *row, float *s, const uint8_t *next, int64_t next_bytes) {
  for (int64_t t = 0; t < n; t++) {
    for (int64_t i = 0; i < next_bytes; i += 64) __builtin_prefetch(next + t * next_bytes + i);
    unpack_row(b, bits, codes + t * bytes, d, row);
    for (int64_t r = 0; r < rows; r += 4) {
      const int count = rows - r < 4 ? (int)(rows - r) : 4;
      float out[4] = {0}, fine[4] = {0};
      for (int g = 0; g < digits; g++) {
        if (count == 4)
          dots(row, q + g * apart + r * d, d, 4, g ? fine : out);
        else
          for (int i = 0; i < count; i++) dots(row, q + g * apart + (r + i) * d, d, 1, (g ? fine : out) + i);
      }
      for (int i = 0; i < count; i++) s[(r + i) * TOKENS + t] = out[i] + fine[i] * (1.0f / DIGIT);
    }
  }
}

INLINE void values(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *w, const float *scale,
                   int64_t rows, int64_t d, int16_t *pairs, float *sum, int64_t apart) {
  for (int64_t u = 0; u < d / UNIT; u++) {
    for (int64_t t = 0; t < n; t += 2) { /* the weight of a missing last one is 0 */
      const uint8_t *even = codes + t * bytes;
      unpack_pair(b, bits, even, t + 1 < n ? even + bytes : even, d, u, pairs + 32 * t);
    }
    int64_t r = 0, count = (n + 1) / 2;
    float *at = sum + u * UNIT;
    for (; r + 2 <= rows; r += 2) gather(pairs, count, w + r * TOKENS, 2, scale + r, at + r * apart, apart);
    if (r < rows) gather(pairs, count, w + r * TOKENS, 1, scale + r, at + r * apart, apart);
  }
}
#endif

/* ---- the same for all */

static void set_code(uint8_t *row, int bits, int64_t d, int64_t j, int one) {
  if (bits == 8)
    row[j] = (uint8_t)(127 + one); /* integer levels -1 and 1 */
  else if (bits >= 4)
    row[j / 2] |= (uint8_t)(one << (4 * (j & 1)));
  else
    row[j / 4] |= (uint8_t)(one << (2 * (j & 3)));
  (void)d;
}

#define PICK(bits, call) \
  do { \
    switch (bits) { \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    case 6: call(6); break; \
    default: call(8); \
    } \
  } while (0)

/* Functions of their own, and loops over the usual head dimensions that the compiler can unroll: twice as fast */
#define OF_BITS(bits) \
  static __attribute__((noinline)) void scores_##bits(const Book *b, int digits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *q, \
      int64_t rows, int64_t apart, int64_t d, int16_t *row, float *s, const uint8_t *next, int64_t next_bytes) { \
    if (digits == 2 && d == 64) scores(b, bits, 2, codes, bytes, n, q, rows, apart, 64, row, s, next, next_bytes); \
    else if (digits == 2 && d == 128) scores(b, bits, 2, codes, bytes, n, q, rows, apart, 128, row, s, next, next_bytes); \
    else if (digits == 2) scores(b, bits, 2, codes, bytes, n, q, rows, apart, d, row, s, next, next_bytes); \
    else if (d == 64) scores(b, bits, 1, codes, bytes, n, q, rows, apart, 64, row, s, next, next_bytes); \
    else if (d == 128) scores(b, bits, 1, codes, bytes, n, q, rows, apart, 128, row, s, next, next_bytes); \
    else scores(b, bits, 1, codes, bytes, n, q, rows, apart, d, row, s, next, next_bytes); \
  } \
  static __attribute__((noinline)) void values_##bits(const Book *b, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *w, \
      const float *scale, int64_t rows, int64_t d, int16_t *pairs, float *sum, int64_t apart) { \
    values(b, bits, codes, bytes, n, w, scale, rows, d, pairs, sum, apart); \
  }
OF_BITS(2)
OF_BITS(3)
OF_BITS(4)
OF_BITS(5)
OF_BITS(6)
OF_BITS(8)

/* order[position] = coordinate, of rows (for queries) and of weighted sums (for values) */
static void orders(const int bits, int64_t d, int32_t *rows, int32_t *sums, int16_t *out, int16_t *pairs, float *got, uint8_t *row) {
  Book b;
  memset(&b, 0, sizeof b);
  b.level[1] = 1, b.low[1] = 1;
  int16_t w[TOKENS] = {1};
  float one = 1.0f;
  if (d <= 0) return;
  memset(rows, 0, (size_t)d * 4);
  memset(sums, 0, (size_t)d * 4);
  for (int bit = 0; bit < 10; bit++) {
    memset(row, 0, (size_t)d);
    for (int64_t j = 0; j < d; j++) set_code(row, bits, d, j, (int)(j >> bit & 1));
    memset(got, 0, (size_t)d * 4);
#define PROBE(bits) unpack_row(&b, bits, row, d, out); values_##bits(&b, row, d * bits / 8, 1, w, &one, 1, d, pairs, got, d)
    PICK(bits, PROBE);
    for (int64_t j = 0; j < d; j++) rows[j] |= (out[j] > 0) << bit, sums[j] |= (got[j] > 0) << bit;
  }
}

INLINE float dot(const float *x, const float *y, int64_t d) {
  Floats a = {0}, b = {0};
  for (int64_t j = 0; j < d; j += 2 * LANES) {
    a += *(const Floats *)(x + j) * *(const Floats *)(y + j);
    b += *(const Floats *)(x + j + LANES) * *(const Floats *)(y + j + LANES);
  }
  return add_up(a + b);
}

/* Softcap and mask of n scores from a column on; -inf up to a whole vector */
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
  for (int64_t t = n; t < whole(n); t++) s[t] = -INFINITY;
}

/* One row of scores, padded with -inf to whole vectors -> weights; the sum of the new weights comes back */
static float weigh(float *s, int64_t n, float *top, float *weight, float *one, int64_t d1, float *two, int64_t d2) {
  Floats *x = (Floats *)s, m = (Floats){0} + *top, a = {0};
  for (int64_t t = 0; t < n / LANES; t++) m = larger(x[t], m);
  float high = largest(m);
  if (high > *top) {
    float shrink = small_exp((Floats){0} + (*top - high))[0];
    *weight *= shrink;
    for (int64_t j = 0; j < d1; j++) one[j] *= shrink;
    for (int64_t j = 0; j < d2; j++) two[j] *= shrink;
    *top = high;
  }
  for (int64_t t = 0; t < n / LANES; t++) a += x[t] = small_exp(x[t] - high);
  float share = add_up(a);
  *weight += share;
  return share;
}

/* Weights times gains as 16-bit integers whose weighted sums of levels stay below 2^31; the scale of one comes back */
static float integers(const float *p, const float *gain, int64_t n, const Book *b, int16_t *w) {
  const Floats *x = (const Floats *)p, *g = (const Floats *)gain;
  Floats y[TOKENS / LANES], m = {0}, a = {0};
  for (int64_t t = 0; t < n / LANES; t++) {
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
  for (int64_t t = 0; t < n / LANES; t++) {
    ((Shorts *)w)[t] = __builtin_convertvector(__builtin_convertvector(rounded(y[t] * up), Ints), Shorts);
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
        const float *q = job->q + (head * rows + r) * d;
        s[r * TOKENS + t] = dot(k, q, d);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      finish(job, head, r, column, n, s + r * TOKENS);
      weigh(s + r * TOKENS, whole(n), job->top + head * rows + r, job->weight + head * rows + r, sum + r * dv, dv, NULL, 0);
    }
    for (int64_t t = 0; t < n; t++) {
      const float *v = exact_row(job->exact_v, job->exact_kind, at + t, dv, row);
      for (int64_t r = 0; r < rows; r++) {
        const float p = s[r * TOKENS + t];
        for (int64_t j = 0; j < dv; j += LANES) *(Floats *)(sum + r * dv + j) += p * *(const Floats *)(v + j);
      }
    }
  }
}

/* y = x m for x [n], m [n, n] */
INLINE void product(const float *x, const float *m, int64_t n, float *y) {
  memset(y, 0, (size_t)n * 4);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j += LANES) *(Floats *)(y + j) += x[i] * *(const Floats *)(m + i * n + j);
}

/* x (I - 2 v v' / v'v) for all reflections, the last one first; v is room for d numbers */
static void reflect(float *x, const int8_t *basis, int64_t axes, int64_t d, float *v) {
  for (int64_t i = axes - 1; i >= 0; i--) {
    float length = 0, along = 0;
    for (int64_t j = 0; j < d; j++) v[j] = (float)basis[i * d + j], length += v[j] * v[j];
    along = 2 * dot(x, v, d) / (length > 0 ? length : 1);
    for (int64_t j = 0; j < d; j++) x[j] -= along * v[j];
  }
}

/* 0, or 1 where memory ran out. */
static int attend(const Job *job) {
  const int64_t d = job->d, dv = job->dv, rows = job->group * job->count, wide_d = d > dv ? d : dv, runs = job->runs;
  const int64_t room = rows == 1 ? 1 : (rows + 3) / 4 * 4; /* further rows are zero */
  const Book bk = book(job->bits_k, job->level_k);
  Book bv[RUNS];
  int64_t bytes_v = 0;
  for (int64_t i = 0; i < runs; i++) {
    bv[i] = book(job->run[i].bits, job->run[i].level);
    bytes_v += job->run[i].d * job->run[i].bits / 8;
  }
  const int64_t bytes_k = d * job->bits_k / 8;
  const int64_t sizes[] = {room * d * 4, room * dv * 4, room * TOKENS * 4, room * TOKENS * 2, room * 4, room * 4, room,
                           wide_d * 16,  TOKENS * 64,   d * 4,             dv * 4,            wide_d * 8, wide_d, rows * dv * 4, rows * 4};
  int64_t at[15], need = 64;
  for (int i = 0; i < 15; i++) at[i] = need, need += (sizes[i] + 63) / 64 * 64;
  uint8_t *memory = malloc((size_t)need);
  if (!memory) return 1;
  uint8_t *base = (uint8_t *)(((uintptr_t)memory + 63) / 64 * 64) - 64;
#define PART(type, i) ((type *)(base + at[i]))
  int16_t *q = PART(int16_t, 0), *w = PART(int16_t, 3), *row = PART(int16_t, 11), *pairs = PART(int16_t, 8);
  float *wide_row = PART(float, 7), *sum = PART(float, 1), *s = PART(float, 2), *unit = PART(float, 4), *scale = PART(float, 5);
  float *out_exact = PART(float, 13), *shift = PART(float, 14);
  uint8_t *bad = PART(uint8_t, 6), *probe = PART(uint8_t, 12);
  int32_t *order_k = PART(int32_t, 9), *order_v = PART(int32_t, 10), *other = PART(int32_t, 7);
  float gain_k[TOKENS], gain_v[RUNS][TOKENS];
  memset(q, 0, (size_t)(room * d) * 4);
  memset(w, 0, (size_t)(room * TOKENS) * 2);
  memset(scale, 0, (size_t)room * 4);
  orders(bk.bits, d, order_k, other, row, pairs, wide_row + wide_d, probe);
  for (int64_t i = 0, j = 0; i < runs; j += job->run[i++].d)
    orders(bv[i].bits, job->run[i].d, other, order_v + j, row, pairs, wide_row + wide_d, probe);

  for (int64_t head = 0; head < job->heads; head++) {
    float *top = job->top + head * rows, *weight = job->weight + head * rows;
    float *out = job->sum + head * rows * dv;
    memset(sum, 0, (size_t)(room * dv) * 4);
    memset(out_exact, 0, (size_t)(rows * dv) * 4);
    exact(job, head, 0, job->front, 0, s, wide_row, out_exact);
    exact(job, head, job->front, job->exact, job->after, s, wide_row, out_exact);
    for (int64_t r = 0; r < rows; r++) {
      float *x = wide_row, *y = wide_row + wide_d, most = 0;
      memcpy(y, job->q + (head * rows + r) * d, (size_t)d * 4);
      shift[r] = job->mean ? dot(y, job->mean + head * d, d) : 0;
      bad[r] = !isfinite(shift[r]);
      if (job->scale)
        for (int64_t j = 0; j < d; j++) y[j] *= job->scale[head * d + j];
      product(y, job->forward + head % job->kv_heads * job->forward_head, d, x);
      for (int64_t j = 0; j < d; j++) {
        most = fmaxf(most, fabsf(x[j]));
        bad[r] |= !isfinite(x[j]);
      }
      float up = bad[r] || !(most > TINY) ? 0 : QUERY / most;
      unit[r] = up > 0 ? bk.unit / up : 0;
      for (int64_t j = 0; j < d; j++) {
        const float y = up > 0 ? x[order_k[j]] * up : 0;
        q[r * d + j] = (int16_t)lrintf(y);
        if (job->precise) q[(room + r) * d + j] = (int16_t)lrintf((y - rintf(y)) * DIGIT);
      }
    }
    int64_t column = job->first;
    for (int64_t g = 0; g < job->segment_count; g++) {
      const Segment *seg = job->segments + g;
      const int64_t step = job->read ? job->read_block : TOKENS;
      for (int64_t t0 = 0; t0 < seg->tokens; t0 += step) {
        if (job->read && !job->read[head * job->read_head + (column - job->first + t0) / step]) continue;
        const int64_t n = seg->tokens - t0 < step ? seg->tokens - t0 : step, even = whole(n);
        const int64_t at = head * seg->tokens + t0;
        for (int64_t t = 0; t < n; t++) gain_k[t] = wide(seg->gain_k[at + t]);
        for (int64_t t = n; t < even; t++) gain_k[t] = 0;
        for (int64_t i = 0; i < runs; i++) {
          const uint16_t *p = seg->gain_v + at * runs + i;
          if (runs == 1) /* which the compiler can vectorise */
            for (int64_t t = 0; t < n; t++) gain_v[i][t] = wide(p[t]);
          else
            for (int64_t t = 0; t < n; t++) gain_v[i][t] = wide(p[t * runs]);
          for (int64_t t = n; t < even; t++) gain_v[i][t] = 0;
        }
        const uint8_t *codes_k = seg->codes_k + at * bytes_k, *codes_v = seg->codes_v + at * bytes_v;
#define SCORES(bits) scores_##bits(&bk, 1 + (job->precise != 0), codes_k, bytes_k, n, q, rows, room * d, d, row, s, codes_v, bytes_v)
        PICK(job->bits_k, SCORES);
        int needed = 0;
        for (int64_t r = 0; r < rows; r++) {
          float *x = s + r * TOKENS, more = shift[r];
          for (int64_t t = 0; t < n; t++) x[t] = x[t] * unit[r] * gain_k[t] + more;
          finish(job, head, r, column + t0, n, x);
          float share = weigh(x, even, top + r, weight + r, sum + r * dv, dv, out_exact + r * dv, dv);
          needed |= share > weight[r] * NEGLIGIBLE;
        }
        if (!needed) continue;
        const int64_t share = job->precise ? FEWER : TOKENS;
        for (int64_t t = 0; t < n; t += share, codes_v += share * bytes_v) {
          const int64_t count = n - t < share ? n - t : share;
          for (int64_t i = 0, j = 0, at_v = 0; i < runs; j += job->run[i++].d) {
            const int64_t own = job->run[i].d;
            for (int64_t r = 0; r < rows; r++) scale[r] = integers(s + r * TOKENS + t, gain_v[i] + t, whole(count), bv + i, w + r * TOKENS);
#define VALUES(bits) values_##bits(bv + i, codes_v + at_v, bytes_v, count, w, scale, room, own, pairs, sum + j, dv)
            PICK(bv[i].bits, VALUES);
            at_v += own * bv[i].bits / 8;
          }
        }
      }
      column += seg->tokens;
    }
    for (int64_t r = 0; r < rows; r++) {
      float *x = wide_row, *y = out + r * dv;
      for (int64_t i = 0, j = 0; i < runs; j += job->run[i++].d) {
        for (int64_t k = j; k < j + job->run[i].d; k++) x[j + order_v[k]] = sum[r * dv + k];
        product(x + j, job->run[i].back + head % job->kv_heads * job->run[i].back_head, job->run[i].d, y + j);
      }
      if (job->basis) reflect(y, job->basis + head % job->kv_heads * job->axes * dv, job->axes, dv, wide_row);
      for (int64_t j = 0; j < dv; j++) y[j] = bad[r] ? NAN : y[j] + out_exact[r * dv + j];
      if (bad[r]) weight[r] = NAN;
    }
  }
  free(memory);
  return 0;
}

#ifndef _WIN32
static void *attend_in_thread(void *job) { return (void *)(intptr_t)attend(job); }
#endif

/* The softmax of other keys joins that of a job */
static void join_states(const Job *job, const Job *other) {
  const int64_t dv = job->dv;
  for (int64_t r = 0; r < job->heads * job->group * job->count; r++) {
    const float top = fmaxf(job->top[r], other->top[r]), own = expf(job->top[r] - top), more = expf(other->top[r] - top);
    job->top[r] = top;
    job->weight[r] = job->weight[r] * own + other->weight[r] * more;
    for (int64_t j = r * dv; j < (r + 1) * dv; j++) job->sum[j] = job->sum[j] * own + other->sum[j] * more;
  }
}

/* Jobs of the same queries and different keys, a thread each, at most THREADS: the first one gets the softmax over all keys. 0, or 1
 * where memory ran out. Threads are started anew: this takes a few dozen microseconds and leaves nothing behind, as a fork wants it. */
int tqai_attend(const Job *jobs, int64_t count) {
  int failed = 0;
#ifdef _WIN32
  for (int64_t i = 0; i < count; i++) failed |= attend(jobs + i);
#else
  pthread_t threads[THREADS];
  int runs[THREADS];
  for (int64_t i = 1; i < count; i++) runs[i] = !pthread_create(threads + i, NULL, attend_in_thread, (void *)(jobs + i));
  failed = attend(jobs);
  for (int64_t i = 1; i < count; i++) {
    void *other = NULL;
    if (runs[i])
      pthread_join(threads[i], &other);
    else
      other = attend_in_thread((void *)(jobs + i));
    failed |= other != NULL;
  }
#endif
  for (int64_t i = 1; i < count && !failed; i++) join_states(jobs, jobs + i);
  return failed;
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
