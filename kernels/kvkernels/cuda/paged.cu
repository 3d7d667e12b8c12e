// Blocks between an engine's pages and contiguous memory, 16 bytes an access.
//
// A group of threads takes a span of one piece at a time, so that the divisions that find it are made once in 4 KiB; the
// spans of all blocks are dealt round, so any grid is right and a small one leaves the multiprocessors to the engine.
#include "pages.cuh"

static constexpr int SPAN_BYTES = 4096;

template <bool GATHER>
__device__ inline void copy_spans(const Pages &pages, char *blocks, int64_t block_stride, int64_t count) {
    const int64_t spans_of_piece = (pages.piece_bytes + SPAN_BYTES - 1) / SPAN_BYTES;
    const int64_t spans_of_block = spans_of_piece * pages.pieces;
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
    const int lane = threadIdx.x % 32;
    for (int64_t span = warp; span < spans_of_block * count; span += warps) {
        const int64_t block = span / spans_of_block;
        const int64_t within = span - block * spans_of_block;
        const int64_t piece = within / spans_of_piece;
        const int64_t begin = (within - piece * spans_of_piece) * SPAN_BYTES;
        const int64_t left = pages.piece_bytes - begin;
        const int accesses = static_cast<int>((left < SPAN_BYTES ? left : SPAN_BYTES) / 16);
        uint4 *page = reinterpret_cast<uint4 *>(byte_of(pages, block, piece * pages.piece_bytes + begin));
        uint4 *own = reinterpret_cast<uint4 *>(blocks + block * block_stride + piece * pages.piece_bytes + begin);
#pragma unroll 4
        for (int i = lane; i < accesses; i += 32) {
            if (GATHER) {
                own[i] = page[i];
            } else {
                page[i] = own[i];
            }
        }
    }
}

// Pages into blocks, `block_stride` bytes apart.
extern "C" __global__ void gather_blocks(Pages pages, char *blocks, int64_t block_stride, int64_t count) {
    copy_spans<true>(pages, blocks, block_stride, count);
}

// Blocks into pages.
extern "C" __global__ void scatter_blocks(Pages pages, char *blocks, int64_t block_stride, int64_t count) {
    copy_spans<false>(pages, blocks, block_stride, count);
}
