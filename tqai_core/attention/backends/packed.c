/* Decode attention over packed rows (codecs/rows.py has the bytes of a row), for a few query rows a head.
 *
 * Levels, queries and weights are integers while they meet. Levels are exact; sums go to fp32 before 32 bits could overflow. The
 * softmax is online (1805.02867) and in fp32.
 *
 * AVX512 (VBMI, VNNI): bytes, four products an instruction. Levels of 2, 3, 4 and 8 bits are bytes times a common step, those of 5
 * and 6 bits two bytes. Codes are turned before they are looked up, so that a lane is a token where queries meet keys and a
 * coordinate where weights meet values: no sum crosses lanes. Queries are two or, of fp32, three digits of base 128 (15 and 22
 * bits), weights two digits of base 256, which share a scale by 64 tokens or, where queries are not of fp32, by 256.
 *
 * Elsewhere: 16 bits. Queries keep 15 bits or, of fp32, 30 in two digits; weights keep 15, and share a scale by 32 tokens where
 * queries are of fp32, else by 64. What all this rounds away is below 1e-4 of the result; one digit of 8 bits would round away 1e-2.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <pthread.h>
#endif

#if defined(TQAI_PLAIN)
#elif defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define WIDE 1 /* Ice Lake and later, Zen 4 and later; older AVX512 takes the path of AVX2 */
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR 1
#endif
#if defined(WIDE) || defined(VECTOR)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16") /* or the compiler leaves sums in memory */
#define APART static __attribute__((noinline))
#ifdef WIDE
#define TOKENS 256 /* a tile: tokens that share one rescaling */
#define DIGITS 3   /* of an fp32 query */
#define FEWER 64   /* tokens whose weights share a scale, where queries are of fp32 */
#else
#define TOKENS 64
#define DIGITS 2
#define FEWER 32
#endif
#define UNIT 32   /* coordinates unpacked together */
#define TINY 1e-33f
#define LEAST -1e30f /* where a softmax begins: finite, so that a query that may see nothing keeps weight 0 */
#define NEGLIGIBLE 1e-6f
#define RUNS 2
#define THREADS 64

typedef struct {
  const uint8_t *codes_k;
  const uint16_t *gain_k;
  const uint8_t *codes_v;
  const uint16_t *gain_v; /* [heads, tokens, runs] */
  int64_t tokens;
} Segment;

/* The structures that come from outside have members of 64 bits alone; a step is in units of 1 / 2048 */
_Static_assert(sizeof(void *) == 8, "wants pointers of 64 bits");

typedef struct { /* neighbouring coordinates of a row of values that have bits and a gain of their own */
  int64_t d, bits;
  const float *level, *back; /* back [d, d] takes them out of the rotated domain */
  int64_t back_head;         /* from one head's matrix to the next; 0: all share one */
  int64_t step;              /* of levels that are bytes, else 0 */
} Run;

typedef struct { /* packed rows, as they stay until more tokens are packed */
  int64_t heads, kv_heads, d, dv, bits_k, runs, step_k; /* heads: batch x kv_heads */
  const float *level_k;
  const Run *run;
  const Segment *segments;
  int64_t segment_count, first, front, after; /* columns: of the first token here, of the first packed one, behind the last packed one */
  const float *forward;       /* [d, d], into the rotated domain */
  const float *mean, *scale;  /* of the packed keys [heads, d], or both NULL */
  const int8_t *basis;        /* of the packed values [kv_heads, axes, dv]: reflections, the last one first; or NULL */
  int64_t axes, forward_head; /* from one head's forward to the next; 0: all share one */
} Rows;

typedef struct {
  const void *at;
  int64_t batch, head, row; /* strides in numbers */
} Array;

typedef struct { /* what is asked; kind 1: bf16, 2: fp32 */
  int64_t group, count;      /* query heads of a kv head, queries of each; rows of a kv head: group x count */
  int64_t q_kind, exact_kind, precise, out_kind; /* precise: queries keep the bits of fp32 */
  float *top, *weight, *sum; /* [heads, rows], [heads, rows], [heads, rows, dv]: where the softmax stands, if there is no out */
  const float *aux;          /* [query heads]: a logit that takes weight and has no value; or NULL */
  Array mask;                /* or NULL; head: of queries */
  int64_t mask_kind;         /* 1: bytes, 0 hides; 2: fp32, added */
  const uint8_t *read;       /* or NULL: which blocks of packed tokens a head reads, 0 leaves one out */
  int64_t read_head, read_block; /* blocks of a head; tokens of a block, a divisor of 64 and of each segment */
} Asked;

typedef struct {
  Asked is;
  Array q, exact_k, exact_v; /* [batch, heads, ...]; the first front exact rows lie before the packed tokens */
  int64_t exact, seen;       /* columns that the first query sees, the next one more; 0: all */
  float scaling, softcap;    /* softcap 0: none */
} Ask;

