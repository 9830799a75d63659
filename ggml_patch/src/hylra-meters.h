// Captured mass of the select layers, kept where the layer runs: in host memory and, from the first graph on, on each device that holds
// a part of the cache. Kernels add to it; nobody reads it during a step.
#pragma once

#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// Attention mass that one row (list and token of a batch) of a select layer found on its own selection.
struct hylra_meter {
    double   mass = 0.0;
    uint64_t n    = 0;
};

class hylra_meters {
public:
    void resize(size_t rows, size_t n_layer); // forgets all; graphs built before must not run again
    void clear();                             // addresses stay

    hylra_meter * layer(size_t il, ggml_backend_buffer_t cache); // [rows] in the memory that `cache` lies in
    hylra_meter   sum(size_t il) const;                          // the device must be idle

private:
    struct on_device {
        ggml_context_ptr        context;
        ggml_backend_buffer_ptr buffer;
        ggml_tensor *           values; // I8 [bytes]
    };

    on_device & on_device_of(ggml_backend_buffer_t cache);

    size_t rows = 0, n_layer = 0;
    std::vector<hylra_meter> host; // [rows, n_layer]
    std::vector<on_device>   devices;
};
