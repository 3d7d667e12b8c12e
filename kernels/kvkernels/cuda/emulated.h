// Runs the kernels of this folder on a processor, one thread block after another, to compare their bytes with the
// references where there is no GPU. It is not fast, and it is no substitute for a GPU: memory is as ordered as nowhere else.
//
// Every thread of a block is a coroutine. A barrier or an exchange within a warp lets the others run until all are there.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __restrict__
#define KV_SHARED static  // blocks run one at a time, so that one copy serves all

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

static unsigned misaligned;  // accesses that a GPU would lose its context for

inline bool is_aligned(const void *where) {
    asm volatile("" : "+r"(where));  // else the compiler believes what it is told by the type
    if (reinterpret_cast<uintptr_t>(where) % 16 == 0) return true;
    misaligned++;
    return false;
}

}  // namespace emulated

// 16 bytes an access, which begin at a multiple of 16; another access is counted and does nothing.
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
    uint4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) : x(a), y(b), z(c), w(d) {}
    uint4(const uint4 &source) { *this = source; }
    uint4 &operator=(const uint4 &source) {
        if (emulated::is_aligned(this) && emulated::is_aligned(&source)) {
            x = source.x, y = source.y, z = source.z, w = source.w;
        }
        return *this;
    }
};

namespace emulated {

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    unsigned barriers = 0;  // that it has come to
    bool over = false;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::function<void()> body;
static uint32_t exchanged[1024];

inline void run_one() {
    body();
    threads[threadIdx.x].over = true;
    swapcontext(&threads[threadIdx.x].context, &scheduler);
}

// Let the others run. Lanes of a warp meet in step, so after one turn all of them are here.
inline void meet() {
    swapcontext(&threads[threadIdx.x].context, &scheduler);
}

// Until every thread of the block is here. Warps may have met each other more or less often before.
inline void barrier() {
    const unsigned mine = ++threads[threadIdx.x].barriers;
    for (bool alone = true; alone;) {
        meet();
        alone = false;
        for (const Thread &other : threads) alone = alone || (!other.over && other.barriers < mine);
    }
}

inline void launch(unsigned grid, unsigned block, std::function<void()> kernel) {
    body = kernel;
    gridDim.x = grid, blockDim.x = block;
    for (unsigned number = 0; number < grid; number++) {
        blockIdx.x = number;
        threads = std::vector<Thread>(block);
        for (Thread &thread : threads) {
            thread.stack.resize(64 << 10);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            makecontext(&thread.context, run_one, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (unsigned i = 0; i < block; i++) {
                if (threads[i].over) continue;
                threadIdx.x = i;
                swapcontext(&scheduler, &threads[i].context);
                running = running || !threads[i].over;
            }
        }
    }
}

// What every lane of the warp gives, seen by all: two meetings, since the next exchange must not overwrite this one.
template <typename Look>
inline uint32_t exchange(uint32_t mine, Look look) {
    exchanged[threadIdx.x] = mine;
    meet();
    const uint32_t seen = look(exchanged + threadIdx.x / 32 * 32, threadIdx.x % 32);
    meet();
    return seen;
}

}  // namespace emulated

inline void __syncthreads() { emulated::barrier(); }
inline void __syncwarp() { emulated::meet(); }
inline uint32_t __shfl_xor_sync(unsigned, uint32_t mine, int mask) {
    return emulated::exchange(mine, [=](const uint32_t *lanes, unsigned lane) { return lanes[lane ^ mask]; });
}
inline uint32_t __shfl_up_sync(unsigned, uint32_t mine, unsigned by) {
    return emulated::exchange(mine, [=](const uint32_t *lanes, unsigned lane) { return lanes[lane < by ? lane : lane - by]; });
}
inline uint32_t __shfl_down_sync(unsigned, uint32_t mine, unsigned by) {
    return emulated::exchange(mine, [=](const uint32_t *lanes, unsigned lane) { return lanes[lane + by > 31 ? lane : lane + by]; });
}
inline uint32_t __shfl_sync(unsigned, uint32_t mine, int from) {
    return emulated::exchange(mine, [=](const uint32_t *lanes, unsigned) { return lanes[from]; });
}
inline uint32_t atomicAdd(uint32_t *where, uint32_t what) {
    const uint32_t before = *where;
    *where += what;
    return before;
}
inline uint32_t atomicOr(uint32_t *where, uint32_t what) {
    const uint32_t before = *where;
    *where |= what;
    return before;
}
inline uint32_t atomicExch(uint32_t *where, uint32_t what) {
    const uint32_t before = *where;
    *where = what;
    return before;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {  // without its way to repeat a sign
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    uint32_t chosen = 0;
    for (int i = 0; i < 4; i++) chosen |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return chosen;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return static_cast<int>(rintf(value)); }
