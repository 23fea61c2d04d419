/* What the classifier table does to packed rows in host memory; `native.py` builds and loads it.

   The roundings and their random bits are those of `row_formats.py`, the row-wise step that of
   `row_adam.py`; tests compare them. Rows are spread over threads, and a row's result does not
   depend on how many there are. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else /* knows no levels of x86-64 in this attribute */
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#endif
#else
#define VECTORISED
#endif

/* Rows ahead of the one at work whose first line is asked for, so that its page's address is known
   when its turn comes: at a million labels nearly every row lies in a page not looked at lately. */
enum { FAR = 4 };
enum { NONE, NEAREST, STOCHASTIC_FIRST, STOCHASTIC_SECOND };
struct move { char *column; float *packed; long width; long rounding; };

VECTORISED void unpack(const uint16_t *row, uint32_t *packed, long width) {
  for (long d = 0; d < width; d++) packed[d] = (uint32_t)row[d] << 16;
}

VECTORISED void pack_nearest(uint32_t *packed, uint16_t *row, long width) {
  for (long d = 0; d < width; d++) {
    uint32_t bits = packed[d] + 0x7FFF + ((packed[d] >> 16) & 1);
    packed[d] = bits & 0xFFFF0000;
    row[d] = bits >> 16;
  }
}

VECTORISED void pack_stochastic(uint32_t *packed, uint16_t *row, long width, uint64_t row_key,
                                const uint32_t *column_keys, int shift) {
  uint32_t low = (uint32_t)row_key, high = (uint32_t)(row_key >> 32);
  for (long d = 0; d < width; d++) {
    uint32_t noise = (low ^ column_keys[d]) * 0x85EBCA6Bu;
    noise ^= noise >> 13;
    noise = (noise ^ high) * 0xC2B2AE35u;
    noise ^= noise >> 16;
    uint32_t bits = packed[d] + ((noise >> shift) & 0xFFFF);
    packed[d] = bits & 0xFFFF0000;
    row[d] = bits >> 16;
  }
}

static long row_bytes(const struct move *move) {
  return move->width * (move->rounding == NONE ? 4 : 2);
}

/* Copies a row out of the table and asks for the next one, line by line: rows lie at random, and
   the processor's own prefetcher only finds the stream once it is half over. */
static void copy_in(float *packed, const char *row, const char *next, long bytes) {
  long b = 0;
  for (; b + 64 <= bytes; b += 64) {
    __builtin_prefetch(next + b);
    memcpy((char *)packed + b, row + b, 64);
  }
  memcpy((char *)packed + b, row + b, bytes - b);
}

/* Copies a row into the table past the caches: its old lines are not read, and nobody wants the new
   ones before a later step. */
static void copy_out(char *row, const void *packed, long bytes) {
#ifdef __SSE2__
  if (((uintptr_t)row | bytes) % 16 == 0) {
    const __m128i *from = packed;
    for (__m128i *to = (__m128i *)row; to < (__m128i *)(row + bytes); to++, from++)
      _mm_stream_si128(to, _mm_loadu_si128(from));
    return;
  }
#endif
  memcpy(row, packed, bytes);
}

/* Makes what this thread has stored past the caches seen by all. */
static void finish_stores(void) {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

static void prefetch(const char *row, long bytes) {
  for (long b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
}

void gather(const struct move *moves, long num_moves, const int64_t *index, long num_rows) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < num_rows; r++) {
    for (const struct move *m = moves; m < moves + num_moves; m++) {
      long bytes = row_bytes(m);
      const char *row = m->column + index[r] * bytes;
      float *packed = m->packed + r * m->width;
      const char *next = m->column + index[r + 1 < num_rows ? r + 1 : r] * bytes;
      if (r + FAR < num_rows) __builtin_prefetch(m->column + index[r + FAR] * bytes);
      if (m->rounding == NONE) copy_in(packed, row, next, bytes);
      else {
        prefetch(next, bytes);
        unpack((const uint16_t *)row, (uint32_t *)packed, m->width);
      }
    }
  }
}

void scatter(const struct move *moves, long num_moves, const int64_t *index, long num_rows,
             const uint64_t *row_keys, const uint32_t *column_keys) {
#pragma omp parallel
  {
#pragma omp for schedule(static) nowait
    for (long r = 0; r < num_rows; r++) {
      for (const struct move *m = moves; m < moves + num_moves; m++) {
        long bytes = row_bytes(m);
        char *row = m->column + index[r] * bytes;
        uint32_t *packed = (uint32_t *)(m->packed + r * m->width);
        if (r + FAR < num_rows) __builtin_prefetch(m->column + index[r + FAR] * bytes);
        if (m->rounding == NONE) {
          copy_out(row, m->packed + r * m->width, bytes);
          continue;
        }
        uint16_t stored[m->width];
        if (m->rounding == NEAREST) pack_nearest(packed, stored, m->width);
        else pack_stochastic(packed, stored, m->width, row_keys[r], column_keys,
                             m->rounding == STOCHASTIC_FIRST ? 16 : 0);
        copy_out(row, stored, bytes);
      }
    }
    finish_stores();
  }
}

/* The mean of a row's squares: 16 sums side by side, then those in pairs, whatever the processor. */
VECTORISED float mean_square(const float *row, long width) {
  float sums[16] = {0};
  long d = 0;
  for (; d + 16 <= width; d += 16)
    for (int lane = 0; lane < 16; lane++) sums[lane] += row[d + lane] * row[d + lane];
  for (; d < width; d++) sums[d % 16] += row[d] * row[d];
  for (int half = 8; half; half /= 2)
    for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
  return sums[0] / width;
}

VECTORISED void move_row(float *row, const float *gradient, long width, float keep, float rate) {
  for (long d = 0; d < width; d++) row[d] = row[d] * keep - gradient[d] * rate;
}

/* One AdamW step without first moment and with one second moment a row; `corrections` holds one
   bias correction for all rows or, with `stride` 1, one for each. */
void step_rowwise(float *rows, const float *gradients, float *exp_avg_sq, const float *corrections,
                  long stride, long num_rows, long width, float beta2, float eps, float lr,
                  float keep) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < num_rows; r++) {
    const float *gradient = gradients + r * width;
    exp_avg_sq[r] = beta2 * exp_avg_sq[r] + (1 - beta2) * mean_square(gradient, width);
    float rate = lr / (sqrtf(exp_avg_sq[r] / corrections[r * stride]) + eps);
    move_row(rows + r * width, gradient, width, keep, rate);
  }
}