INLINE float wide(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

INLINE uint16_t narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Gains of n tokens, step apart; 0 up to a whole vector */
INLINE void gains(const uint16_t *p, int64_t n, int64_t step, int64_t all, float *out) {
  if (step == 1) /* which the compiler can vectorise */
    for (int64_t t = 0; t < n; t++) out[t] = wide(p[t]);
  else
    for (int64_t t = 0; t < n; t++) out[t] = wide(p[t * step]);
  for (int64_t t = n; t < all; t++) out[t] = 0;
}

/* What is read soon, a few tokens at a time: memory serves so many requests at once */
INLINE void fetch(const uint8_t *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
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
#ifdef WIDE
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); } /* b where a is NaN */
INLINE float add_up(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE Floats choose(Ints yes, Floats a, Floats b) { return (Floats)(((Ints)a & yes) | ((Ints)b & ~yes)); }
INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
INLINE float add_up(Floats x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }
INLINE float largest(Floats x) {
  float m = x[0];
  for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
  return m;
}
#endif
INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* exp for x <= 0, relative error 2e-7; 0 below -104, or -87 */
INLINE Floats small_exp(Floats x) {
#ifdef WIDE
  const __m512 y = _mm512_max_ps((__m512)x, _mm512_set1_ps(-200)); /* NaN stays */
  const __m512 n = _mm512_roundscale_ps(y * 1.44269504f, 8);
#else
  const Floats least = (Floats){0} - 87.0f;
  Floats y = choose(x < least, least, x);
  Floats n = rounded(y * 1.44269504f);
#endif
  Floats f = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
#ifdef WIDE
  return (Floats)_mm512_scalef_ps((__m512)p, n);
#else
  Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  return choose(x < least, (Floats){0}, p * (Floats)bits);
#endif
}

/* ---- what an instruction set brings: levels, their products with queries, their weighted sums */

INLINE int per_byte(int bits) { return bits == 8 ? 1 : bits >= 4 ? 2 : 4; } /* codes in a byte of the first part of a row */
INLINE int beyond(int bits) { return bits == 8 ? 0 : bits - 8 / per_byte(bits); } /* bits of a code in the part after it */

#ifdef WIDE
typedef struct {
  int bits, planes;         /* bytes of a level */
  float unit, half;         /* level = (the byte, or 256 first + second, + half) * unit */
  uint8_t table[2][64];     /* those bytes, again and again: bits above a code do not matter */
  uint8_t keys[64], values[64], from[64]; /* places of the bits after the first part, see unpack_keys and unpack_values */
} Book;

/* ``flip`` 128: bytes without sign, as keys want them */
static Book book(int64_t bits, const float *level, int64_t step, int flip) {
  Book b;
  memset(&b, 0, sizeof b);
  b.bits = (int)bits, b.planes = step > 0 ? 1 : 2;
  b.unit = (float)(step > 0 ? step : 1) / 2048, b.half = bits == 8 ? 0.5f : 0;
  b.table[0][0] = bits == 8 && !flip; /* whether they get a sign */
  const int c = per_byte(b.bits), low = 8 / c, more = beyond(b.bits);
  for (int i = 0; i < 64 && bits < 8; i++) {
    const int x = (int)lrintf(level[i & ((1 << bits) - 1)] / b.unit), high = (x + 128) >> 8;
    b.table[0][i] = (uint8_t)((b.planes == 2 ? high : x) + flip), b.table[1][i] = (uint8_t)(x - 256 * high + flip);
  }
  for (int i = 0; i < 64 && more; i++) {
    const int pair = i / 8, two = 2 * pair * c * more; /* bits of the lanes before these two */
    b.keys[i] = (uint8_t)(32 * (i / 4 % 2) + c * more * (i % 4) - low);
    b.values[i] = (uint8_t)(8 * (i % 4) + two % 8 + c * more * (i / 4 % 2) - low);
    b.from[i] = (uint8_t)(8 * (i % 4) + two / 8);
  }
  return b;
}

INLINE __m128i few(const uint8_t *p, int64_t size) {
  return size >= 16 ? _mm_loadu_si128((const __m128i *)p) : _mm_maskz_loadu_epi8((__mmask16)((1u << size) - 1), p);
}

INLINE __m512i four(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d, int64_t size) {
  __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(few(a, size)), few(b, size), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(x, few(c, size), 2), few(d, size), 3);
}

INLINE int32_t load4(const void *p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

/* In every quarter of four vectors, number k of each to vector k */
INLINE void turn_quarters(const __m512i *a, __m512i *x) {
  __m512i b = _mm512_unpacklo_epi32(a[0], a[1]), c = _mm512_unpacklo_epi32(a[2], a[3]);
  x[0] = _mm512_unpacklo_epi64(b, c), x[1] = _mm512_unpackhi_epi64(b, c);
  b = _mm512_unpackhi_epi32(a[0], a[1]), c = _mm512_unpackhi_epi32(a[2], a[3]);
  x[2] = _mm512_unpacklo_epi64(b, c), x[3] = _mm512_unpackhi_epi64(b, c);
}

/* Lane t of x[i]: bytes 4 i to 4 i + 3 of row t, of 16 rows */
INLINE void turned(const uint8_t *p, int64_t bytes, int64_t size, __m512i *x) {
  __m512i a[4];
  UNROLL for (int i = 0; i < 4; i++) a[i] = four(p + i * bytes, p + (i + 4) * bytes, p + (i + 8) * bytes, p + (i + 12) * bytes, size);
  turn_quarters(a, x);
}

/* The same of whole rows of 32 bytes, one after the other: two a vector */
INLINE void turned32(const uint8_t *p, __m512i *x) {
  const __m512i place = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
  const __m512i next = _mm512_add_epi32(place, _mm512_set1_epi32(4));
  __m512i a[8], b[8];
  UNROLL for (int i = 0; i < 8; i++) a[i] = _mm512_loadu_si512(p + 64 * i);
  turn_quarters(a, b), turn_quarters(a + 4, b + 4);
  UNROLL for (int i = 0; i < 4; i++) {
    x[i] = _mm512_permutex2var_epi32(b[i], place, b[i + 4]);
    x[i + 4] = _mm512_permutex2var_epi32(b[i], next, b[i + 4]);
  }
}

/* The number i of the codes of each byte of x, with the bits that are after it, as one or two bytes of a level */
INLINE void look_up(const Book *b, const int bits, const int i, __m512i x, __m512i places, __m512i after, uint8_t *out, int64_t apart) {
  const int low = 8 / per_byte(bits);
  __m512i y = i ? _mm512_srli_epi32(x, low * i) : x;
  if (bits == 8) {
    _mm512_storeu_si512(out, b->table[0][0] ? _mm512_xor_si512(y, _mm512_set1_epi8((char)128)) : y);
    return;
  }
  if (beyond(bits)) { /* y below, the others above */
    __m512i h = _mm512_multishift_epi64_epi8(_mm512_add_epi8(places, _mm512_set1_epi8((char)(i * beyond(bits)))), after);
    y = _mm512_ternarylogic_epi64(y, h, _mm512_set1_epi8((char)((1 << low) - 1)), 0xe4);
  }
  _mm512_storeu_si512(out, _mm512_permutexvar_epi8(y, _mm512_loadu_si512(b->table[0])));
  if (bits == 5 || bits == 6) _mm512_storeu_si512(out + apart, _mm512_permutexvar_epi8(y, _mm512_loadu_si512(b->table[1])));
}

/* Levels of 16 tokens, a lane each; vector c D + i holds coordinates 4 c D + c m + i, m = 0 to 3, with c codes a byte */
INLINE void unpack_keys(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t d, uint8_t *out, int64_t apart) {
  const int c = per_byte(bits), more = beyond(bits);
  const int64_t own = d / c;
  if (bytes == 32 && own == 32) {
    __m512i x[8];
    turned32(codes, x);
    UNROLL for (int D = 0; D < 8; D++)
      UNROLL for (int i = 0; i < c; i++) look_up(b, bits, i, x[D], x[D], x[D], out + (D * c + i) * 128, apart);
    return;
  }
  for (int64_t at = 0; at < own; at += 16) {
    const int64_t size = own - at < 16 ? own - at : 16;
    __m512i x[4], after[4];
    turned(codes + at, bytes, size, x);
    if (more) turned(codes + own + at * more * c / 8, bytes, size * more * c / 8, after);
    for (int D = 0; D < 4 && 4 * D < size; D++) {
      const int bit = 4 * c * D * more;
      __m512i places = _mm512_add_epi8(_mm512_loadu_si512(b->keys), _mm512_set1_epi8((char)(bit % 32)));
      for (int i = 0; i < c; i++)
        look_up(b, bits, i, x[D], places, more ? after[bit / 32] : places, out + ((at / 4 + D) * c + i) * 128, apart);
    }
  }
}

/* where unpack_keys puts coordinate j */
INLINE int64_t place_of_key(int bits, int64_t j) {
  const int c = per_byte(bits);
  return (j / (4 * c) * c + j % c) * 4 + j / c % 4;
}

/* sum += four products in each lane, in place: compilers copy sums to and fro */
INLINE void add_products(__m512i *sum, __m512i bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(bytes), "v"(signed_bytes));
}

