// y = W x straight from keep bits and kept values, for 1 to 16 columns, with float32 sums. Nothing of torch in here.
//
// W [rows, columns] is held as `trim.packed/1` holds it: keep bits, `bytes` = ceil(columns / 8) a row, most significant
// bit first, the padding zero; the kept values in row order; and where the values of each row start. The caller vouches
// that every row has as many bits set as its offsets say.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define TRIM_X86 1
#endif

namespace trim {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class V>
struct Matrix {
    const uint8_t* bits;
    const int64_t* offsets;  // [rows + 1]
    const V* values;
    int64_t rows, bytes;
};

enum class Isa { portable, avx2, avx512, vbmi2 };
constexpr int MOST_COLUMNS = 16;
// Bits are read 64 at a time, and inputs beyond the columns are zero.
constexpr int64_t WORD = 64;
// Values are read in whole vectors, which may reach so many beyond the last of a row.
constexpr int64_t BEYOND = 32;
// How far ahead of a row's values and bits memory is asked for.
constexpr int64_t VALUES_AHEAD = 1024, BITS_AHEAD = 256;

inline int64_t stride_of(int64_t bytes) { return (bytes * 8 + WORD - 1) / WORD * WORD; }

inline uint64_t word_at(const uint8_t* bits, int64_t byte, int64_t bytes) {
    uint64_t word = 0;
    if (byte + 8 <= bytes)
        std::memcpy(&word, bits + byte, 8);
    else
        std::memcpy(&word, bits + byte, size_t(bytes - byte));
    return word;
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(float value) { return value; }

inline float widen(bfloat16 value) { return as_float(uint32_t(value.bits) << 16); }

inline float widen(float16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return as_float(sign | ((rest << 13) + 0x38000000));
    const float subnormal = float(rest) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

// Calls kept(column, value) for every kept weight of a row.
template <class V, class Kept>
void each_kept(const uint8_t* bits, const V* value, int64_t bytes, Kept kept) {
    for (int64_t byte = 0; byte < bytes; ++byte)
        for (unsigned left = bits[byte]; left;) {
            const int lead = __builtin_clz(left) - 24;
            left &= ~(0x80u >> lead);
            kept(byte * 8 + lead, widen(*value++));
        }
}

// sums[N] of one row with N columns of x: float32 [N, stride]. The other paths have the same arguments.
template <class V, int N>
void row_portable(const uint8_t* bits, const V* values, int64_t bytes, const float* x, int64_t stride, float* sums) {
    std::fill_n(sums, N, 0.f);
    each_kept(bits, values, bytes, [&](int64_t column, float weight) {
        for (int c = 0; c < N; ++c) sums[c] += weight * x[c * stride + column];
    });
}

#if TRIM_X86
#ifndef TRIM_AVX2
#define TRIM_AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#endif
#ifndef TRIM_AVX512
#define TRIM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt,bmi,bmi2")))
#define TRIM_VBMI2 __attribute__((target("avx512vbmi2,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt,bmi,bmi2")))
#endif
#define TRIM_INLINE inline __attribute__((always_inline))

// Independent sums a column, so that one product need not wait for the last.
constexpr int chains(int columns) { return columns == 1 ? 4 : columns <= 4 ? 2 : 1; }

// How 8 lanes are filled, by the byte of keep bits: the kept values in their places, zeros between.
struct Tables {
    // Bytes of 8 16-bit values, which both halves of a vector hold, to the upper halves of 8 32-bit lanes.
    alignas(64) std::array<std::array<uint8_t, 32>, 256> upper{};
    // Bytes of 8 16-bit values to 8 16-bit lanes.
    alignas(64) std::array<std::array<uint8_t, 16>, 256> lanes16{};
    // 8 32-bit values to 8 lanes; negative where nothing is kept.
    alignas(64) std::array<std::array<uint32_t, 8>, 256> lanes32{};

    constexpr Tables() {
        for (unsigned byte = 0; byte < 256; ++byte) {
            unsigned next = 0;
            for (unsigned lane = 0; lane < 8; ++lane) {
                const bool kept = byte >> (7 - lane) & 1;
                upper[byte][4 * lane] = upper[byte][4 * lane + 1] = 0x80;
                upper[byte][4 * lane + 2] = lanes16[byte][2 * lane] = uint8_t(kept ? 2 * next : 0x80);
                upper[byte][4 * lane + 3] = lanes16[byte][2 * lane + 1] = uint8_t(kept ? 2 * next + 1 : 0x80);
                lanes32[byte][lane] = kept ? next : 0x80000000u;
                next += kept;
            }
        }
    }
};
inline constexpr Tables tables{};

TRIM_INLINE __m128i load128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

TRIM_AVX2 TRIM_INLINE __m256i load256(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// 8 lanes of a byte of keep bits, which is given as `place`, 32 times it: so far in its table lies what fills them.
constexpr unsigned PLACE = 32, PLACES = 0xff * PLACE;

template <class Table>
TRIM_INLINE const char* entry(const Table& table, unsigned offset) {
    return reinterpret_cast<const char*>(table.data()) + offset;
}

TRIM_AVX2 TRIM_INLINE __m256 expand8(const bfloat16* values, unsigned place) {
    const __m256i both = _mm256_broadcastsi128_si256(load128(values));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, load256(entry(tables.upper, place))));
}

TRIM_AVX2 TRIM_INLINE __m256 expand8(const float16* values, unsigned place) {
    return _mm256_cvtph_ps(_mm_shuffle_epi8(load128(values), load128(entry(tables.lanes16, place / 2))));
}

TRIM_AVX2 TRIM_INLINE __m256 expand8(const float* values, unsigned place) {
    const __m256i lanes = load256(entry(tables.lanes32, place));
    const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
    return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}

TRIM_AVX2 TRIM_INLINE float total(__m256 lanes) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

TRIM_INLINE void ask_for(const void* place, int64_t ahead) {
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(place) + uintptr_t(ahead)), _MM_HINT_T0);
}

