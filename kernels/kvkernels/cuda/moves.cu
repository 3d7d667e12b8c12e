// Many moves in one launch, 16 bytes an access: a table of addresses where a copy engine would want a call for each.
//
// As paged.cu, a group of threads takes a span of one move at a time. All moves are walked as if as long as the longest:
// whoever asks has cut those that are far from it (`engines.cut`). Addresses may be of host memory that is registered.
#include "pages.cuh"

static constexpr int64_t MOVE_SPAN_BYTES = 4096;

extern "C" __global__ void move_pieces(const uint64_t *targets, const uint64_t *sources, const int64_t *lengths,
                                       int64_t longest, int64_t count) {
    const int64_t spans_of_move = (longest + MOVE_SPAN_BYTES - 1) / MOVE_SPAN_BYTES;
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
    const int lane = threadIdx.x % 32;
    for (int64_t span = warp; span < spans_of_move * count; span += warps) {
        const int64_t move = span / spans_of_move;
        const int64_t begin = (span - move * spans_of_move) * MOVE_SPAN_BYTES;
        const int64_t left = lengths[move] - begin;
        const int accesses = left <= 0 ? 0 : static_cast<int>((left < MOVE_SPAN_BYTES ? left : MOVE_SPAN_BYTES) / 16);
        uint4 *target = reinterpret_cast<uint4 *>(targets[move] + begin);
        const uint4 *source = reinterpret_cast<const uint4 *>(sources[move] + begin);
#pragma unroll 4
        for (int i = lane; i < accesses; i += 32) target[i] = source[i];
    }
}