/* Products of 32 tokens with m queries of so many digits, as whole numbers in s */
INLINE void meet(const uint8_t *x, const int8_t *q, const int32_t *start, const int m, const int digits, int64_t d, int again, float *s) {
  __m512i a[4 * DIGITS][2];
  UNROLL for (int k = 0; k < m * digits; k++) a[k][0] = a[k][1] = _mm512_set1_epi32(start[k]);
  for (int64_t j = 0; j < d; j += 4) {
    const __m512i x0 = _mm512_loadu_si512(x + j * 32), x1 = _mm512_loadu_si512(x + j * 32 + 64);
    UNROLL for (int k = 0; k < m * digits; k++) {
      const __m512i y = _mm512_set1_epi32(load4(q + k * d + j));
      add_products(&a[k][0], x0, y), add_products(&a[k][1], x1, y);
    }
  }
  UNROLL for (int r = 0; r < m; r++)
    UNROLL for (int h = 0; h < 2; h++) {
      float *p = s + r * TOKENS + 16 * h;
      __m512 f = _mm512_cvtepi32_ps(a[r * digits][h]);
      UNROLL for (int g = 1; g < digits; g++) f = _mm512_fmadd_ps(f, _mm512_set1_ps(128), _mm512_cvtepi32_ps(a[r * digits + g][h]));
      _mm512_storeu_ps(p, again ? _mm512_fmadd_ps(_mm512_loadu_ps(p), _mm512_set1_ps(256), f) : f);
    }
}

#define MEET(m, digits) \
  APART void meet_##m##_##digits(const uint8_t *x, const int8_t *q, const int32_t *start, int64_t d, int again, float *s) { \
    if (d == 64) meet(x, q, start, m, digits, 64, again, s); \
    else if (d == 128) meet(x, q, start, m, digits, 128, again, s); \
    else meet(x, q, start, m, digits, d, again, s); \
  }
MEET(1, 2) MEET(2, 2) MEET(3, 2) MEET(4, 2) MEET(1, 3) MEET(2, 3) MEET(3, 3) MEET(4, 3)

typedef void Meet(const uint8_t *, const int8_t *, const int32_t *, int64_t, int, float *);
static Meet *const MEETS[2][4] = {{meet_1_2, meet_2_2, meet_3_2, meet_4_2}, {meet_1_3, meet_2_3, meet_3_3, meet_4_3}};

/* A query in the rotated domain, times up: its digits, the largest first, and what each sum starts from, since bytes of keys are
 * 128 too large */
static void set_query(const Book *b, const float *x, float up, int digits, int64_t d, const int32_t *place, void *to, int64_t r,
                      int64_t rows,
                      int32_t *start, float *half) {
  int8_t *q = (int8_t *)to + r * digits * d;
  int32_t all = 0;
  (void)rows;
  memset(start, 0, (size_t)digits * 4);
  for (int64_t j = 0; j < d; j++) {
    int32_t left = (int32_t)lrintf(x[j] * up);
    all += left;
    for (int g = digits - 1; g >= 0; g--) {
      const int32_t rest = g ? ((left + 64) & 127) - 64 : left;
      q[g * d + place[j]] = (int8_t)rest, start[g] -= 128 * rest;
      left = (left - rest) >> 7;
    }
  }
  *half = b->half * (float)all;
}

INLINE float query_limit(int digits) { return digits == 2 ? 127 * 128 : 127 * 128 * 128; }

/* room: for 16 rows of codes, then for the levels of 32 tokens */
INLINE void scores(const Book *b, const int bits, int digits, const uint8_t *codes, int64_t bytes, int64_t n, const int8_t *q,
                   const int32_t *start,
                   int64_t rows, int64_t d, uint8_t *room, float *s, const uint8_t *soon, int64_t soon_bytes) {
  uint8_t *levels = room + 16 * bytes;
  const int64_t apart = 32 * d;
  for (int64_t t = 0; t < n; t += 32) {
    fetch(soon + t * soon_bytes, 32 * soon_bytes);
    for (int64_t h = 0; h < 2 && t + 16 * h < n; h++) {
      const int64_t left = n - t - 16 * h;
      const uint8_t *p = codes + (t + 16 * h) * bytes;
      if (left < 16) p = memcpy(room, p, (size_t)(left * bytes)); /* scores of the others are never read */
      unpack_keys(b, bits, p, bytes, d, levels + 64 * h, apart);
    }
    for (int64_t r = 0; r < rows; r += 4) {
      Meet *run = MEETS[digits - 2][(rows - r < 4 ? rows - r : 4) - 1];
      for (int i = 0; i < b->planes; i++) run(levels + i * apart, q + r * digits * d, start + r * digits, d, i, s + r * TOKENS + t);
    }
  }
}

/* Levels of unit u of a row, 64 coordinates or the last 32, a lane each, of four tokens together; returns the vectors of four tokens */
INLINE int unpack_values(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, int64_t d, int64_t u, uint8_t *out,
                         const uint8_t *soon, int64_t soon_bytes) {
  const int c = per_byte(bits), more = beyond(bits);
  const int64_t own = d / c, first = u * 64 / c, size = own - first < 64 / c ? own - first : 64 / c;
  const __m512i turn = _mm512_set_epi32(0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a, 0x39291909, 0x38281808,
                                        0x37271707, 0x36261606, 0x35251505, 0x34241404, 0x33231303, 0x32221202, 0x31211101, 0x30201000);
  for (int64_t t = 0; t < n; t += 4) { /* the weights of missing ones are 0 */
    const uint8_t *p[4];
    fetch(soon + t * soon_bytes, 4 * soon_bytes);
    for (int i = 0; i < 4; i++) p[i] = codes + (t + i < n ? t + i : n - 1) * bytes + first;
    for (int64_t z = 0; z < size; z += 16) {
      const int64_t here = size - z < 16 ? size - z : 16, at = own - first + (first + z) * more * c / 8;
      __m512i after = _mm512_setzero_si512();
      if (more) {
        int64_t e[4] = {0};
        for (int i = 0; i < 4; i++) memcpy(e + i, p[i] + at, (size_t)(here * more * c / 8));
        after = _mm512_permutexvar_epi8(_mm512_loadu_si512(b->from), _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)e)));
      }
      __m512i x = _mm512_permutexvar_epi8(turn, four(p[0] + z, p[1] + z, p[2] + z, p[3] + z, here));
      for (int i = 0; i < c; i++)
        look_up(b, bits, i, x, _mm512_loadu_si512(b->values), after, out + (t + z / 16 * c + i) * 64, TOKENS * 64);
    }
  }
  return (int)((size + 15) / 16) * c;
}

/* where the sums of unpack_values hold coordinate j */
INLINE int64_t place_of_value(int bits, int64_t j) {
  const int64_t c = per_byte(bits), byte = j % 64 / c;
  return j / 64 * 64 + (byte / 16 * c + j % c) * 16 + byte % 16;
}

