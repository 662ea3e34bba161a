// The nodes of one segment of a pruned run, and the memory of the whole run.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "prune/cut_job.h"
#include "prune/graph_copy.h"

namespace agq {

struct run_nodes {
    std::vector<ggml_tensor *> nodes;  ///< of the segment
    std::deque<cut_job> jobs;          ///< of the segment's nodes
    tensor_arena arena;
    std::deque<std::vector<int32_t>> lists;   ///< that jobs and key choices point to
    std::deque<std::vector<uint8_t>> spared;  ///< likewise
    ggml_backend_buffer *buffer = nullptr;    ///< any of the host's buffers for nodes

    void begin_run(ggml_backend_buffer *of_host) {
        arena.clear();
        lists.clear();
        spared.clear();
        buffer = of_host;
    }
    void begin_segment() {
        nodes.clear();
        jobs.clear();
    }
    void add(ggml_custom_op function, void *userdata) { nodes.push_back(arena.custom(function, userdata, buffer)); }
    /// Adds a node for the latest job.
    void add_job() { add(cut_node, &jobs.back()); }
};

}  // namespace agq
