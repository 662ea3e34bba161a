// Matrix products on AGQ4 weights as ggml custom nodes: assign rows to matrices, quantize activations, multiply. Also
// row look-up. A node boundary is a barrier, so each step is a separate node and may rely on the one before.
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
    parts split(int64_t rows, int64_t k) const;

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

    const ggml_tensor *x = nullptr;
    const ggml_tensor *ids = nullptr;  ///< experts of each token; null: all rows use matrix 0
    const kernel *kern = nullptr;
    const tensor_attributes *attributes = nullptr;
    const activation_buffer *buffer = nullptr;
    const row_source *source = nullptr;          ///< computes the rows of x; null: they are in memory
    const thread_memory *memory = nullptr;       ///< with `source`: room for a block of rows in each thread
    int bits = 0;                                ///< of all rows; 0: as the matrices say
    const std::vector<uint8_t> *four = nullptr;  ///< by row: whether it has 4 bits instead; null: none has

    std::vector<segment> segments;
    std::vector<unit> units;       ///< activation blocks, the unit of work
    std::vector<int64_t> order;    ///< packed row -> row of the product (token-major, then expert slot)
    std::vector<int64_t> invalid;  ///< rows of the product whose expert does not exist
    std::atomic<int64_t> next{0};

    int64_t rows() const;
    /// Fills `segments`, `units`, `order` and `invalid`. If `ids` or `four` is set, its values must have been computed.
    void route();
    int64_t scale_stride() const;  ///< scales per row
    /// The packed activations, starting at row `first`.
    activation_buffer::parts packed(int64_t first) const;
};

/// One or several weight tensors times an activation set. Together, they have one barrier, and threads wait once for
/// the last unit of work.
struct product {
    struct part {
        const ggml_tensor *weights;
        const tensor_attributes *attributes;
        const ggml_tensor *result;  ///< only its data and strides are used
    };

    activation_set *set = nullptr;
    std::vector<part> parts;
    const thread_memory *memory = nullptr;  ///< thread_bytes() in each thread
    std::atomic<int64_t> next{0};

    size_t thread_bytes() const;
};

/// Look-up of rows of an AGQ4 tensor by number.
struct row_lookup {
    const ggml_tensor *weights = nullptr;
    const tensor_attributes *attributes = nullptr;
};

// Functions of the custom nodes. `userdata` is, in this order, an activation_set, an activation_set, a product, a
// row_lookup. A product node writes to the results of its parts. A row_lookup node reads row numbers from dst->src[0]
// and its tensor from dst->src[1].
void route_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void quantize_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void product_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void row_lookup_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node route{route_node, false}, quantize{quantize_node, false}, multiply{product_node, true},
    look_up_rows{row_lookup_node, true};
}  // namespace node

}  // namespace agq