/* sum[r] += scale[r] * (levels weighted by w[r]) + lift[r], for m rows and so many vectors of coordinates */
INLINE void gather(const uint8_t *x, const uint8_t *w, const int m, const int parts, int64_t n, const float *scale, const float *lift,
                   float *sum, int64_t apart) {
  __m512i a[6][4];
  UNROLL for (int k = 0; k < 2 * m; k++)
    UNROLL for (int j = 0; j < parts; j++) a[k][j] = _mm512_setzero_si512();
  for (int64_t t = 0; t < n; t += 4) {
    __m512i y[4];
    UNROLL for (int j = 0; j < parts; j++) y[j] = _mm512_loadu_si512(x + (t + j) * 64);
    UNROLL for (int k = 0; k < 2 * m; k++) {
      const __m512i both = _mm512_set1_epi32(load4(w + k * TOKENS + t));
      UNROLL for (int j = 0; j < parts; j++) add_products(&a[k][j], both, y[j]);
    }
  }
  UNROLL for (int r = 0; r < m; r++)
    UNROLL for (int j = 0; j < parts; j++) {
      float *p = sum + r * apart + 16 * j;
      __m512 f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[2 * r][j]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(a[2 * r + 1][j]));
      _mm512_storeu_ps(p, _mm512_fmadd_ps(f, _mm512_set1_ps(scale[r]), _mm512_add_ps(_mm512_set1_ps(lift[r]), _mm512_loadu_ps(p))));
    }
}

#define GATHER(m, parts) \
  APART void gather_##m##_##parts(const uint8_t *x, const uint8_t *w, int64_t n, const float *scale, const float *lift, \
                                  float *sum, int64_t apart) { \
    gather(x, w, m, parts, n, scale, lift, sum, apart); \
  }
GATHER(1, 2) GATHER(2, 2) GATHER(3, 2) GATHER(1, 4) GATHER(2, 4) GATHER(3, 4)

typedef void Gather(const uint8_t *, const uint8_t *, int64_t, const float *, const float *, float *, int64_t);
static Gather *const GATHERS[2][3] = {{gather_1_2, gather_2_2, gather_3_2}, {gather_1_4, gather_2_4, gather_3_4}};

/* levels: room for those of a unit of a tile */
INLINE void values(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const uint8_t *w, const float *scale,
                   const float *lift,
                   int64_t rows, int64_t d, uint8_t *levels, float *sum, int64_t apart, const uint8_t *soon, int64_t soon_bytes) {
  for (int64_t u = 0; u * 64 < d; u++) {
    const int parts = unpack_values(b, bits, codes, bytes, n, d, u, levels, soon, u ? 0 : soon_bytes);
    for (int64_t r = 0, m; r < rows; r += m) {
      m = rows - r == 4 ? 2 : rows - r < 3 ? rows - r : 3;
      Gather *run = GATHERS[parts / 2 - 1][m - 1];
      float high[3], none[3] = {0}, *to = sum + r * apart + u * 64;
      for (int64_t i = 0; i < m; i++) high[i] = 256 * scale[r + i];
      if (b->planes == 2) run(levels, w + 2 * r * TOKENS, n, high, none, to, apart);
      run(levels + (b->planes - 1) * TOKENS * 64, w + 2 * r * TOKENS, n, scale + r, lift + r, to, apart);
    }
  }
}
#else
typedef struct {
  int bits, top;     /* top: the largest integer level without its sign */
  int16_t level[64]; /* unused for 8 bits: 2 code - 255 */
  uint8_t low[64], high[64];
  float unit; /* level = integer * unit */
} Book;

#define QUERY 32767 /* 8 x 8191 x 32767 < 2^31 */
#define DIGIT 32768 /* a unit of the first digit of a query in units of the second */
#define WEIGHT 32767

/* Levels as integers: codecs/rows.py has them on multiples of 1 / 2048, below 4 */
static Book book(int64_t bits, const float *level, int64_t step, int flip) {
  Book b;
  (void)step, (void)flip;
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

INLINE void scores(const Book *b, const int bits, int digits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *q,
                   const int32_t *start,
                   int64_t rows, int64_t d, int16_t *row, float *s, const uint8_t *soon, int64_t soon_bytes) {
  (void)start;
  for (int64_t t = 0; t < n; t++) {
    fetch(soon + t * soon_bytes, soon_bytes);
    unpack_row(b, bits, codes + t * bytes, d, row);
    for (int64_t r = 0; r < rows; r += 4) {
      const int count = rows - r < 4 ? (int)(rows - r) : 4;
      float out[4] = {0}, fine[4] = {0};
      for (int g = 0; g < digits; g++) {
        if (count == 4)
          dots(row, q + g * rows * d + r * d, d, 4, g ? fine : out);
        else
          for (int i = 0; i < count; i++) dots(row, q + g * rows * d + (r + i) * d, d, 1, (g ? fine : out) + i);
      }
      for (int i = 0; i < count; i++) s[(r + i) * TOKENS + t] = out[i] + fine[i] * (1.0f / DIGIT);
    }
  }
}

INLINE void values(const Book *b, const int bits, const uint8_t *codes, int64_t bytes, int64_t n, const int16_t *w, const float *scale,
                   const float *lift,
                   int64_t rows, int64_t d, int16_t *pairs, float *sum, int64_t apart,
                   const uint8_t *soon, int64_t soon_bytes) {
  (void)lift;
  for (int64_t u = 0; u < d / UNIT; u++) {
    for (int64_t t = 0; t < n; t += 2) { /* the weight of a missing last one is 0 */
      if (u == 0) fetch(soon + t * soon_bytes, 2 * soon_bytes);
      const uint8_t *even = codes + t * bytes;
      unpack_pair(b, bits, even, t + 1 < n ? even + bytes : even, d, u, pairs + 32 * t);
    }
    int64_t r = 0, count = (n + 1) / 2;
    float *at = sum + u * UNIT;
    for (; r + 2 <= rows; r += 2) gather(pairs, count, w + r * TOKENS, 2, scale + r, at + r * apart, apart);
    if (r < rows) gather(pairs, count, w + r * TOKENS, 1, scale + r, at + r * apart, apart);
  }
}

INLINE float query_limit(int digits) { return digits ? QUERY : 0; }

/* A query in the rotated domain, times up; the second digits lie behind all first ones */
static void set_query(const Book *b, const float *x, float up, int digits, int64_t d, const int32_t *place, void *to, int64_t r,
                      int64_t rows,
                      int32_t *start, float *half) {
  (void)b, (void)start, *half = 0;
  int16_t *q = (int16_t *)to + r * d;
  for (int64_t j = 0; j < d; j++) {
    const float y = x[j] * up;
    q[place[j]] = (int16_t)lrintf(y);
    if (digits == 2) q[rows * d + place[j]] = (int16_t)lrintf((y - rintf(y)) * DIGIT);
  }
}
#endif

/* ---- the same for all */

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
  APART void scores_##bits(const Book *b, int digits, const uint8_t *codes, int64_t bytes, int64_t n, const void *q, const int32_t *start, \
                           int64_t rows, int64_t d, void *room, float *s, const uint8_t *soon, int64_t soon_bytes) { \
    if (d == 64) scores(b, bits, digits, codes, bytes, n, q, start, rows, 64, room, s, soon, soon_bytes); \
    else if (d == 128) scores(b, bits, digits, codes, bytes, n, q, start, rows, 128, room, s, soon, soon_bytes); \
    else scores(b, bits, digits, codes, bytes, n, q, start, rows, d, room, s, soon, soon_bytes); \
  } \
  APART void values_##bits(const Book *b, const uint8_t *codes, int64_t bytes, int64_t n, const void *w, const float *scale, \
                           const float *lift, \
                           int64_t rows, int64_t d, void *room, float *sum, int64_t apart, const uint8_t *soon, int64_t soon_bytes) { \
    if (d == 64) values(b, bits, codes, bytes, n, w, scale, lift, rows, 64, room, sum, apart, soon, soon_bytes); \
    else values(b, bits, codes, bytes, n, w, scale, lift, rows, d, room, sum, apart, soon, soon_bytes); \
  }
