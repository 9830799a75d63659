// Does this compiler's AMX code run right on this CPU? One int8 tile product, configured the way llama.cpp does it.
// Exit code: 0 right, 77 no AMX under -march=native, 78 not granted by the kernel, 1 wrong; a crash is an answer too.

#if !defined(__AMX_TILE__) || !defined(__AMX_INT8__) || !defined(__linux__)
int main() { return 77; }
#else

#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

struct tile_config {
    uint8_t  palette_id = 0;
    uint8_t  start_row = 0;
    uint8_t  reserved[14] = {0};
    uint16_t colsb[16] = {0};
    uint8_t  rows[16] = {0};
};

// The words of ggml_tile_config_init in llama.cpp.
static inline void configure_once() {
    static thread_local bool done = false;
    if (done) {
        return;
    }
    alignas(64) tile_config config = {};
    config.palette_id = 1;
    config.start_row = 0;
    config.rows[0] = 8;  config.colsb[0] = 64;
    config.rows[1] = 8;  config.colsb[1] = 64;
    config.rows[2] = 16; config.colsb[2] = 32;
    config.rows[3] = 16; config.colsb[3] = 32;
    config.rows[4] = 16; config.colsb[4] = 64;
    config.rows[5] = 16; config.colsb[5] = 64;
    config.rows[6] = 16; config.colsb[6] = 64;
    config.rows[7] = 16; config.colsb[7] = 64;
    _tile_loadconfig(&config);
    done = true;
}

// c += a b, n times. GCC 12.2 takes ldtilecfg for a read of 8 bytes; when another local shares the stack slot of the
// configuration, as `copy` does here and the tiles do in llama.cpp, it drops the stores behind those 8 bytes.
__attribute__((noinline)) static void multiply(const int8_t * a, const int8_t * b, int32_t * c, int n) {
    configure_once();
    alignas(64) int8_t copy[512];
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < 512; j++) {
            copy[j] = a[j];
        }
        _tile_loadd(4, c, 64);
        _tile_loadd(0, b, 64);
        _tile_loadd(2, copy, 32);
        _tile_dpbssd(4, 2, 0);
        _tile_stored(4, c, 64);
    }
}

int main() {
    const long request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) {
        return 78;
    }
    static int8_t a[16][32], b[8][64]; // a: [rows, depth], b: [depth / 4, columns * 4]
    for (int i = 0; i < 512; i++) {
        (&a[0][0])[i] = int8_t(i % 13 - 6);
        (&b[0][0])[i] = int8_t(i % 11 - 5);
    }
    static int32_t c[16][16];
    multiply(&a[0][0], &b[0][0], &c[0][0], 2);
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 16; column++) {
            int32_t sum = 0;
            for (int i = 0; i < 32; i++) {
                sum += 2 * a[row][i] * b[i / 4][4 * column + i % 4];
            }
            if (c[row][column] != sum) {
                return 1;
            }
        }
    }
    return 0;
}
#endif