template <class V, int N>
TRIM_AVX2 void row_avx2(const uint8_t* bits, const V* values, int64_t bytes, const float* x, int64_t stride, float* sums) {
    constexpr int U = chains(N);
    __m256 sum[U][N];
    for (int u = 0; u < U; ++u)
        for (int c = 0; c < N; ++c) sum[u][c] = _mm256_setzero_ps();
    for (int64_t byte = 0; byte < bytes; byte += 8) {
        const uint64_t word = word_at(bits, byte, bytes);
        ask_for(values, VALUES_AHEAD);
        ask_for(bits + byte, BITS_AHEAD);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const unsigned place = unsigned(i ? word >> (8 * i - 5) : word << 5) & PLACES;
            const __m256 weights = expand8(values, place);
            values += _mm_popcnt_u32(place);
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c) {
                const __m256 inputs = _mm256_loadu_ps(x + c * stride + 8 * (byte + i));
                sum[i % U][c] = _mm256_fmadd_ps(weights, inputs, sum[i % U][c]);
            }
        }
    }
    for (int c = 0; c < N; ++c) {
        for (int u = 1; u < U; ++u) sum[0][c] = _mm256_add_ps(sum[0][c], sum[u][c]);
        sums[c] = total(sum[0][c]);
    }
}

template <class V>
TRIM_AVX2 void decode_avx2(const uint8_t* bits, const V* values, int64_t bytes, float* dense) {
    for (int64_t byte = 0; byte < bytes; ++byte) {
        _mm256_storeu_ps(dense + 8 * byte, expand8(values, bits[byte] * PLACE));
        values += _mm_popcnt_u32(bits[byte]);
    }
}

// The bits of each byte in the other order: masks of vectors begin with the least significant.
TRIM_INLINE uint64_t mirrored(uint64_t word) {
    word = (word >> 1 & 0x5555555555555555) | (word & 0x5555555555555555) << 1;
    word = (word >> 2 & 0x3333333333333333) | (word & 0x3333333333333333) << 2;
    return (word >> 4 & 0x0f0f0f0f0f0f0f0f) | (word & 0x0f0f0f0f0f0f0f0f) << 4;
}

TRIM_AVX512 TRIM_INLINE __m512 expand16(const bfloat16* values, __mmask16 keep) {
    const __m512i wide = _mm512_cvtepu16_epi32(load256(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_maskz_expand_epi32(keep, wide), 16));
}

TRIM_AVX512 TRIM_INLINE __m512 expand16(const float16* values, __mmask16 keep) {
    return _mm512_maskz_expand_ps(keep, _mm512_cvtph_ps(load256(values)));
}

TRIM_AVX512 TRIM_INLINE __m512 expand16(const float* values, __mmask16 keep) {
    return _mm512_maskz_expand_ps(keep, _mm512_loadu_ps(values));
}