OF_BITS(2)
OF_BITS(3)
OF_BITS(4)
OF_BITS(5)
OF_BITS(6)
OF_BITS(8)

#ifdef WIDE
static void places(int bits, int64_t d, int32_t *keys, int32_t *sums, void *room) {
  (void)room;
  for (int64_t j = 0; j < d; j++) keys[j] = (int32_t)place_of_key(bits, j), sums[j] = (int32_t)place_of_value(bits, j);
}
#else
static void set_code(uint8_t *row, int bits, int64_t j, int one) {
  if (bits == 8)
    row[j] = (uint8_t)(127 + one); /* integer levels -1 and 1 */
  else if (bits >= 4)
    row[j / 2] |= (uint8_t)(one << (4 * (j & 1)));
  else
    row[j / 4] |= (uint8_t)(one << (2 * (j & 3)));
}

/* Where coordinates lie in rows (for queries) and in weighted sums (for values). Each instruction set unpacks in the order that suits it,
 * which is read off rows whose levels spell the number of the coordinate. */
static void places(int bits, int64_t d, int32_t *keys, int32_t *sums, void *room) {
  Book b;
  memset(&b, 0, sizeof b);
  b.level[1] = 1, b.low[1] = 1;
  int16_t w[TOKENS] = {1}, *pairs = room, *out = pairs + TOKENS * 32;
  if (d <= 0) return;
  float one = 1.0f, *got = (float *)(out + d);
  int32_t *in_row = (int32_t *)(got + d), *in_sum = in_row + d;
  uint8_t *row = (uint8_t *)(in_sum + d);
  memset(in_row, 0, (size_t)d * 8);
  for (int bit = 0; bit < 10; bit++) {
    memset(row, 0, (size_t)d);
    for (int64_t j = 0; j < d; j++) set_code(row, bits, j, (int)(j >> bit & 1));
    memset(got, 0, (size_t)d * 4);
#define PROBE(bits) unpack_row(&b, bits, row, d, out); values_##bits(&b, row, d * bits / 8, 1, w, &one, NULL, 1, d, pairs, got, d, row, 0)
    PICK(bits, PROBE);
    for (int64_t j = 0; j < d; j++) in_row[j] |= (out[j] > 0) << bit, in_sum[j] |= (got[j] > 0) << bit;
  }
  for (int32_t j = 0; j < d; j++) keys[in_row[j]] = j, sums[in_sum[j]] = j;
}
#endif

INLINE float dot(const float *x, const float *y, int64_t d) {
  Floats a = {0}, b = {0};
  for (int64_t j = 0; j < d; j += 2 * LANES) {
    a += *(const Floats *)(x + j) * *(const Floats *)(y + j);
    b += *(const Floats *)(x + j + LANES) * *(const Floats *)(y + j + LANES);
  }
  return add_up(a + b);
}

