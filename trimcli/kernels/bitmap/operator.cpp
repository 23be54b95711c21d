// The operator `trimcli::bitmap_linear` on CPUs; its schema is declared in operator.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "product.h"

namespace {

// With more columns than the kernels take, so many rows at a time are decoded, which stay in the processor's cache.
constexpr int64_t TILE_BYTES = 1 << 20;
// Rows of about so many weights are one thread's work at least.
constexpr int64_t GRAIN_WEIGHTS = 1 << 15;

template <class V>
at::Tensor product(const at::Tensor& x, const trim::Matrix<V>& matrix, const at::Tensor& bias, int64_t columns) {
    const int64_t n = x.size(0), rows = matrix.rows;
    if (n == 0 || rows == 0) return at::empty({n, rows}, x.options());
    const trim::Isa isa = trim::best_isa();
    const int64_t grain = std::max<int64_t>(1, GRAIN_WEIGHTS / std::max<int64_t>(1, columns));
    if (n <= trim::MOST_COLUMNS) {
        at::Tensor y = at::empty({n, rows}, x.options());
        const auto inputs = trim::arranged<V>(x.const_data_ptr<float>(), n, columns, isa);
        const float* added = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
        float* out = y.mutable_data_ptr<float>();
        at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
            trim::multiply(matrix, inputs.data(), int(n), added, out, begin, end, isa);
        });
        return y;
    }
    const int64_t width = std::max<int64_t>(8, matrix.bytes * 8);
    const int64_t tile = std::clamp<int64_t>(TILE_BYTES / (width * 4), 16, std::max<int64_t>(16, rows));
    at::Tensor dense = at::empty({tile, matrix.bytes * 8}, x.options());
    float* out = dense.mutable_data_ptr<float>();
    at::Tensor y = at::empty({rows, n}, x.options());
    const at::Tensor inputs = x.t();
    for (int64_t first = 0; first < rows; first += tile) {
        const int64_t last = std::min(first + tile, rows);
        at::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
            trim::decode(matrix, out + (begin - first) * matrix.bytes * 8, begin, end, isa);
        });
        at::Tensor part = y.narrow(0, first, last - first);
        at::mm_out(part, dense.narrow(0, 0, last - first).narrow(1, 0, columns), inputs);
    }
    if (bias.defined()) y.add_(bias.unsqueeze(1));
    return y.t().contiguous();
}

template <class V>
at::Tensor typed(
    const at::Tensor& x, const at::Tensor& bits, const at::Tensor& offsets, const at::Tensor& values,
    const at::Tensor& bias, int64_t columns) {
    const trim::Matrix<V> matrix{
        bits.const_data_ptr<uint8_t>(), offsets.const_data_ptr<int64_t>(),
        static_cast<const V*>(values.const_data_ptr()), bits.size(0), bits.size(1)};
    return product(x, matrix, bias, columns);
}

at::Tensor bitmap_linear(
    const at::Tensor& inputs, const at::Tensor& bits, const at::Tensor& offsets, const at::Tensor& values,
    const std::optional<at::Tensor>& bias) {
    TORCH_CHECK(inputs.dim() >= 1, "inputs are [..., D_in], not a single number");
    const int64_t columns = inputs.size(-1), rows = bits.dim() == 2 ? bits.size(0) : -1;
    TORCH_CHECK(
        rows >= 0 && bits.scalar_type() == at::kByte && bits.is_contiguous() && bits.size(1) == (columns + 7) / 8,
        "keep bits are uint8 [D_out, ceil(D_in / 8)]");
    TORCH_CHECK(
        offsets.scalar_type() == at::kLong && offsets.is_contiguous() && offsets.dim() == 1 && offsets.size(0) == rows + 1,
        "row offsets are int64 [D_out + 1]");
    TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "kept values are contiguous, of one dimension");
    TORCH_CHECK(
        offsets.const_data_ptr<int64_t>()[rows] == values.size(0), "the row offsets do not end with the number of kept values");
    TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == rows), "the bias is [D_out]");
    const int64_t n = c10::multiply_integers(inputs.sizes().slice(0, inputs.dim() - 1));
    const at::Tensor x = inputs.to(at::kFloat).contiguous().view({n, columns});
    const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
    at::Tensor y;
    switch (values.scalar_type()) {
        case at::kFloat: y = typed<float>(x, bits, offsets, values, added, columns); break;
        case at::kBFloat16: y = typed<trim::bfloat16>(x, bits, offsets, values, added, columns); break;
        case at::kHalf: y = typed<trim::float16>(x, bits, offsets, values, added, columns); break;
        default: TORCH_CHECK(false, "kept values are float32, bfloat16 or float16, not ", values.scalar_type());
    }
    std::vector<int64_t> shape = inputs.sizes().vec();
    shape.back() = rows;
    return y.to(inputs.scalar_type()).view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(trimcli, CPU, library) { library.impl("bitmap_linear", &bitmap_linear); }
