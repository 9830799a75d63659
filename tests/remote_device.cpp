// A model whose layers lie on a device without kernels of ours: llama.cpp's RPC backend, which says yes to every node.
//   remote_device serve PORT                      offers this machine's CPU as such a device, until it is killed
//   remote_device decode PORT MODEL GPU_LAYERS    prints as JSON what HyLRA says of a few steps, and whether they are those of dense
#include "hylra.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static const int N_PAST = 600, N_STEPS = 3, N_VOCAB = 96;

static int serve(const std::string & endpoint) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_rpc_start_server(endpoint.c_str(), nullptr, 1, 1, &cpu);
    return 1; // it returns only when the port is taken
}

static bool decode(llama_context * ctx, int start, int n) {
    std::vector<llama_token> tokens;
    for (int i = 0; i < n; ++i) {
        tokens.push_back((start + i)*37 % N_VOCAB);
    }
    return llama_decode(ctx, llama_batch_get_one(tokens.data(), n)) == 0;
}

// Logits of a few steps behind the prompt; the cache is as before afterwards.
static std::vector<float> steps(llama_context * ctx) {
    std::vector<float> out;
    for (int i = 0; i < N_STEPS && decode(ctx, N_PAST + i, 1); ++i) {
        const float * logits = llama_get_logits_ith(ctx, -1);
        out.insert(out.end(), logits, logits + N_VOCAB);
    }
    llama_memory_seq_rm(llama_get_memory(ctx), 0, N_PAST, -1);
    return out;
}

static void print(llama_context * ctx, bool equal, bool complete) {
    hylra_status status;
    hylra_get_status(ctx, &status);
    std::vector<uint32_t> states(status.n_layer);
    hylra_layer_states(ctx, states.data(), states.size());
    printf("{\"on\": %d, \"sparse_steps\": %d, \"reason\": \"%s\", \"equal\": %d, \"complete\": %d, \"states\": [", status.on, int(status.n_step_sparse),
           hylra_reason(ctx), equal, complete);
    for (size_t il = 0; il < states.size(); ++il) {
        printf("%s\"%s\"", il ? ", " : "", hylra_layer_text(states[il]));
    }
    printf("]}\n");
}

static llama_context * open_context(const std::string & endpoint, const char * path, int n_gpu_layers) {
    ggml_backend_reg_t reg = ggml_backend_rpc_add_server(endpoint.c_str());
    static ggml_backend_dev_t devices[2] = { ggml_backend_reg_dev_get(reg, 0), nullptr };
    llama_model_params model_params = llama_model_default_params();
    model_params.devices      = devices;
    model_params.n_gpu_layers = n_gpu_layers;
    llama_model * model = llama_model_load_from_file(path, model_params);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = 1024;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return model ? llama_init_from_model(model, params) : nullptr;
}

int main(int argc, char ** argv) {
    if (argc < 3) { return 2; }
    const std::string endpoint = std::string("127.0.0.1:") + argv[2];
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    if (strcmp(argv[1], "serve") == 0) { return serve(endpoint); }
    llama_context * ctx = argc == 5 ? open_context(endpoint, argv[3], atoi(argv[4])) : nullptr;
    if (!ctx || !decode(ctx, 0, N_PAST)) { return 3; }
    const std::vector<float> with_policy = steps(ctx);
    hylra_set_policy(ctx, nullptr, nullptr, 0);
    const std::vector<float> dense = steps(ctx);
    hylra_use_model_policy(ctx);
    steps(ctx);
    print(ctx, with_policy == dense, with_policy.size() == size_t(N_STEPS*N_VOCAB));
    return 0;
}