/* Softcap and mask of n scores from a column on; -inf up to a whole vector */
static void finish(const Ask *ask, int64_t b, int64_t h, int64_t r, int64_t column, int64_t n, float *s) {
  if (ask->softcap > 0)
    for (int64_t t = 0; t < n; t++) s[t] = tanhf(s[t] / ask->softcap) * ask->softcap;
  if (ask->is.mask.at) {
    const Array *mask = &ask->is.mask;
    int64_t at = b * mask->batch + (h * ask->is.group + r / ask->is.count) * mask->head + r % ask->is.count * mask->row + column;
    if (ask->is.mask_kind == 1) {
      const uint8_t *m = (const uint8_t *)ask->is.mask.at + at;
      for (int64_t t = 0; t < n; t++) s[t] = m[t] ? s[t] : -INFINITY;
    } else {
      const float *m = (const float *)ask->is.mask.at + at;
      for (int64_t t = 0; t < n; t++) s[t] += m[t];
    }
  }
  if (ask->seen) {
    int64_t seen = ask->seen + r % ask->is.count - column;
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

/* Weights times gains as integers whose weighted sums of levels stay below 2^31; the scale of one comes back, and what is added to
 * each sum besides. Gains are not negative (codecs/rows.py). */
static float integers(const float *p, const float *gain, int64_t n, const Book *b, uint8_t *w, float *lift) {
  const Floats *x = (const Floats *)p, *g = (const Floats *)gain;
  Floats y[TOKENS / LANES], m = {0}, a = {0};
  for (int64_t t = 0; t < n / LANES; t++) {
    y[t] = x[t] * g[t];
    Floats z = (Floats)((Ints)y[t] & 0x7fffffff);
    a += z;
    m = larger(z, m);
  }
  float most = largest(m), all = add_up(a);
  *lift = 0;
  if (!(most > TINY)) {
    memset(w, 0, TOKENS * 2);
    return 0;
  }
#ifdef WIDE
  const float up = 65535 / most;
  __m512i total = _mm512_setzero_si512();
  for (int64_t t = 0; t < n / LANES; t++) {
    const __m512i z = _mm512_max_epi32(_mm512_cvtps_epi32((__m512)(y[t] * up)), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)(w + t * LANES), _mm512_cvtepi32_epi8(_mm512_srli_epi32(z, 8)));
    _mm_storeu_si128((__m128i *)(w + TOKENS + t * LANES), _mm512_cvtepi32_epi8(z));
    total = _mm512_add_epi32(total, z);
  }
  if (b->half > 0) *lift = b->half * (float)_mm512_reduce_add_epi32(total) * (b->unit / up);
  (void)all;
#else
  float limit = 2147000000.0f / (float)b->top - TOKENS, up = WEIGHT / most;
  if (all * up > limit) up = limit / all;
  for (int64_t t = 0; t < n / LANES; t++)
    ((Shorts *)w)[t] = __builtin_convertvector(__builtin_convertvector(rounded(y[t] * up), Ints), Shorts);
#endif
  return b->unit / up;
}

/* Row number i of a head, fp32: as it lies, or made in out */
INLINE const float *numbers(const Array *x, int64_t kind, int64_t b, int64_t h, int64_t i, int64_t d, float *out) {
  const int64_t at = b * x->batch + h * x->head + i * x->row;
  if (kind == 2) return (const float *)x->at + at;
  const uint16_t *p = (const uint16_t *)x->at + at;
  for (int64_t j = 0; j < d; j++) out[j] = wide(p[j]);
  return out;
}

/* y[r] = x[r] m for up to three rows x [n] and m [n, n]; n is a multiple of 32 */
INLINE void product(const float *x, const int rows, int64_t apart, const float *m, int64_t n, float *y, int64_t y_apart) {
  for (int64_t j = 0; j < n; j += 2 * LANES) {
    Floats a[3][2] = {0};
    for (int64_t i = 0; i < n; i++) {
      const Floats m0 = *(const Floats *)(m + i * n + j), m1 = *(const Floats *)(m + i * n + j + LANES);
      UNROLL for (int r = 0; r < rows; r++) a[r][0] += x[r * apart + i] * m0, a[r][1] += x[r * apart + i] * m1;
    }
    UNROLL for (int r = 0; r < rows; r++) *(Floats *)(y + r * y_apart + j) = a[r][0], *(Floats *)(y + r * y_apart + j + LANES) = a[r][1];
  }
}

APART void products(const float *x, int64_t rows, int64_t apart, const float *m, int64_t n, float *y, int64_t y_apart) {
  for (; rows >= 3; rows -= 3, x += 3 * apart, y += 3 * y_apart) product(x, 3, apart, m, n, y, y_apart);
  for (; rows; rows--, x += apart, y += y_apart) product(x, 1, apart, m, n, y, y_apart);
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

typedef struct { /* of all rows */
  float *top, *weight, *sum;
} State;

typedef struct { /* memory of one thread, for the rows of a head */
  Book k, v[RUNS];
  int64_t bytes_k, bytes_v, wide_dv, wide_at[RUNS]; /* sums of a run take whole units of 64 */
  float *asked, *turned, *exact, *sum, *s, *unit, *scale, *lift, *half, *shift, *row;
  int32_t *start, *place_k, *place_v;
  uint8_t *q, *w, *bad, *room, *memory;
} Work;

static int begin(Work *work, const Rows *job, int64_t rows) {
  const int64_t d = job->d, dv = job->dv, most = d > dv ? d : dv;
  work->k = book(job->bits_k, job->level_k, job->step_k, 128), work->bytes_k = d * job->bits_k / 8, work->bytes_v = work->wide_dv = 0;
  for (int64_t i = 0; i < job->runs; i++) {
    const Run *run = job->run + i;
    work->v[i] = book(run->bits, run->level, run->step, 0), work->wide_at[i] = work->wide_dv;
    work->bytes_v += run->d * run->bits / 8, work->wide_dv += (run->d + 63) / 64 * 64;
  }
  struct {
    void *to;
    int64_t bytes;
  } parts[] = {
      {&work->asked, rows * d * 4}, {&work->turned, rows * most * 4}, {&work->exact, rows * dv * 4}, {&work->sum, rows * work->wide_dv * 4},
      {&work->s, rows * TOKENS * 4}, {&work->unit, rows * 4}, {&work->scale, rows * 4}, {&work->lift, rows * 4}, {&work->half, rows * 4},
      {&work->shift, rows * 4}, {&work->row, most * 4}, {&work->start, rows * DIGITS * 4}, {&work->place_k, most * 4},
      {&work->place_v, 2 * most * 4}, {&work->q, rows * d * 4}, {&work->w, rows * TOKENS * 2}, {&work->bad, rows},
      {&work->room, TOKENS * 128 + most * 96},
  };
  const int count = sizeof parts / sizeof *parts;
  int64_t need = 64;
  for (int i = 0; i < count; i++) need += (parts[i].bytes + 63) / 64 * 64;
  if (!(work->memory = malloc((size_t)need))) return 1;
  uint8_t *at = (uint8_t *)(((uintptr_t)work->memory + 63) / 64 * 64);
  for (int i = 0; i < count; at += (parts[i++].bytes + 63) / 64 * 64) memcpy(parts[i].to, &at, sizeof at);
  places((int)job->bits_k, d, work->place_k, work->place_v, work->room);
  for (int64_t i = 0, j = 0; i < job->runs; j += job->run[i++].d)
    places((int)job->run[i].bits, job->run[i].d, (int32_t *)work->row, work->place_v + j, work->room);
  return 0;
}

INLINE Floats load(const void *x, int64_t kind, int64_t at) {
  if (kind == 2) return *(const Floats *)((const float *)x + at);
  return (Floats)(__builtin_convertvector(*(const Shorts *)((const uint16_t *)x + at), Ints) << 16);
}

/* s[r] = scores of n exact keys and m queries */
INLINE void exact_scores(const Array *k, int64_t kind, int64_t at, int64_t n, const float *q, const int m, int64_t d, float *s) {
  for (int64_t t = 0; t < n; t++, at += k->row) {
    Floats a[3] = {0};
    for (int64_t j = 0; j < d; j += LANES) {
      const Floats x = load(k->at, kind, at + j);
      UNROLL for (int r = 0; r < m; r++) a[r] += x * *(const Floats *)(q + r * d + j);
    }
    UNROLL for (int r = 0; r < m; r++) s[r * TOKENS + t] = add_up(a[r]);
  }
}

/* sum[r] += n exact values, weighted by s[r] */
INLINE void exact_sums(const Array *v, int64_t kind, int64_t at, int64_t n, const float *s, const int m, int64_t dv, float *sum) {
  for (int64_t j = 0; j < dv; j += 2 * LANES) {
    Floats a[3][2] = {0};
    for (int64_t t = 0; t < n; t++) {
      const Floats x = load(v->at, kind, at + t * v->row + j), y = load(v->at, kind, at + t * v->row + j + LANES);
      UNROLL for (int r = 0; r < m; r++) a[r][0] += s[r * TOKENS + t] * x, a[r][1] += s[r * TOKENS + t] * y;
    }
    UNROLL for (int r = 0; r < m; r++) *(Floats *)(sum + r * dv + j) += a[r][0], *(Floats *)(sum + r * dv + j + LANES) += a[r][1];
  }
}

/* Exact rows a to end of a head, whose columns start at column */
static void exact(const Ask *ask, const Work *work, int64_t b, int64_t h, int64_t a, int64_t end, int64_t column, int64_t d,
                  int64_t dv, float *top, float *weight) {
  const int64_t rows = ask->is.group * ask->is.count, kind = ask->is.exact_kind;
  const Array *k = &ask->exact_k, *v = &ask->exact_v;
  for (; a < end; a += TOKENS, column += TOKENS) {
    const int64_t n = end - a < TOKENS ? end - a : TOKENS;
    const int64_t at_k = b * k->batch + h * k->head + a * k->row, at_v = b * v->batch + h * v->head + a * v->row;
    int64_t r = 0;
    for (; r + 3 <= rows; r += 3) exact_scores(k, kind, at_k, n, work->asked + r * d, 3, d, work->s + r * TOKENS);
    for (; r < rows; r++) exact_scores(k, kind, at_k, n, work->asked + r * d, 1, d, work->s + r * TOKENS);
    for (r = 0; r < rows; r++) {
      finish(ask, b, h, r, column, n, work->s + r * TOKENS);
      weigh(work->s + r * TOKENS, whole(n), top + r, weight + r, work->exact + r * dv, dv, NULL, 0);
    }
    for (r = 0; r + 3 <= rows; r += 3) exact_sums(v, kind, at_v, n, work->s + r * TOKENS, 3, dv, work->exact + r * dv);
    for (; r < rows; r++) exact_sums(v, kind, at_v, n, work->s + r * TOKENS, 1, dv, work->exact + r * dv);
  }
}

/* The queries of a head as they meet packed keys */
static void turn_queries(const Rows *job, const Ask *ask, const Work *work, int64_t head) {
  const int64_t d = job->d, rows = ask->is.group * ask->is.count;
  const int digits = ask->is.precise ? DIGITS : DIGITS - 1;
  for (int64_t r = 0; r < rows; r++) {
    float *y = work->asked + r * d;
    work->shift[r] = job->mean ? dot(y, job->mean + head * d, d) : 0;
    if (job->scale)
      for (int64_t j = 0; j < d; j++) y[j] *= job->scale[head * d + j];
  }
  products(work->asked, rows, d, job->forward + head % job->kv_heads * job->forward_head, d, work->turned, d);
  for (int64_t r = 0; r < rows; r++) {
    const float *x = work->turned + r * d;
    Floats m = {0}, sum = {0};
    for (int64_t j = 0; j < d; j += LANES) {
      const Floats y = (Floats)(*(const Ints *)(x + j) & 0x7fffffff);
      m = larger(y, m), sum += y * 0.0f; /* NaN if one is not finite */
    }
    const float most = largest(m);
    work->bad[r] = !isfinite(work->shift[r]) || !isfinite(most) || add_up(sum) != 0;
    const float up = work->bad[r] || !(most > TINY) ? 0 : query_limit(digits) / most;
    work->unit[r] = up > 0 ? work->k.unit / up : 0;
    if (!(up > 0)) memset(work->turned + r * d, 0, (size_t)d * 4);
    set_query(&work->k, x, up, digits, d, work->place_k, work->q, r, rows, work->start + r * digits, work->half + r);
  }
}

/* n tokens of a head, from number t0 of a segment on; next: the keys of the tile after it */
static void tile(const Rows *job, const Ask *ask, const Work *work, int64_t head, const Segment *seg, int64_t t0, int64_t n, int64_t column,
                 const uint8_t *next, const uint16_t *next_gain, float *top, float *weight) {
  const int64_t rows = ask->is.group * ask->is.count, even = whole(n), at = head * seg->tokens + t0, runs = job->runs;
  const int digits = ask->is.precise ? DIGITS : DIGITS - 1;
  const uint8_t *codes_k = seg->codes_k + at * work->bytes_k, *codes_v = seg->codes_v + at * work->bytes_v;
  float gain_k[TOKENS], gain_v[RUNS][TOKENS], *s = work->s;
  fetch((const uint8_t *)(seg->gain_v + at * runs), n * runs * 2);
  gains(seg->gain_k + at, n, 1, even, gain_k);
#define SCORES(bits) scores_##bits(&work->k, digits, codes_k, work->bytes_k, n, work->q, work->start, rows, job->d, work->room, s, \
                                   codes_v, work->bytes_v)
  PICK(job->bits_k, SCORES);
  for (int64_t i = 0; i < runs; i++) gains(seg->gain_v + at * runs + i, n, runs, even, gain_v[i]);
  fetch((const uint8_t *)next_gain, n * 2);
  int needed = 0;
  for (int64_t r = 0; r < rows; r++) {
    float *x = s + r * TOKENS;
    const float more = work->shift[r], unit = work->unit[r], half = work->half[r];
    for (int64_t t = 0; t < even; t += LANES)
      *(Floats *)(x + t) = (*(Floats *)(x + t) + half) * (*(Floats *)(gain_k + t) * unit) + more;
    finish(ask, head / job->kv_heads, head % job->kv_heads, r, column, n, x);
    float share = weigh(x, even, top + r, weight + r, work->sum + r * work->wide_dv, work->wide_dv, work->exact + r * job->dv, job->dv);
    needed |= share > weight[r] * NEGLIGIBLE;
  }
  if (!needed) {
    fetch(next, n * work->bytes_k);
    return;
  }
  const int64_t share = ask->is.precise ? FEWER : TOKENS;
  for (int64_t t = 0; t < n; t += share, codes_v += share * work->bytes_v) {
    const int64_t count = n - t < share ? n - t : share;
    for (int64_t i = 0, at_v = 0; i < runs; i++) {
      const Run *run = job->run + i;
      const Book *b = work->v + i;
      for (int64_t r = 0; r < rows; r++)
        work->scale[r] = integers(s + r * TOKENS + t, gain_v[i] + t, whole(count), b, work->w + 2 * r * TOKENS, work->lift + r);
#define VALUES(bits) values_##bits(b, codes_v + at_v, work->bytes_v, count, work->w, work->scale, work->lift, rows, run->d, work->room, \
                                   work->sum + work->wide_at[i], work->wide_dv, \
                                   next + t * work->bytes_k, i ? 0 : work->bytes_k)
      PICK(run->bits, VALUES);
      at_v += run->d * run->bits / 8;
    }
  }
}