template <class V, int N>
TRIM_AVX512 void row_avx512(
    const uint8_t* bits, const V* values, int64_t bytes, const float* x, int64_t stride, float* sums) {
    constexpr int U = chains(N);
    __m512 sum[U][N];
    for (int u = 0; u < U; ++u)
        for (int c = 0; c < N; ++c) sum[u][c] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < bytes; byte += 8) {
        const uint64_t word = mirrored(word_at(bits, byte, bytes));
        ask_for(values, VALUES_AHEAD);
        ask_for(bits + byte, BITS_AHEAD);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const unsigned keep = word >> 16 * i & 0xffff;
            const __m512 weights = expand16(values, __mmask16(keep));
            values += _mm_popcnt_u32(keep);
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c) {
                const __m512 inputs = _mm512_loadu_ps(x + c * stride + 8 * byte + 16 * i);
                sum[i % U][c] = _mm512_fmadd_ps(weights, inputs, sum[i % U][c]);
            }
        }
    }
    for (int c = 0; c < N; ++c) {
        for (int u = 1; u < U; ++u) sum[0][c] = _mm512_add_ps(sum[0][c], sum[u][c]);
        sums[c] = _mm512_reduce_add_ps(sum[0][c]);
    }
}

// 32 values of 16 bits at once, as two vectors of 16: of bfloat16 the even and the odd ones, which takes the least work.
struct Halves {
    __m512 one, other;
};

TRIM_VBMI2 TRIM_INLINE Halves expand32(const bfloat16* values, __mmask32 keep) {
    const __m512i lanes = _mm512_maskz_expand_epi16(keep, _mm512_loadu_si512(values));
    const __m512i odd = _mm512_and_si512(lanes, _mm512_set1_epi32(int(0xffff0000)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16)), _mm512_castsi512_ps(odd)};
}

TRIM_VBMI2 TRIM_INLINE Halves expand32(const float16* values, __mmask32 keep) {
    const __m512i lanes = _mm512_maskz_expand_epi16(keep, _mm512_loadu_si512(values));
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(lanes)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(lanes, 1))};
}

template <class V, int N>
TRIM_VBMI2 void row_vbmi2(
    const uint8_t* bits, const V* values, int64_t bytes, const float* x, int64_t stride, float* sums) {
    constexpr int U = (chains(N) + 1) / 2;
    __m512 sum[2 * U][N];
    for (int u = 0; u < 2 * U; ++u)
        for (int c = 0; c < N; ++c) sum[u][c] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < bytes; byte += 8) {
        const uint64_t word = mirrored(word_at(bits, byte, bytes));
        ask_for(values, VALUES_AHEAD);
        ask_for(bits + byte, BITS_AHEAD);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const uint32_t keep = uint32_t(word >> 32 * i);
            const Halves weights = expand32(values, __mmask32(keep));
            values += _mm_popcnt_u32(keep);
            const int u = 2 * (i % U);
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c) {
                const float* inputs = x + c * stride + 8 * byte + 32 * i;
                sum[u][c] = _mm512_fmadd_ps(weights.one, _mm512_loadu_ps(inputs), sum[u][c]);
                sum[u + 1][c] = _mm512_fmadd_ps(weights.other, _mm512_loadu_ps(inputs + 16), sum[u + 1][c]);
            }
        }
    }
    for (int c = 0; c < N; ++c) {
        for (int u = 1; u < 2 * U; ++u) sum[0][c] = _mm512_add_ps(sum[0][c], sum[u][c]);
        sums[c] = _mm512_reduce_add_ps(sum[0][c]);
    }
}
#endif

// What this processor has.
inline Isa widest_isa() {
#if TRIM_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) return __builtin_cpu_supports("avx512vbmi2") ? Isa::vbmi2 : Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::portable;
}

// The quickest of it: a Zen 5 takes 1.3 to 2.3 times as long with AVX-512's expand as with AVX2 and a table.
inline Isa best_isa() {
    const Isa widest = widest_isa();
#if TRIM_X86
    if (widest > Isa::avx2 && __builtin_cpu_is("amd")) return Isa::avx2;
#endif
    return widest;
}

// Where input `column` belongs in a row of `arranged`: of 32 inputs, VBMI2 takes the even ones first if in bfloat16.
template <class V>
int64_t place_of(int64_t column, Isa isa) {
    if (isa != Isa::vbmi2 || !std::is_same<V, bfloat16>::value) return column;
    return column / 32 * 32 + column % 2 * 16 + column % 32 / 2;
}

