// Drives a fuzz target without libFuzzer: runs every file that is named and then, for some seconds, random changes of them.
//
//   replay SECONDS SEED FILE...      prints the number of executions, and of policies accepted by kind of input
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" long hylra_fuzz_accepted[3];
extern "C" int LLVMFuzzerInitialize(int *, char ***);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

typedef std::vector<uint8_t> input;

static input read_file(const char * path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        fprintf(stderr, "replay: %s cannot be read\n", path);
        exit(2);
    }
    return input(std::istreambuf_iterator<char>(file), {});
}

static input changed(const std::vector<input> & inputs, std::mt19937 & rng) {
    static const uint8_t EDGES[] = { 0, 1, 2, 4, 16, 64, 127, 128, 254, 255 };
    input out = inputs[rng() % inputs.size()];
    for (int n = 1 + rng() % 8; n > 0 && !out.empty(); --n) {
        const size_t at = rng() % out.size();
        switch (rng() % 4) {
            case 0: out[at] = uint8_t(rng()); break;
            case 1: out[at] = EDGES[rng() % std::size(EDGES)]; break;
            case 2: out.erase(out.begin() + at, out.begin() + at + rng() % std::min<size_t>(16, out.size() - at)); break;
            default: out.insert(out.begin() + at, 1 + rng() % 8, uint8_t(rng())); break;
        }
    }
    return out;
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: replay SECONDS SEED FILE...\n");
        return 2;
    }
    LLVMFuzzerInitialize(&argc, &argv);
    std::vector<input> inputs;
    for (int i = 3; i < argc; ++i) {
        inputs.push_back(read_file(argv[i]));
        LLVMFuzzerTestOneInput(inputs.back().data(), inputs.back().size());
    }
    long n = long(inputs.size());
    std::mt19937 rng(atoi(argv[2]));
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(atoi(argv[1]));
    for (; std::chrono::steady_clock::now() < end; ++n) {
        const input next = changed(inputs, rng);
        LLVMFuzzerTestOneInput(next.data(), next.size());
    }
    printf("%ld %ld %ld %ld\n", n, hylra_fuzz_accepted[0], hylra_fuzz_accepted[1], hylra_fuzz_accepted[2]);
}
