// The AVX-512 instructions of product.h in plain C++, so that its paths for them can be checked on any x86-64 processor.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define TRIM_AVX512 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define TRIM_VBMI2 TRIM_AVX512

namespace emulated {

struct f512 {
    float lane[16];
};
struct i512 {
    uint32_t lane[16];
};

template <class To, class From>
To cast(const From& from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline f512 setzero() { return {}; }
inline f512 load(const void* from) {
    f512 to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
inline i512 load_integers(const void* from) { return cast<i512>(load(from)); }
inline f512 fmadd(const f512& a, const f512& b, f512 c) {
    for (int i = 0; i < 16; ++i) c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}
inline f512 add(f512 a, const f512& b) {
    for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
    return a;
}
inline float reduce(const f512& a) {
    float sum = 0;
    for (float lane : a.lane) sum += lane;
    return sum;
}
TRIM_AVX512 inline i512 widen16(__m256i from) {
    uint16_t lanes[16];
    std::memcpy(lanes, &from, sizeof lanes);
    i512 to;
    for (int i = 0; i < 16; ++i) to.lane[i] = lanes[i];
    return to;
}
inline i512 shifted(i512 a, unsigned by) {
    for (uint32_t& lane : a.lane) lane <<= by;
    return a;
}
inline i512 both(i512 a, const i512& b) {
    for (int i = 0; i < 16; ++i) a.lane[i] &= b.lane[i];
    return a;
}
inline i512 everywhere(int value) {
    i512 to;
    for (uint32_t& lane : to.lane) lane = uint32_t(value);
    return to;
}
template <class Lane, class Vector>
Vector expand(uint64_t keep, const Vector& from) {
    constexpr int lanes = int(sizeof(Vector) / sizeof(Lane));
    Lane in[lanes], out[lanes];
    std::memcpy(in, &from, sizeof in);
    int next = 0;
    for (int i = 0; i < lanes; ++i) out[i] = keep >> i & 1 ? in[next++] : Lane(0);
    return cast<Vector>(out);
}
TRIM_AVX512 inline f512 from_halves(__m256i from) {
    const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(from));
    const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(from, 1));
    f512 to;
    std::memcpy(to.lane, &low, 32);
    std::memcpy(to.lane + 8, &high, 32);
    return to;
}
TRIM_AVX512 inline __m256i half(const i512& from, int which) {
    __m256i to;
    std::memcpy(&to, from.lane + 8 * which, sizeof to);
    return to;
}

}  // namespace emulated

#define __m512 emulated::f512
#define __m512i emulated::i512
#define _mm512_setzero_ps emulated::setzero
#define _mm512_loadu_ps emulated::load
#define _mm512_loadu_si512 emulated::load_integers
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_add_ps emulated::add
#define _mm512_reduce_add_ps emulated::reduce
#define _mm512_cvtepu16_epi32 emulated::widen16
#define _mm512_slli_epi32 emulated::shifted
#define _mm512_and_si512 emulated::both
#define _mm512_set1_epi32 emulated::everywhere
#define _mm512_maskz_expand_epi32 emulated::expand<uint32_t>
#define _mm512_maskz_expand_epi16 emulated::expand<uint16_t>
#define _mm512_maskz_expand_ps emulated::expand<float>
#define _mm512_cvtph_ps emulated::from_halves
#define _mm512_castsi512_ps emulated::cast<emulated::f512>
#define _mm512_castsi512_si256(a) emulated::half(a, 0)
#define _mm512_extracti64x4_epi64(a, which) emulated::half(a, which)
