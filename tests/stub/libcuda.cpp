// As much of the CUDA driver as kvkernels/device/driver.py calls, in host memory, at once: so that every line of cuda.py
// runs somewhere, with the driver's own calling convention. It proves nothing about a GPU. Its name: "stub".
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "emulated.cpp"

typedef int Result;
typedef unsigned long long Pointer;
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_FOUND = 500 };
static const size_t TOTAL = 1 << 30, GRAIN = 2 << 20;

struct Piece {
    size_t size;
    int fd;
    bool device;
};
static std::map<Pointer, Piece> pieces, registered;
static std::map<Pointer, size_t> handles_size;  // of virtual-memory handles: fd + 1
static std::mutex lock;
static thread_local std::vector<void *> contexts;
static int context_mark;

#define CALL extern "C" Result
#define NEEDS_CONTEXT \
    if (contexts.empty()) return 201;

// Captures, as cuda.h has them: while one goes on, calls that are unsafe in it fail, and break it.
enum Mode { GLOBAL, THREAD_LOCAL, RELAXED };
enum { UNSUPPORTED = 900, INVALIDATED = 901 };
static thread_local int mode = GLOBAL, own_capture = -1;
static int global_captures;
static bool broken;
static bool is_unsafe() {
    std::lock_guard<std::mutex> hold(lock);
    const bool own = mode != RELAXED && own_capture >= 0 && own_capture != RELAXED;
    if (own || (mode == GLOBAL && global_captures)) broken = true;
    return own || (mode == GLOBAL && global_captures);
}
#define UNSAFE \
    if (is_unsafe()) return UNSUPPORTED;
CALL cuThreadExchangeStreamCaptureMode(int *other) {
    if (*other < GLOBAL || *other > RELAXED) return INVALID;
    return std::swap(*other, mode), OK;
}
CALL cuStreamBeginCapture_v2(void *, int how) {
    std::lock_guard<std::mutex> hold(lock);
    if (how == GLOBAL) global_captures++;
    return own_capture = how, broken = false, OK;
}
CALL cuStreamEndCapture(void *, void **graph) {
    std::lock_guard<std::mutex> hold(lock);
    if (own_capture == GLOBAL) global_captures--;
    return own_capture = -1, *graph = nullptr, broken ? Result(INVALIDATED) : Result(OK);
}

static const std::pair<const Pointer, Piece> *find(std::map<Pointer, Piece> &of, Pointer at) {
    auto next = of.upper_bound(at);
    if (next == of.begin()) return nullptr;
    --next;
    return at < next->first + next->second.size ? &*next : nullptr;
}

static Result map(int fd, size_t size, Pointer *out) {
    void *at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return NO_MEMORY;
    *out = reinterpret_cast<Pointer>(at);
    pieces[*out] = {size, fd, true};
    return OK;
}

CALL cuInit(unsigned) { return OK; }
CALL cuGetErrorName(int, const char **name) { return *name = "STUB_ERROR", OK; }
CALL cuDriverGetVersion(int *version) { return *version = 12080, OK; }
CALL cuDeviceGet(int *device, int number) { return *device = number, OK; }
CALL cuDeviceGetCount(int *count) { return *count = 1, OK; }
CALL cuDeviceGetName(char *name, int size, int) { return snprintf(name, size, "stub"), OK; }
CALL cuDeviceGetAttribute(int *value, int which, int) {
    return *value = which == 16 ? 2 : which == 113 ? 0 : 1, OK;
}
CALL cuDeviceGetUuid_v2(char *uuid, int) { return memset(uuid, 7, 16), OK; }
CALL cuDeviceTotalMem_v2(size_t *size, int) { return *size = TOTAL, OK; }
CALL cuDevicePrimaryCtxRetain(void **context, int) { return *context = &context_mark, OK; }
CALL cuDevicePrimaryCtxRelease_v2(int) { return OK; }
CALL cuCtxPushCurrent_v2(void *context) { return contexts.push_back(context), context == &context_mark ? OK : 201; }
CALL cuCtxPopCurrent_v2(void **context) {
    NEEDS_CONTEXT
    *context = contexts.back();
    contexts.pop_back();
    return OK;
}
CALL cuMemGetInfo_v2(size_t *free, size_t *total) {
    NEEDS_CONTEXT
    std::lock_guard<std::mutex> hold(lock);
    *total = *free = TOTAL;
    for (auto &each : pieces) *free -= each.second.size;
    return OK;
}

