// Every kernel as a function of a shared library: `g++ -shared -fPIC -std=c++17 -O1 -ffp-contract=off emulated.cpp`.
#define KV_EMULATED
#include "encodings.cu"
#include "moves.cu"
#include "paged.cu"
#include "planes.cu"

#define RUN(name, parameters, ...)                                                        \
    extern "C" void run_##name(unsigned grid, unsigned block, const Pages *pages, parameters) { \
        emulated::launch(grid, block, [=] { name(*pages, __VA_ARGS__); });                 \
    }
#define WITH(...) __VA_ARGS__

RUN(gather_blocks, WITH(char *blocks, int64_t stride, int64_t count), blocks, stride, count)
RUN(scatter_blocks, WITH(char *blocks, int64_t stride, int64_t count), blocks, stride, count)
RUN(split_planes, WITH(char *planes, int64_t stride, int64_t count), planes, stride, count)
RUN(join_planes, WITH(char *planes, int64_t stride, int64_t count), planes, stride, count)
RUN(encode_int8, WITH(char *encoded, int64_t stride, int64_t count, int row, int half, uint32_t *unfit), encoded, stride,
    count, row, half, unfit)
RUN(decode_int8, WITH(const char *encoded, int64_t stride, int64_t count, int row, int half), encoded, stride, count, row,
    half)
RUN(encode_fp8, WITH(char *encoded, int64_t stride, int64_t count, int row, int half, uint32_t *unfit), encoded, stride,
    count, row, half, unfit)
RUN(decode_fp8, WITH(const char *encoded, int64_t stride, int64_t count, int row, int half), encoded, stride, count, row,
    half)
RUN(encode_int4, WITH(char *encoded, int64_t stride, int64_t count, int half, uint32_t *unfit), encoded, stride, count,
    half, unfit)
RUN(decode_int4, WITH(const char *encoded, int64_t stride, int64_t count, int half), encoded, stride, count, half)
RUN(make_codebooks, WITH(char *encoded, int64_t stride, int64_t count), encoded, stride, count)
RUN(encode_fixed, WITH(char *encoded, int64_t stride, int64_t count, uint32_t *unfit), encoded, stride, count, unfit)
RUN(decode_fixed, WITH(const char *encoded, int64_t stride, int64_t count, uint32_t *bad), encoded, stride, count, bad)

extern "C" void run_move_pieces(unsigned grid, unsigned block, const uint64_t *targets, const uint64_t *sources,
                                const int64_t *lengths, int64_t longest, int64_t count) {
    emulated::launch(grid, block, [=] { move_pieces(targets, sources, lengths, longest, count); });
}

// How many accesses since the last time began where none of 16 bytes may.
extern "C" unsigned take_misaligned() {
    const unsigned found = emulated::misaligned;
    emulated::misaligned = 0;
    return found;
}
