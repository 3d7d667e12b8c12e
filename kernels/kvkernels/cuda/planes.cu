// Byte planes: the high bytes of a block's 16-bit values together, and the low ones, 16 bytes an access.
//
//   planes of a block:   high bytes | up to a multiple of 16: left as it is | low bytes, and the last one of an odd length
//
// As paged.cu, a group of threads takes a span of one piece at a time. Blocks of one piece may be of any length, also none;
// pieces of several are multiples of 16, as everywhere. kvkernels/planes.py has the reference.
#include "pages.cuh"

static constexpr int PLANE_SPAN_BYTES = 4096;  // of a block

// The bytes of four values: their high ones are `1, 3, 5, 7` of these eight, their low ones `0, 2, 4, 6`.
__device__ inline uint32_t high_of(uint32_t first, uint32_t second) { return __byte_perm(first, second, 0x7531); }
__device__ inline uint32_t low_of(uint32_t first, uint32_t second) { return __byte_perm(first, second, 0x6420); }

// And back: the first two values of four, and the last two.
__device__ inline uint32_t first_of(uint32_t high, uint32_t low) { return __byte_perm(low, high, 0x5140); }
__device__ inline uint32_t second_of(uint32_t high, uint32_t low) { return __byte_perm(low, high, 0x7362); }

__device__ inline void split_access(const uint4 *page, uint4 *high, uint4 *low) {
    const uint4 a = page[0], b = page[1];
    *high = {high_of(a.x, a.y), high_of(a.z, a.w), high_of(b.x, b.y), high_of(b.z, b.w)};
    *low = {low_of(a.x, a.y), low_of(a.z, a.w), low_of(b.x, b.y), low_of(b.z, b.w)};
}

__device__ inline void join_access(uint4 *page, const uint4 *high, const uint4 *low) {
    const uint4 h = *high, l = *low;
    page[0] = {first_of(h.x, l.x), second_of(h.x, l.x), first_of(h.y, l.y), second_of(h.y, l.y)};
    page[1] = {first_of(h.z, l.z), second_of(h.z, l.z), first_of(h.w, l.w), second_of(h.w, l.w)};
}

template <bool SPLIT>
__device__ inline void move_planes(const Pages &pages, char *planes, int64_t stride, int64_t count) {
    const int64_t low_at = (pages.piece_bytes * pages.pieces / 2 + 15) / 16 * 16;
    const int64_t spans_of_piece = (pages.piece_bytes + PLANE_SPAN_BYTES - 1) / PLANE_SPAN_BYTES;
    const int64_t spans_of_block = spans_of_piece * pages.pieces;
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
    const int lane = threadIdx.x % 32;
    for (int64_t span = warp; span < spans_of_block * count; span += warps) {
        const int64_t block = span / spans_of_block;
        const int64_t within = span - block * spans_of_block;
        const int64_t piece = within / spans_of_piece;
        const int64_t begin = (within - piece * spans_of_piece) * PLANE_SPAN_BYTES;
        const int64_t left = pages.piece_bytes - begin, at = piece * pages.piece_bytes + begin;
        const int size = static_cast<int>(left < PLANE_SPAN_BYTES ? left : PLANE_SPAN_BYTES);
        // Behind an odd multiple of 16, a piece begins in the middle of an access of the planes.
        const int before = at / 2 % 16 ? 16 : 0, accesses = (size - before) / 32, single = size - accesses * 32;
        char *page = byte_of(pages, block, at), *high = planes + block * stride + at / 2, *low = high + low_at;
        uint4 *page_access = reinterpret_cast<uint4 *>(page + before);
        uint4 *high_access = reinterpret_cast<uint4 *>(high + before / 2);
        uint4 *low_access = reinterpret_cast<uint4 *>(low + before / 2);
#pragma unroll 4
        for (int i = lane; i < accesses; i += 32) {
            if (SPLIT) {
                split_access(page_access + 2 * i, high_access + i, low_access + i);
            } else {
                join_access(page_access + 2 * i, high_access + i, low_access + i);
            }
        }
        for (int i = lane; i < single; i += 32) {
            const int byte = i < before ? i : i + accesses * 32;
            char *own = (byte % 2 ? high : low) + byte / 2;
            if (SPLIT) {
                *own = page[byte];
            } else {
                page[byte] = *own;
            }
        }
    }
}

// Pages into planes of blocks, `stride` bytes apart.
extern "C" __global__ void split_planes(Pages pages, char *planes, int64_t stride, int64_t count) {
    move_planes<true>(pages, planes, stride, count);
}

// Planes of blocks into pages.
extern "C" __global__ void join_planes(Pages pages, char *planes, int64_t stride, int64_t count) {
    move_planes<false>(pages, planes, stride, count);
}