/* The sums of a head out of the rotated domain, those of the exact rows added */
static void turn_back(const Rows *job, const Work *work, int64_t head, int64_t rows, float *weight, float *out) {
  const int64_t dv = job->dv;
  for (int64_t i = 0, j = 0; i < job->runs; j += job->run[i++].d) {
    const Run *run = job->run + i;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < run->d; k++)
        work->turned[r * run->d + k] = work->sum[r * work->wide_dv + work->wide_at[i] + work->place_v[j + k]];
    products(work->turned, rows, run->d, run->back + head % job->kv_heads * run->back_head, run->d, out + j, dv);
  }
  for (int64_t r = 0; r < rows; r++) {
    float *y = out + r * dv;
    if (job->basis) reflect(y, job->basis + head % job->kv_heads * job->axes * dv, job->axes, dv, work->row);
    for (int64_t j = 0; j < dv; j++) y[j] = work->bad[r] ? NAN : y[j] + work->exact[r * dv + j];
    if (work->bad[r]) weight[r] = NAN;
  }
}

/* The packed rows of job, and the exact ones where they are its. 0, or 1 where memory ran out. */
static int attend(const Rows *job, const Ask *ask, State state, int with_exact) {
  const int64_t d = job->d, dv = job->dv, rows = ask->is.group * ask->is.count, step = ask->is.read ? ask->is.read_block : TOKENS;
  Work work;
  fetch(job->segments->codes_k, TOKENS * d * job->bits_k / 8);
  fetch((const uint8_t *)job->segments->gain_k, TOKENS * 2);
  if (begin(&work, job, rows)) return 1;
  for (int64_t head = 0; head < job->heads; head++) {
    const int64_t b = head / job->kv_heads, h = head % job->kv_heads;
    float *top = state.top + head * rows, *weight = state.weight + head * rows;
    memset(work.sum, 0, (size_t)(rows * work.wide_dv) * 4);
    memset(work.exact, 0, (size_t)(rows * dv) * 4);
    for (int64_t r = 0; r < rows; r++) {
      float *y = work.asked + r * d;
      const float *x = numbers(&ask->q, ask->is.q_kind, b, h * ask->is.group + r / ask->is.count, r % ask->is.count, d, y);
      for (int64_t j = 0; j < d; j++) y[j] = x[j] * ask->scaling;
    }
    if (with_exact) {
      exact(ask, &work, b, h, 0, job->front, 0, d, dv, top, weight);
      exact(ask, &work, b, h, job->front, ask->exact, job->after, d, dv, top, weight);
    }
    turn_queries(job, ask, &work, head);
    int64_t column = job->first;
    for (int64_t g = 0; g < job->segment_count; column += job->segments[g++].tokens) {
      const Segment *seg = job->segments + g, *last = job->segments + job->segment_count - 1;
      const Segment *then = seg < last ? seg + 1 : job->segments;
      const int64_t head_then = seg < last || head + 1 == job->heads ? head : head + 1;
      for (int64_t t = 0; t < seg->tokens; t += step) {
        if (ask->is.read && !ask->is.read[head * ask->is.read_head + (column - job->front + t) / step]) continue;
        const int64_t n = seg->tokens - t < step ? seg->tokens - t : step;
        const Segment *there = t + n < seg->tokens ? seg : then;
        const int64_t at = t + n < seg->tokens ? head * seg->tokens + t + n : head_then * then->tokens;
        tile(job, ask, &work, head, seg, t, n, column + t, there->codes_k + at * work.bytes_k, there->gain_k + at, top, weight);
      }
    }
    turn_back(job, &work, head, rows, weight, state.sum + head * rows * dv);
  }
  free(work.memory);
  return 0;
}

