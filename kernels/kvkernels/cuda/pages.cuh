// Where an engine's KV pages lie, and how a block of them is walked.
//
// A block is `pieces` runs of bytes, one after another in a contiguous block and scattered in the engine's memory:
//
//   address of piece p of page n = bases[p] + n * strides[p]
//
// One piece a layer where keys and values of a page lie together, two where they do not, one a layer and head where heads
// are outermost: all layouts in which a page of one piece is contiguous. All products are 64 bits wide.
#pragma once

#ifdef KV_EMULATED
#include "emulated.h"
#else
#ifdef __CUDACC_RTC__  // has no headers of the host
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef signed char int8_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif
#define KV_SHARED __shared__
#endif

struct Pages {
    const uint64_t *bases;   // addresses, one a piece
    const int64_t *strides;  // bytes from one page to the next, one a piece
    const int64_t *ids;      // the page of each block
    int64_t piece_bytes;     // a multiple of 16
    int pieces;
};

// The address of a byte of a block; the next `piece_bytes - byte % piece_bytes` follow it.
__device__ inline char *byte_of(const Pages &pages, int64_t block, int64_t byte) {
    const int64_t piece = byte / pages.piece_bytes;
    return reinterpret_cast<char *>(pages.bases[piece]) + pages.ids[block] * pages.strides[piece] +
           (byte - piece * pages.piece_bytes);
}
