// Memory of the captured mass; ggml's own buffers, so that it needs no CUDA here.
#include "hylra-meters.h"

#include <new>

void hylra_meters::resize(size_t new_rows, size_t new_n_layer) {
    rows    = new_rows;
    n_layer = new_n_layer;
    host.assign(rows*n_layer, {});
    devices.clear();
}

void hylra_meters::clear() {
    host.assign(rows*n_layer, {});
    for (on_device & device : devices) {
        ggml_backend_buffer_clear(device.buffer.get(), 0);
    }
}

hylra_meters::on_device & hylra_meters::on_device_of(ggml_backend_buffer_t cache) {
    const ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(cache);
    for (on_device & device : devices) {
        if (ggml_backend_buffer_get_type(device.buffer.get()) == type) {
            return device;
        }
    }
    on_device device;
    device.context.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    device.values = ggml_new_tensor_1d(device.context.get(), GGML_TYPE_I8, int64_t(rows*n_layer*sizeof(hylra_meter)));
    device.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(device.context.get(), type));
    if (!device.buffer) {
        throw std::bad_alloc();
    }
    ggml_backend_buffer_clear(device.buffer.get(), 0);
    devices.push_back(std::move(device));
    return devices.back();
}

hylra_meter * hylra_meters::layer(size_t il, ggml_backend_buffer_t cache) {
    hylra_meter * all = ggml_backend_buffer_is_host(cache) ? host.data() : (hylra_meter *) on_device_of(cache).values->data;
    return all + il*rows;
}

static void add(hylra_meter & to, const hylra_meter * from, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        to.mass += from[i].mass;
        to.n    += from[i].n;
    }
}

hylra_meter hylra_meters::sum(size_t il) const {
    hylra_meter total;
    if (il >= n_layer) {
        return total;
    }
    add(total, host.data() + il*rows, rows);
    std::vector<hylra_meter> copy(rows);
    for (const on_device & device : devices) {
        ggml_backend_tensor_get(device.values, copy.data(), il*rows*sizeof(hylra_meter), rows*sizeof(hylra_meter));
        add(total, copy.data(), rows);
    }
    return total;
}