/* The softmax of other keys joins that of a job */
static void join_states(State one, State other, int64_t rows, int64_t dv) {
  for (int64_t r = 0; r < rows; r++) {
    const float top = fmaxf(one.top[r], other.top[r]), own = expf(one.top[r] - top), more = expf(other.top[r] - top);
    one.top[r] = top;
    one.weight[r] = one.weight[r] * own + other.weight[r] * more;
    for (int64_t j = r * dv; j < (r + 1) * dv; j++) one.sum[j] = one.sum[j] * own + other.sum[j] * more;
  }
}

/* Where a softmax stands, to the caller's arrays; or its result in the order of the model */
static void give(const Rows *job, const Ask *ask, State state, void *out) {
  const int64_t rows = ask->is.group * ask->is.count, all = job->heads * rows, dv = job->dv;
  if (!out) {
    memcpy(ask->is.top, state.top, (size_t)all * 4);
    memcpy(ask->is.weight, state.weight, (size_t)all * 4);
    memcpy(ask->is.sum, state.sum, (size_t)(all * dv) * 4);
    return;
  }
  for (int64_t i = 0; i < all; i++) {
    const int64_t b = i / (job->kv_heads * rows), c = i % ask->is.count, heads = job->kv_heads * ask->is.group;
    const int64_t at = ((b * ask->is.count + c) * heads + i / ask->is.count % heads) * dv;
    const float up = 1 / (state.weight[i] < 1e-30f ? 1e-30f : state.weight[i]);
    const float *y = state.sum + i * dv;
    if (ask->is.out_kind == 1)
      for (int64_t j = 0; j < dv; j++) ((uint16_t *)out)[at + j] = narrow(y[j] * up);
    else
      for (int64_t j = 0; j < dv; j++) ((float *)out)[at + j] = y[j] * up;
  }
}

typedef struct {
  const Rows *job;
  const Ask *ask;
  State state;
} Part;

static void *attend_in_thread(void *p) {
  const Part *part = p;
  return (void *)(intptr_t)attend(part->job, part->ask, part->state, 0);
}

/* Queries q [batch, query heads, count, d] at packed rows and at exact ones k [batch, kv heads, exact, d] and v, all contiguous; out
 * [batch, count, query heads, dv], or NULL. The jobs have different keys, a thread each, at most THREADS; the first one takes the exact
 * rows too. 0, or 1 where memory ran out. Threads are started anew: this takes a few dozen microseconds and leaves nothing behind, as a
 * fork wants it. */
int tqai_attend(const Rows *jobs, int64_t count, const Asked *is, const void *q, const void *k, const void *v, int64_t exact, int64_t seen,
                float scaling, float softcap, void *out) {
  const int64_t h = jobs->kv_heads, d = jobs->d, each = is->count * d;
  const Ask all = {*is, {q, h * is->group * each, each, d}, {k, h * exact * d, exact * d, d},
                   {v, h * exact * jobs->dv, exact * jobs->dv, jobs->dv}, exact, seen, scaling, softcap}, *ask = &all;
  const int64_t rows = jobs->heads * ask->is.group * ask->is.count, dv = jobs->dv, size = rows * (dv + 2);
  float *memory = malloc((size_t)(count * size) * 4);
  if (!memory) return 1;
  Part parts[THREADS];
  for (int64_t i = 0; i < count; i++) {
    float *p = memory + i * size;
    parts[i] = (Part){jobs + i, ask, {p, p + rows, p + 2 * rows}};
    for (int64_t r = 0; r < rows; r++) {
      const int64_t head = r / ask->is.count % (jobs->kv_heads * ask->is.group);
      p[r] = ask->is.aux && i == 0 ? ask->is.aux[head] : LEAST, p[rows + r] = ask->is.aux && i == 0 ? 1 : 0;
    }
  }
  int failed = 0;
#ifdef _WIN32
  for (int64_t i = 1; i < count; i++) failed |= attend_in_thread(parts + i) != NULL;
  failed |= attend(jobs, ask, parts->state, 1);
#else
  pthread_t threads[THREADS];
  int runs[THREADS];
  for (int64_t i = 1; i < count; i++) runs[i] = !pthread_create(threads + i, NULL, attend_in_thread, parts + i);
  failed = attend(jobs, ask, parts->state, 1);
  for (int64_t i = 1; i < count; i++) {
    void *other = NULL;
    if (runs[i])
      pthread_join(threads[i], &other);
    else
      other = attend_in_thread(parts + i);
    failed |= other != NULL;
  }
#endif
  for (int64_t i = 1; i < count && !failed; i++) join_states(parts[0].state, parts[i].state, rows, dv);
  if (!failed) give(jobs, ask, parts[0].state, out);
  free(memory);
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