static Result make(size_t size, int *fd) {
    if (!size) return INVALID;
    if (size > TOTAL) return NO_MEMORY;
    *fd = memfd_create("stub", MFD_CLOEXEC);
    return ftruncate(*fd, size) ? NO_MEMORY : OK;
}
CALL cuMemAlloc_v2(Pointer *out, size_t size) {
    NEEDS_CONTEXT
    UNSAFE
    std::lock_guard<std::mutex> hold(lock);
    int fd;
    const Result made = make(size, &fd);
    return made ? made : map(fd, size, out);
}
static Result drop(Pointer at) {
    std::lock_guard<std::mutex> hold(lock);
    auto found = pieces.find(at);
    if (found == pieces.end()) return INVALID;
    munmap(reinterpret_cast<void *>(at), found->second.size);
    close(found->second.fd);
    pieces.erase(found);
    return OK;
}
CALL cuMemFree_v2(Pointer at) { NEEDS_CONTEXT UNSAFE return drop(at); }
CALL cuMemGetAddressRange_v2(Pointer *base, size_t *size, Pointer at) {
    NEEDS_CONTEXT
    std::lock_guard<std::mutex> hold(lock);
    auto found = find(pieces, at);
    if (!found) return INVALID;
    return *base = found->first, *size = found->second.size, OK;
}
CALL cuPointerGetAttribute(void *value, int which, Pointer at) {
    NEEDS_CONTEXT
    std::lock_guard<std::mutex> hold(lock);
    auto found = find(pieces, at);
    if (!found) return INVALID;
    *static_cast<int *>(value) = which == 2 ? 2 : 0;
    return OK;
}

// -- other processes

CALL cuIpcGetMemHandle(char *handle, Pointer at) {
    NEEDS_CONTEXT
    std::lock_guard<std::mutex> hold(lock);
    auto found = pieces.find(at);
    if (found == pieces.end()) return INVALID;
    memset(handle, 0, 64);
    snprintf(handle, 64, "/proc/%d/fd/%d", getpid(), found->second.fd);
    return OK;
}
struct Ipc {
    char text[64];
};
CALL cuIpcOpenMemHandle_v2(Pointer *out, Ipc handle, unsigned flags) {
    NEEDS_CONTEXT
    if (flags != 1 || strncmp(handle.text, "/proc/", 6)) return INVALID;
    const int fd = open(handle.text, O_RDWR | O_CLOEXEC);
    struct stat state;
    if (fd < 0 || fstat(fd, &state)) return INVALID;
    std::lock_guard<std::mutex> hold(lock);
    return map(fd, state.st_size, out);
}
CALL cuIpcCloseMemHandle(Pointer at) { NEEDS_CONTEXT return drop(at); }

