// Every path of product.h that runs here against sums in double precision, on buffers without a byte to spare.
#ifdef EMULATED
#include "emulated_avx512.h"
#endif

#include "product.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

namespace {

std::mt19937 chance(7);

float draw() { return std::uniform_real_distribution<float>(-1, 1)(chance); }

void draw_into(float& value) { value = draw(); }
void draw_into(trim::bfloat16& value) {
    const float drawn = draw();
    uint32_t bits;
    std::memcpy(&bits, &drawn, 4);
    value.bits = uint16_t(bits >> 16);
}
// Subnormal ones, too.
void draw_into(trim::float16& value) { value.bits = uint16_t(chance() % 0x3c00 | (chance() & 1) << 15); }

template <class V>
int check(int64_t rows, int64_t columns, double density, trim::Isa isa, const char* name) {
    const int64_t bytes = (columns + 7) / 8;
    std::unique_ptr<uint8_t[]> bits(new uint8_t[size_t(rows * bytes)]());
    std::unique_ptr<int64_t[]> offsets(new int64_t[size_t(rows + 1)]());
    for (int64_t r = 0; r < rows; ++r) {
        // Of every seven rows one is empty and one full.
        const double kept = r % 7 == 2 ? 0 : r % 7 == 5 ? 1.1 : density;
        offsets[size_t(r + 1)] = offsets[size_t(r)];
        for (int64_t i = 0; i < columns; ++i)
            if (std::uniform_real_distribution<>(0, 1)(chance) < kept) {
                bits[size_t(r * bytes + i / 8)] |= uint8_t(0x80 >> i % 8);
                ++offsets[size_t(r + 1)];
            }
    }
    const int64_t count = offsets[size_t(rows)];
    std::unique_ptr<V[]> values(new V[size_t(count)]);
    for (int64_t i = 0; i < count; ++i) draw_into(values[size_t(i)]);
    const trim::Matrix<V> matrix{bits.get(), offsets.get(), values.get(), rows, bytes};
    std::vector<float> dense(size_t(rows * bytes * 8), 7), expected(size_t(rows * columns), 0);
    trim::decode(matrix, dense.data(), 0, rows, isa);
    for (int64_t r = 0, next = 0; r < rows; ++r)
        for (int64_t i = 0; i < bytes * 8; ++i) {
            const bool kept = bits[size_t(r * bytes + i / 8)] >> (7 - i % 8) & 1;
            const float weight = kept ? trim::widen(values[size_t(next++)]) : 0;
            if (i < columns) expected[size_t(r * columns + i)] = weight;
            if (dense[size_t(r * bytes * 8 + i)] != weight) {
                std::printf("%s decodes %ld x %ld wrongly at %ld, %ld\n", name, long(rows), long(columns), long(r), long(i));
                return 1;
            }
        }
    for (int n = 1; n <= trim::MOST_COLUMNS; ++n) {
        std::vector<float> x(size_t(n * columns)), bias(static_cast<size_t>(rows)), y(size_t(n * rows), NAN);
        for (float& value : x) value = draw();
        for (float& value : bias) value = draw();
        const bool biased = n % 2;
        const std::vector<float> inputs = trim::arranged<V>(x.data(), n, columns, isa);
        const int64_t middle = rows / 3;
        trim::multiply(matrix, inputs.data(), n, biased ? bias.data() : nullptr, y.data(), 0, middle, isa);
        trim::multiply(matrix, inputs.data(), n, biased ? bias.data() : nullptr, y.data(), middle, rows, isa);
        for (int c = 0; c < n; ++c)
            for (int64_t r = 0; r < rows; ++r) {
                double sum = biased ? bias[size_t(r)] : 0, size = std::fabs(sum);
                for (int64_t i = 0; i < columns; ++i) {
                    const double part = double(expected[size_t(r * columns + i)]) * x[size_t(c * columns + i)];
                    sum += part;
                    size += std::fabs(part);
                }
                const double off = std::fabs(y[size_t(c * rows + r)] - sum);
                if (!(off <= size * 1e-6 + 1e-12)) {
                    std::printf("%s, %ld x %ld, %d columns: off by %g at %ld\n", name, long(rows), long(columns), n, off, long(r));
                    return 1;
                }
            }
    }
    return 0;
}

}  // namespace

int main() {
    const char* names[] = {"portable", "avx2", "avx512", "vbmi2"};
    int wrong = 0;
    for (int path = 0; path < 4; ++path) {
        const auto isa = static_cast<trim::Isa>(path);
#ifdef EMULATED
        if (isa <= trim::Isa::avx2) continue;
#else
        if (isa > trim::widest_isa()) continue;
#endif
        for (int64_t columns : {1, 7, 8, 9, 63, 64, 65, 130, 515})
            for (int64_t rows : {1, 3, 8, 40})
                for (double density : {0.0, 0.05, 0.3, 0.5, 1.1}) {
                    wrong += check<float>(rows, columns, density, isa, names[path]);
                    wrong += check<trim::bfloat16>(rows, columns, density, isa, names[path]);
                    wrong += check<trim::float16>(rows, columns, density, isa, names[path]);
                }
        std::printf("checked %s\n", names[path]);
    }
    return wrong != 0;
}
