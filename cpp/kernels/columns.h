// Internal to the vector kernels: the columns of an activation row in stored order, one group of 64 after the other.
//
// Everything is in an anonymous namespace, because each kernel file is compiled with flags of its own and the linker
// must not merge the copies. For the same reason no template or inline function of the standard library is used.
#pragma once

#include <cstring>

#include "kernel.h"

namespace agq {
namespace {

/// Hands out the groups of one row. Where the 64 columns of a group are neighbours in the row, the result points into
/// the row; otherwise they are gathered into the reader's own buffer.
class column_reader {
  public:
    column_reader(const activation_format &format, const float *row) : format_(format), row_(row) {}

    /// The next 64 columns, valid until the next call.
    const float *next_group() {
        if (column_ >= format_.n_listed) {
            skip_listed();
            if (run_end() - channel_ >= group_columns) {
                const float *group = row_ + channel_;
                channel_ += group_columns;
                column_ += group_columns;
                return group;
            }
        }
        for (int filled = 0; filled < group_columns;) filled += fill(filled);
        column_ += group_columns;
        return buffer_;
    }

  private:
    /// Copies at least one column to buffer_[filled ...] and says how many.
    int fill(int filled) {
        const int column = column_ + filled;
        if (column < format_.n_listed) {
            buffer_[filled] = row_[format_.listed[column]];
            return 1;
        }
        skip_listed();
        int count = run_end() - channel_;
        if (count > group_columns - filled) count = group_columns - filled;
        std::memcpy(buffer_ + filled, row_ + channel_, count * sizeof(float));
        channel_ += count;
        return count;
    }

    /// Moves channel_ to the next channel that is not listed.
    void skip_listed() {
        while (sorted_ < format_.n_listed && format_.listed_sorted[sorted_] == channel_) {
            sorted_++;
            channel_++;
        }
    }

    /// End of the run of channels that are not listed and that begins at channel_.
    int run_end() const { return sorted_ < format_.n_listed ? format_.listed_sorted[sorted_] : format_.k; }

    const activation_format &format_;
    const float *row_;
    int column_ = 0;   ///< next stored column
    int channel_ = 0;  ///< next channel of the part that is not listed
    int sorted_ = 0;   ///< listed channels below channel_
    alignas(64) float buffer_[group_columns];
};

}  // namespace
}  // namespace agq
