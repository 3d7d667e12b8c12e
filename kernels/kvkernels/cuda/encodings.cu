// The encodings of kvkernels/encodings.py, fused with gather and scatter: only encoded bytes cross the link.
//
// The same bytes as there, so every float operation is written as the one rounding that it is: no fused multiply-add.
// `half`: values are IEEE halves, not bfloat16. `unfit` and `bad` hold a word a block, set where the block cannot be.
#include "pages.cuh"

static constexpr int GROUP = 64;
static constexpr int TILE = 4096;
static constexpr int ESCAPES = 64;
static constexpr uint32_t ESCAPE = 15;
static constexpr int BOOK_BYTES = 16;
static constexpr int64_t SAMPLES = 8192;
static constexpr int TAIL_BYTES = 4 + 3 * ESCAPES;
static constexpr uint32_t ALL = 0xffffffffu;

struct Walk {  // which warp of the whole grid this is
    int64_t first, step;
    int lane;
};

__device__ inline Walk warps_of_grid() {
    return {(static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32,
            static_cast<int64_t>(gridDim.x) * blockDim.x / 32, static_cast<int>(threadIdx.x % 32)};
}

// -- 16 bits and floats ---------------------------------------------------------------------------------------------

__device__ inline float widen(uint32_t bits, bool half) {
    if (!half) return __uint_as_float(bits << 16);
    const float size = __fmul_rn(__uint_as_float((bits & 0x7fff) << 13), 0x1p112f);
    return __uint_as_float(__float_as_uint(size) | (bits & 0x8000) << 16);
}

__device__ inline uint32_t narrow_half(float value) {
    const uint32_t wide = __float_as_uint(value);
    float size = __uint_as_float(wide & 0x7fffffff);
    size = size < 65504.0f ? size : 65504.0f;
    const uint32_t bits = __float_as_uint(size);
    const uint32_t normal = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
    const bool is_small = size < 0x1p-14f;
    const uint32_t small = is_small ? static_cast<uint32_t>(__float2int_rn(__fmul_rn(size, 0x1p24f))) : 0;
    return (is_small ? small : normal) | (wide >> 16 & 0x8000);
}

__device__ inline uint32_t narrow(float value, bool half) {
    if (half) return narrow_half(value);
    const uint32_t wide = __float_as_uint(value);
    return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}

__device__ inline uint32_t nearest_e4m3(float value) {
    const uint32_t wide = __float_as_uint(value), size = wide & 0x7fffffff;
    uint32_t code;
    if (size < 0x3c800000) {  // below 2**-6
        code = static_cast<uint32_t>(__float2int_rn(__fmul_rn(__uint_as_float(size), 512.0f)));
    } else {
        code = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - 960;
    }
    return (code < 0x7e ? code : 0x7e) | (wide >> 24 & 0x80);
}

__device__ inline float value_of_e4m3(uint32_t code) {
    const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent == 0 ? __fmul_rn(static_cast<float>(mantissa), 0x1p-9f)
                                     : __uint_as_float((exponent + 120) << 23 | mantissa << 20);
    return code & 0x80 ? -size : size;
}

__device__ inline uint32_t largest_of_warp(uint32_t mine) {
    for (int mask = 16; mask; mask >>= 1) {
        const uint32_t other = __shfl_xor_sync(ALL, mine, mask);
        mine = other > mine ? other : mine;
    }
    return mine;
}

// -- int8 and fp8: a warp a row, two values a lane at a time -----------------------------------------------------------

template <bool FP8>
__device__ inline void encode_rows(const Pages &pages, char *encoded, int64_t encoded_stride, int64_t count, int row,
                                   bool half, uint32_t *unfit) {
    const int64_t values = pages.piece_bytes / 2 * pages.pieces, rows = values / row;
    const Walk walk = warps_of_grid();
    for (int64_t at = walk.first; at < rows * count; at += walk.step) {
        const int64_t block = at / rows, r = at - block * rows;
        const uint32_t *source = reinterpret_cast<const uint32_t *>(byte_of(pages, block, r * row * 2));
        char *own = encoded + block * encoded_stride;
        uint32_t largest = 0;
        for (int i = walk.lane; i < row / 2; i += 32) {
            const uint32_t two = source[i], low = two & 0x7fff, high = two >> 16 & 0x7fff;
            const uint32_t most = low > high ? low : high;
            largest = most > largest ? most : largest;
        }
        largest = largest_of_warp(largest);
        if (largest >= (half ? 0x7c00u : 0x7f80u)) {
            if (walk.lane == 0) atomicExch(unfit + block, 1);
            continue;
        }
        float scale = __fdiv_rn(widen(largest, half), FP8 ? 448.0f : 127.0f);
        scale = scale < 0x1p-126f ? 0.0f : scale;
        const float inverse = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
        if (walk.lane == 0) reinterpret_cast<float *>(own + values)[r] = scale;
        uint16_t *codes = reinterpret_cast<uint16_t *>(own + r * row);
        for (int i = walk.lane; i < row / 2; i += 32) {
            const uint32_t two = source[i];
            const float low = __fmul_rn(widen(two & 0xffff, half), inverse);
            const float high = __fmul_rn(widen(two >> 16, half), inverse);
            const uint32_t first = FP8 ? nearest_e4m3(low) : static_cast<uint32_t>(__float2int_rn(low)) & 0xff;
            const uint32_t second = FP8 ? nearest_e4m3(high) : static_cast<uint32_t>(__float2int_rn(high)) & 0xff;
            codes[i] = static_cast<uint16_t>(first | second << 8);
        }
    }
}

template <bool FP8>
__device__ inline void decode_rows(const Pages &pages, const char *encoded, int64_t encoded_stride, int64_t count, int row,
                                   bool half) {
    const int64_t values = pages.piece_bytes / 2 * pages.pieces, rows = values / row;
    const Walk walk = warps_of_grid();
    for (int64_t at = walk.first; at < rows * count; at += walk.step) {
        const int64_t block = at / rows, r = at - block * rows;
        const char *own = encoded + block * encoded_stride;
        const float scale = reinterpret_cast<const float *>(own + values)[r];
        const uint16_t *codes = reinterpret_cast<const uint16_t *>(own + r * row);
        uint32_t *target = reinterpret_cast<uint32_t *>(byte_of(pages, block, r * row * 2));
        for (int i = walk.lane; i < row / 2; i += 32) {
            const uint32_t two = codes[i], low = two & 0xff, high = two >> 8;
            const float first = FP8 ? value_of_e4m3(low) : static_cast<float>(static_cast<int8_t>(low));
            const float second = FP8 ? value_of_e4m3(high) : static_cast<float>(static_cast<int8_t>(high));
            target[i] = narrow(__fmul_rn(first, scale), half) | narrow(__fmul_rn(second, scale), half) << 16;
        }
    }
}

extern "C" __global__ void encode_int8(Pages pages, char *encoded, int64_t stride, int64_t count, int row, int half,
                                       uint32_t *unfit) {
    encode_rows<false>(pages, encoded, stride, count, row, half != 0, unfit);
}

extern "C" __global__ void decode_int8(Pages pages, const char *encoded, int64_t stride, int64_t count, int row, int half) {
    decode_rows<false>(pages, encoded, stride, count, row, half != 0);
}

extern "C" __global__ void encode_fp8(Pages pages, char *encoded, int64_t stride, int64_t count, int row, int half,
                                      uint32_t *unfit) {
    encode_rows<true>(pages, encoded, stride, count, row, half != 0, unfit);
}

extern "C" __global__ void decode_fp8(Pages pages, const char *encoded, int64_t stride, int64_t count, int row, int half) {
    decode_rows<true>(pages, encoded, stride, count, row, half != 0);
}

// -- int4: a warp a group, two neighbours a lane --------------------------------------------------------------------

extern "C" __global__ void encode_int4(Pages pages, char *encoded, int64_t stride, int64_t count, int half,
                                       uint32_t *unfit) {
    const int64_t values = pages.piece_bytes / 2 * pages.pieces, groups = values / GROUP;
    const Walk walk = warps_of_grid();
    for (int64_t at = walk.first; at < groups * count; at += walk.step) {
        const int64_t block = at / groups, g = at - block * groups;
        const uint32_t two = reinterpret_cast<const uint32_t *>(byte_of(pages, block, g * GROUP * 2))[walk.lane];
        const float first = widen(two & 0xffff, half != 0), second = widen(two >> 16, half != 0);
        float low = first < second ? first : second, high = first < second ? second : first;
        const uint32_t sizes = (two & 0x7fff) > (two >> 16 & 0x7fff) ? two & 0x7fff : two >> 16 & 0x7fff;
        const uint32_t largest = largest_of_warp(sizes);
        for (int mask = 16; mask; mask >>= 1) {
            const float lower = __uint_as_float(__shfl_xor_sync(ALL, __float_as_uint(low), mask));
            const float higher = __uint_as_float(__shfl_xor_sync(ALL, __float_as_uint(high), mask));
            low = lower < low ? lower : low;
            high = higher > high ? higher : high;
        }
        low = __fadd_rn(low, 0.0f);  // minus zero is zero
        const bool finite = largest < (half ? 0x7c00u : 0x7f80u);
        if (!finite || widen(largest, half != 0) > 65504.0f || __fadd_rn(high, -low) > 65504.0f) {
            if (walk.lane == 0) atomicExch(unfit + block, 1);
            continue;
        }
        const uint32_t low_bits = narrow_half(low);
        const float start = widen(low_bits, true), range = __fadd_rn(high, -start);
        const uint32_t step_bits = narrow_half(__fdiv_rn(range > 0.0f ? range : 0.0f, 15.0f));
        const float step = widen(step_bits, true), inverse = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
        uint32_t codes = 0;
        for (int i = 0; i < 2; i++) {
            float scaled = __fmul_rn(__fadd_rn(i ? second : first, -start), inverse);
            scaled = scaled < 0.0f ? 0.0f : (scaled > 15.0f ? 15.0f : scaled);
            codes |= static_cast<uint32_t>(__float2int_rn(scaled)) << 8 * i;
        }
        const uint32_t above = __shfl_down_sync(ALL, codes, 16);
        char *own = encoded + block * stride;
        if (walk.lane < 16) {
            reinterpret_cast<uint16_t *>(own + g * (GROUP / 2))[walk.lane] = static_cast<uint16_t>(codes | above << 4);
        }
        if (walk.lane == 0) reinterpret_cast<uint32_t *>(own + values / 2)[g] = step_bits | low_bits << 16;
    }
}

extern "C" __global__ void decode_int4(Pages pages, const char *encoded, int64_t stride, int64_t count, int half) {
    const int64_t values = pages.piece_bytes / 2 * pages.pieces, groups = values / GROUP;
    const Walk walk = warps_of_grid();
    for (int64_t at = walk.first; at < groups * count; at += walk.step) {
        const int64_t block = at / groups, g = at - block * groups;
        const char *own = encoded + block * stride;
        const uint32_t head = reinterpret_cast<const uint32_t *>(own + values / 2)[g];
        const float step = widen(head & 0xffff, true), low = widen(head >> 16, true);
        const uint32_t packed = reinterpret_cast<const uint16_t *>(own + g * (GROUP / 2))[walk.lane % 16];
        const uint32_t codes = walk.lane < 16 ? packed : packed >> 4;
        uint32_t two = 0;
        for (int i = 0; i < 2; i++) {
            const float code = static_cast<float>(codes >> 8 * i & 15);
            two |= narrow(__fadd_rn(low, __fmul_rn(code, step)), half != 0) << 16 * i;
        }
        reinterpret_cast<uint32_t *>(byte_of(pages, block, g * GROUP * 2))[walk.lane] = two;
    }
}

// -- bf16-fixed -----------------------------------------------------------------------------------------------------

// A thread block of 256 a block: thread e counts for exponent e.
extern "C" __global__ void make_codebooks(Pages pages, char *encoded, int64_t stride, int64_t count) {
    KV_SHARED uint32_t counts[256];
    const int64_t values = pages.piece_bytes / 2 * pages.pieces;
    const int64_t step = values / SAMPLES | 1;  // odd, or it would meet the same channel again and again
    for (int64_t block = blockIdx.x; block < count; block += gridDim.x) {
        const uint32_t self = threadIdx.x;
        counts[self] = 0;
        __syncthreads();
        for (int64_t i = self * step; i < values; i += 256 * step) {
            const uint32_t bits = *reinterpret_cast<const uint16_t *>(byte_of(pages, block, i * 2));
            atomicAdd(counts + (bits >> 7 & 0xff), 1);
        }
        __syncthreads();
        uint32_t rank = 0;
        for (uint32_t other = 0; other < 256; other++) {
            rank += counts[other] > counts[self] || (counts[other] == counts[self] && other < self);
        }
        if (rank < ESCAPE) encoded[block * stride + rank] = static_cast<char>(self);
        if (self == 0) encoded[block * stride + ESCAPE] = 0;
        __syncthreads();
    }
}

__device__ inline uint64_t four_of(const Pages &pages, int64_t block, int64_t value) {
    return *reinterpret_cast<const uint64_t *>(byte_of(pages, block, value * 2));
}

// A thread block of 256 a tile, after `make_codebooks`: four values of each half a thread at a time.
extern "C" __global__ void encode_fixed(Pages pages, char *encoded, int64_t stride, int64_t count, uint32_t *unfit) {
    KV_SHARED uint8_t code_of[256];
    KV_SHARED uint32_t escaped[TILE / 32];  // a bit a value
    KV_SHARED uint32_t before[TILE / 32];   // escapes in the words before
    const int64_t values = pages.piece_bytes / 2 * pages.pieces, tiles = (values + TILE - 1) / TILE;
    const int self = static_cast<int>(threadIdx.x);
    for (int64_t at = blockIdx.x; at < tiles * count; at += gridDim.x) {
        const int64_t block = at / tiles, begin = (at - block * tiles) * TILE;
        const int size = static_cast<int>(values - begin < TILE ? values - begin : TILE), middle = size / 2;
        char *own = encoded + block * stride;
        code_of[self] = ESCAPE;
        if (self < TILE / 32) escaped[self] = 0;
        __syncthreads();
        if (self < static_cast<int>(ESCAPE)) code_of[static_cast<uint8_t>(own[self])] = static_cast<uint8_t>(self);
        __syncthreads();
        char *plain = own + BOOK_BYTES + begin, *nibbles = own + BOOK_BYTES + values + begin / 2;
        for (int i = self * 4; i < middle; i += 1024) {
            uint32_t packed = 0;
            for (int side = 0; side < 2; side++) {
                const int place = i + side * middle;
                const uint64_t four = four_of(pages, block, begin + place);
                uint32_t signs = 0;
                for (int k = 0; k < 4; k++) {
                    const uint32_t bits = static_cast<uint32_t>(four >> 16 * k & 0xffff), code = code_of[bits >> 7 & 0xff];
                    signs |= ((bits >> 8 & 0x80) | (bits & 0x7f)) << 8 * k;
                    packed |= code << (8 * k + 4 * side);
                    if (code == ESCAPE) atomicOr(escaped + (place + k) / 32, 1u << (place + k) % 32);
                }
                *reinterpret_cast<uint32_t *>(plain + place) = signs;
            }
            *reinterpret_cast<uint32_t *>(nibbles + i) = packed;
        }
        uint32_t *tail = reinterpret_cast<uint32_t *>(own + BOOK_BYTES + values + values / 2 + begin / TILE * TAIL_BYTES);
        if (self < TAIL_BYTES / 4) tail[self] = 0;
        __syncthreads();
        if (self == 0) {
            uint32_t found = 0;
            for (int word = 0; word < TILE / 32; word++) {
                before[word] = found;
                found += static_cast<uint32_t>(__popc(escaped[word]));
            }
            if (found > ESCAPES) {
                atomicExch(unfit + block, 1);
            } else {
                tail[0] = found;
            }
        }
        __syncthreads();
        if (self < TILE / 32) {
            uint32_t number = before[self];
            for (uint32_t left = escaped[self]; left && number < ESCAPES; left &= left - 1, number++) {
                const int place = self * 32 + __ffs(left) - 1;
                const uint32_t bits = *reinterpret_cast<const uint16_t *>(byte_of(pages, block, (begin + place) * 2));
                reinterpret_cast<uint16_t *>(tail + 1)[number] = static_cast<uint16_t>(place);
                reinterpret_cast<uint8_t *>(tail + 1)[2 * ESCAPES + number] = static_cast<uint8_t>(bits >> 7);
            }
        }
        __syncthreads();
    }
}

// A thread block of 256 a tile.
extern "C" __global__ void decode_fixed(Pages pages, const char *encoded, int64_t stride, int64_t count, uint32_t *bad) {
    KV_SHARED uint32_t book[BOOK_BYTES];
    const int64_t values = pages.piece_bytes / 2 * pages.pieces, tiles = (values + TILE - 1) / TILE;
    const int self = static_cast<int>(threadIdx.x);
    for (int64_t at = blockIdx.x; at < tiles * count; at += gridDim.x) {
        const int64_t block = at / tiles, begin = (at - block * tiles) * TILE;
        const int size = static_cast<int>(values - begin < TILE ? values - begin : TILE), middle = size / 2;
        const char *own = encoded + block * stride;
        if (self < BOOK_BYTES) book[self] = static_cast<uint32_t>(static_cast<uint8_t>(own[self])) << 7;
        __syncthreads();
        const char *plain = own + BOOK_BYTES + begin, *nibbles = own + BOOK_BYTES + values + begin / 2;
        for (int i = self * 4; i < middle; i += 1024) {
            const uint32_t packed = *reinterpret_cast<const uint32_t *>(nibbles + i);
            for (int side = 0; side < 2; side++) {
                const int place = i + side * middle;
                const uint32_t signs = *reinterpret_cast<const uint32_t *>(plain + place);
                uint64_t four = 0;
                for (int k = 0; k < 4; k++) {
                    const uint32_t sign = signs >> 8 * k;
                    const uint32_t bits = (sign & 0x80) << 8 | book[packed >> (8 * k + 4 * side) & 15] | (sign & 0x7f);
                    four |= static_cast<uint64_t>(bits) << 16 * k;
                }
                *reinterpret_cast<uint64_t *>(byte_of(pages, block, (begin + place) * 2)) = four;
            }
        }
        __syncthreads();
        const uint32_t *tail =
            reinterpret_cast<const uint32_t *>(own + BOOK_BYTES + values + values / 2 + begin / TILE * TAIL_BYTES);
        const uint32_t found = tail[0];
        if (found > ESCAPES) {
            if (self == 0) atomicExch(bad + block, 1);
        } else if (self < static_cast<int>(found)) {
            const int place = reinterpret_cast<const uint16_t *>(tail + 1)[self];
            const uint32_t exponent = reinterpret_cast<const uint8_t *>(tail + 1)[2 * ESCAPES + self];
            if (place >= size) {
                atomicExch(bad + block, 1);
            } else {
                uint16_t *value = reinterpret_cast<uint16_t *>(byte_of(pages, block, (begin + place) * 2));
                *value = static_cast<uint16_t>((*value & 0x807f) | exponent << 7);
            }
        }
        __syncthreads();
    }
}