struct Wanted {
    int type, handle_types, location, id;
};
CALL cuMemGetAllocationGranularity(size_t *grain, const Wanted *wanted, int) {
    return *grain = GRAIN, wanted->type == 1 && wanted->handle_types == 1 && wanted->location == 1 ? OK : INVALID;
}
CALL cuMemCreate(Pointer *handle, size_t size, const Wanted *wanted, unsigned long long) {
    NEEDS_CONTEXT
    int fd;
    if (size % GRAIN || wanted->type != 1) return INVALID;
    const Result made = make(size, &fd);
    return *handle = fd + 1, made;
}
CALL cuMemRelease(Pointer handle) { return close(static_cast<int>(handle - 1)) ? INVALID : OK; }
CALL cuMemAddressReserve(Pointer *out, size_t size, size_t, Pointer, unsigned long long) {
    NEEDS_CONTEXT
    void *at = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *out = reinterpret_cast<Pointer>(at), at == MAP_FAILED ? NO_MEMORY : OK;
}
CALL cuMemAddressFree(Pointer at, size_t size) { return munmap(reinterpret_cast<void *>(at), size) ? INVALID : OK; }
CALL cuMemMap(Pointer at, size_t size, size_t offset, Pointer handle, unsigned long long) {
    NEEDS_CONTEXT
    std::lock_guard<std::mutex> hold(lock);
    struct stat state;
    const int fd = static_cast<int>(handle - 1);
    if (offset || fstat(fd, &state) || static_cast<size_t>(state.st_size) != size) return INVALID;
    if (mmap(reinterpret_cast<void *>(at), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
        return INVALID;
    pieces[at] = {size, fd, true};
    return OK;
}
CALL cuMemUnmap(Pointer at, size_t) {
    NEEDS_CONTEXT
    std::lock_guard<std::mutex> hold(lock);
    return pieces.erase(at) ? OK : INVALID;
}
struct Access {
    int location, id, flags;
};
CALL cuMemSetAccess(Pointer at, size_t, const Access *access, size_t count) {
    return pieces.count(at) && access->location == 1 && access->flags == 3 && count == 1 ? OK : INVALID;
}
CALL cuMemExportToShareableHandle(int *out, Pointer handle, int type, unsigned long long) {
    return *out = dup(static_cast<int>(handle - 1)), type == 1 && *out >= 0 ? OK : INVALID;
}
CALL cuMemImportFromShareableHandle(Pointer *out, void *fd, int type) {
    struct stat state;
    const int own = dup(static_cast<int>(reinterpret_cast<intptr_t>(fd)));
    if (own < 0 || type != 1 || fstat(own, &state) || !S_ISREG(state.st_mode)) return INVALID;
    return *out = own + 1, OK;
}

// -- host memory

CALL cuMemHostRegister_v2(void *at, size_t size, unsigned flags) {
    NEEDS_CONTEXT
    UNSAFE
    std::lock_guard<std::mutex> hold(lock);
    if (flags & 8) return 801;
    const int fd = open("/proc/self/mem", O_RDWR);  // can it be written to?
    char byte;
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    bool writable = false;
    while (fgets(line, sizeof line, maps)) {
        unsigned long first, last;
        char permissions[8];
        if (sscanf(line, "%lx-%lx %7s", &first, &last, permissions) == 3 && first <= (unsigned long)at &&
            (unsigned long)at < last)
            writable = permissions[1] == 'w';
    }
    fclose(maps);
    (void)byte;
    close(fd);
    if (!writable) return INVALID;
    if (find(registered, reinterpret_cast<Pointer>(at))) return 712;
    registered[reinterpret_cast<Pointer>(at)] = {size, -1, false};
    return OK;
}
CALL cuMemHostUnregister(void *at) {
    NEEDS_CONTEXT
    UNSAFE
    std::lock_guard<std::mutex> hold(lock);
    return registered.erase(reinterpret_cast<Pointer>(at)) ? OK : 713;
}
CALL cuMemHostGetDevicePointer_v2(Pointer *out, void *at, unsigned) {
    NEEDS_CONTEXT
    return *out = reinterpret_cast<Pointer>(at), OK;
}

// -- work, done at once

static Result copy(Pointer target, Pointer source, size_t size, bool to_device, bool from_device) {
    std::lock_guard<std::mutex> hold(lock);
    auto there = find(to_device ? pieces : registered, target), here = find(from_device ? pieces : registered, source);
    if (!there || target + size > there->first + there->second.size) return 700;
    if (!here || source + size > here->first + here->second.size) return 700;
    memmove(reinterpret_cast<void *>(target), reinterpret_cast<void *>(source), size);
    return OK;
}
CALL cuMemcpyHtoDAsync_v2(Pointer target, void *source, size_t size, void *) {
    NEEDS_CONTEXT return copy(target, reinterpret_cast<Pointer>(source), size, true, false);
}
CALL cuMemcpyDtoHAsync_v2(void *target, Pointer source, size_t size, void *) {
    NEEDS_CONTEXT return copy(reinterpret_cast<Pointer>(target), source, size, false, true);
}
CALL cuMemcpyDtoDAsync_v2(Pointer target, Pointer source, size_t size, void *) {
    NEEDS_CONTEXT return copy(target, source, size, true, true);
}
struct Attributes {
    int order;
    int hints[4];
    unsigned flags;
};
static Result batch(Pointer *targets, Pointer *sources, size_t *sizes, size_t count, Attributes *attributes, size_t *first,
                    size_t attributes_count, void *stream) {
    NEEDS_CONTEXT
    if (!stream || attributes_count != 1 || *first != 0 || attributes->order != 1 || attributes->flags) return INVALID;
    for (size_t i = 0; i < count; i++) {
        const bool to = find(pieces, targets[i]), from = find(pieces, sources[i]);
        if (const Result done = copy(targets[i], sources[i], sizes[i], to, from)) return done;
    }
    return OK;
}
#ifdef CUDA_13
CALL cuMemcpyBatchAsync_v2(Pointer *targets, Pointer *sources, size_t *sizes, size_t count, Attributes *attributes,
                           size_t *first, size_t attributes_count, void *stream) {
    return batch(targets, sources, sizes, count, attributes, first, attributes_count, stream);
}
#else
CALL cuMemcpyBatchAsync(Pointer *targets, Pointer *sources, size_t *sizes, size_t count, Attributes *attributes,
                        size_t *first, size_t attributes_count, size_t *failed, void *stream) {
    *failed = 0;
    return batch(targets, sources, sizes, count, attributes, first, attributes_count, stream);
}
#endif
CALL cuStreamCreate(void **stream, unsigned flags) { return *stream = malloc(1), flags == 1 ? OK : INVALID; }
CALL cuStreamDestroy_v2(void *stream) { return free(stream), OK; }
CALL cuStreamSynchronize(void *) { NEEDS_CONTEXT return OK; }
CALL cuStreamWaitEvent(void *, void *event, unsigned flags) { return event && !flags ? OK : INVALID; }
CALL cuEventCreate(void **event, unsigned flags) { return *event = malloc(1), flags == 3 ? OK : INVALID; }
CALL cuEventDestroy_v2(void *event) { return free(event), OK; }
CALL cuEventRecord(void *event, void *) { NEEDS_CONTEXT return event ? OK : INVALID; }
CALL cuEventQuery(void *event) { NEEDS_CONTEXT UNSAFE return event ? OK : INVALID; }
CALL cuEventSynchronize(void *event) { NEEDS_CONTEXT return event ? OK : INVALID; }

// -- kernels: a function is what unpacks their arguments

typedef void (*Kernel)(unsigned grid, unsigned block, void **arguments);
CALL cuLaunchKernel(Kernel kernel, unsigned grid, unsigned gy, unsigned gz, unsigned block, unsigned by, unsigned bz,
                    unsigned shared, void *, void **arguments, void **extra) {
    NEEDS_CONTEXT
    if (gy != 1 || gz != 1 || by != 1 || bz != 1 || shared || extra) return INVALID;
    std::lock_guard<std::mutex> hold(lock);
    kernel(grid, block, arguments);
    return OK;
}
template <typename T>
static T as(void *argument) {
    return *static_cast<T *>(argument);
}
#define SHIM(name, ...)                                                                             \
    extern "C" void shim_##name(unsigned grid, unsigned block, void **a) {                          \
        run_##name(grid, block, static_cast<Pages *>(a[0]), as<char *>(a[1]), as<int64_t>(a[2]), as<int64_t>(a[3]), \
                   ##__VA_ARGS__);                                                                  \
    }
SHIM(gather_blocks)
SHIM(scatter_blocks)
SHIM(split_planes)
SHIM(join_planes)
SHIM(make_codebooks)
SHIM(encode_int8, as<int>(a[4]), as<int>(a[5]), as<uint32_t *>(a[6]))
SHIM(encode_fp8, as<int>(a[4]), as<int>(a[5]), as<uint32_t *>(a[6]))
SHIM(encode_int4, as<int>(a[4]), as<uint32_t *>(a[5]))
SHIM(encode_fixed, as<uint32_t *>(a[4]))
SHIM(decode_int8, as<int>(a[4]), as<int>(a[5]))
SHIM(decode_fp8, as<int>(a[4]), as<int>(a[5]))
SHIM(decode_int4, as<int>(a[4]))
SHIM(decode_fixed, as<uint32_t *>(a[4]))
extern "C" void shim_move_pieces(unsigned grid, unsigned block, void **a) {
    run_move_pieces(grid, block, as<uint64_t *>(a[0]), as<uint64_t *>(a[1]), as<int64_t *>(a[2]), as<int64_t>(a[3]),
                    as<int64_t>(a[4]));
}
