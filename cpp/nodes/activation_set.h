// Activations that are quantized for matrix products, as ggml custom nodes: assign rows to matrices, quantize them. A
// node boundary is a barrier, so each step is a separate node and may rely on the one before.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/thread_memory.h"
#include "format/attributes.h"
#include "host/host.h"
#include "kernels/kernel.h"
#include "nodes/custom_node.h"
#include "nodes/row_source.h"

namespace agq {

/// Attributes of each matrix of a weight tensor (one matrix, or one per expert).
using tensor_attributes = std::vector<std::shared_ptr<const matrix_attributes>>;

/// Memory for packed activations. All products of a backend share it; it holds one activation set at a time.
class activation_buffer {
  public:
    /// Addresses of the parts of a set.
    struct parts {
        int8_t *q;
        int32_t *bias;
        float *scale;
    };

    activation_buffer() = default;
    ~activation_buffer();
    activation_buffer(const activation_buffer &) = delete;
    activation_buffer &operator=(const activation_buffer &) = delete;

    /// Makes room for `rows` rows of `k` columns. Throws std::bad_alloc and changes nothing if memory runs out.
    void reserve(int64_t rows, int64_t k);
    /// The parts of a set; room must have been reserved.
    parts split(int64_t rows, int64_t k) const { return split(memory_, rows, k); }

    /// Bytes of `rows` rows of `k` columns, and their parts in memory of that size, aligned to 64 bytes.
    static size_t bytes(int64_t rows, int64_t k);
    static parts split(void *memory, int64_t rows, int64_t k);

  private:
    unsigned char *memory_ = nullptr;
    size_t capacity_ = 0;
};

/// Rows of one input tensor, quantized once and multiplied with one or several weights.
struct activation_set {
    /// Packed rows that are multiplied with the same matrix.
    struct segment {
        int matrix;
        int64_t first, count;
        int bits;  ///< of the activations; 0: as the matrix says
    };
    struct unit {
        int matrix;
        int64_t first;
        int count;
        int bits;
    };

    static constexpr int most_experts = 64;  ///< of a token, with `one_token`

    const ggml_tensor *x = nullptr;
    const ggml_tensor *ids = nullptr;  ///< experts of each token; null: all rows use matrix 0
    const kernel *kern = nullptr;
    const tensor_attributes *attributes = nullptr;
    const activation_buffer *buffer = nullptr;
    const row_source *source = nullptr;          ///< computes the rows of x; null: they are in memory
    const thread_memory *memory = nullptr;       ///< thread_bytes() in each thread
    bool one_token = false;                      ///< whether x is one token whose experts quantize rows alike
    int bits = 0;                                ///< of all rows; 0: as the matrices say
    const std::vector<uint8_t> *four = nullptr;  ///< by row: whether it has 4 bits instead; null: none has

    std::vector<segment> segments;
    std::vector<unit> units;       ///< activation blocks, the unit of work
    std::vector<int64_t> order;    ///< packed row -> row of the product (token-major, then expert slot)
    std::vector<int64_t> invalid;  ///< rows of the product whose expert does not exist
    std::atomic<int64_t> next{0};

    /// Rows of the product.
    int64_t rows() const;
    /// Rows that are quantized.
    int64_t packed_rows() const;
    /// Fills `segments`, `units`, `order` and `invalid`. If `ids` or `four` is set, its values must have been computed.
    void route();
    /// With `one_token` in place of route(): fills `units` and `order`, which do not depend on the values of `ids`.
    void plan_one_token();
    /// With `one_token`: fills `found`, of most_experts, and returns how many there are. `ids` must have been computed.
    int segments_of_token(segment *found) const;
    /// The expert of a row of the product; -1: there is no such expert.
    int64_t expert(int64_t flat) const;
    size_t thread_bytes() const;
    int64_t scale_stride() const;  ///< scales per row
    void route_to_experts();
    void route_by_bits();
    /// The packed activations, starting at row `first`.
    activation_buffer::parts packed(int64_t first) const;
};

// Functions of the custom nodes. `userdata` is an activation_set.
void route_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void quantize_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node route{route_node, false}, quantize{quantize_node, false};
}  // namespace node

}  // namespace agq