// x, float32 [n, columns], as the kernels read it: [n, stride_of(bytes)], zero beyond the columns.
template <class V>
std::vector<float> arranged(const float* x, int64_t n, int64_t columns, Isa isa) {
    const int64_t stride = stride_of((columns + 7) / 8);
    std::vector<float> found(size_t(n * stride), 0.f);
    for (int64_t c = 0; c < n; ++c)
        for (int64_t i = 0; i < columns; ++i) found[size_t(c * stride + place_of<V>(i, isa))] = x[c * columns + i];
    return found;
}

template <class V>
using Row = void (*)(const uint8_t*, const V*, int64_t, const float*, int64_t, float*);

template <class V, int N>
Row<V> row_kernel(Isa isa) {
#if TRIM_X86
    if constexpr (sizeof(V) == 2)
        if (isa == Isa::vbmi2) return row_vbmi2<V, N>;
    if (isa >= Isa::avx512) return row_avx512<V, N>;
    if (isa == Isa::avx2) return row_avx2<V, N>;
#endif
    (void)isa;
    return row_portable<V, N>;
}

template <class V>
Row<V> row_kernel(int n, Isa isa) {
    switch (n) {
        case 1: return row_kernel<V, 1>(isa);
        case 2: return row_kernel<V, 2>(isa);
        case 3: return row_kernel<V, 3>(isa);
        case 4: return row_kernel<V, 4>(isa);
        case 5: return row_kernel<V, 5>(isa);
        case 6: return row_kernel<V, 6>(isa);
        case 7: return row_kernel<V, 7>(isa);
        default: return row_kernel<V, 8>(isa);
    }
}

// Calls row(bits, values) for rows [begin, end): values that vectors may read beyond, the last ones from a copy.
template <class V, class Run>
void each_row(const Matrix<V>& matrix, int64_t begin, int64_t end, Run run) {
    const int64_t* offsets = matrix.offsets;
    const int64_t safe = offsets[matrix.rows] - BEYOND;
    int64_t row = begin;
    for (; row < end && offsets[row + 1] <= safe; ++row)
        run(row, matrix.bits + row * matrix.bytes, matrix.values + offsets[row]);
    if (row == end) return;
    const int64_t first = offsets[row];
    std::vector<V> copy(size_t(offsets[end] - first + BEYOND));
    std::copy(matrix.values + first, matrix.values + offsets[end], copy.begin());
    for (; row < end; ++row) run(row, matrix.bits + row * matrix.bytes, copy.data() + (offsets[row] - first));
}

// y [n, rows], float32, rows [begin, end) of it, of `arranged` inputs; n from 1 to 16. bias: [rows] or null.
template <class V>
void multiply(
    const Matrix<V>& matrix, const float* x, int n, const float* bias, float* y, int64_t begin, int64_t end, Isa isa) {
    const int64_t stride = stride_of(matrix.bytes);
    const int once = n <= 8 ? n : (n + 1) / 2, twice = n - once;
    const Row<V> one = row_kernel<V>(once, isa), other = row_kernel<V>(twice, isa);
    each_row(matrix, begin, end, [&](int64_t row, const uint8_t* bits, const V* values) {
        float sums[MOST_COLUMNS];
        one(bits, values, matrix.bytes, x, stride, sums);
        if (twice) other(bits, values, matrix.bytes, x + once * stride, stride, sums + once);
        for (int c = 0; c < n; ++c) y[c * matrix.rows + row] = bias ? sums[c] + bias[row] : sums[c];
    });
}

// Rows [begin, end) as float32 [end - begin, 8 * bytes].
template <class V>
void decode(const Matrix<V>& matrix, float* dense, int64_t begin, int64_t end, Isa isa) {
    each_row(matrix, begin, end, [&](int64_t row, const uint8_t* bits, const V* values) {
        float* out = dense + (row - begin) * matrix.bytes * 8;
#if TRIM_X86
        if (isa != Isa::portable) return decode_avx2(bits, values, matrix.bytes, out);
#endif
        std::fill_n(out, matrix.bytes * 8, 0.f);
        each_kept(bits, values, matrix.bytes, [&](int64_t column, float weight) { out[column] = weight; });
    });
    (void)isa;
}

}  // namespace trim
