/* System calls that fail when a test says so, in a daemon and in its index child: loaded with LD_PRELOAD, see failing.py.

   Counts calls on what lies below one folder, over all processes that share the page, and fails the n-th of one kind.
   A sync of a segment that fails takes along what was written there since the last one, as a kernel may do. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, CLOSE, READ, PREAD, WRITE, PWRITE, FALLOCATE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, STAT, STATVFS, LIST };

struct page { /* failing.py knows its layout */
    int call, nth, number, wipe, hit;
    int counts[15];
    long offset, bytes;
    char folder[256], path[256];
};

static struct page *page;

void failing_begin(const char *file) {
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_RDWR);
    void *mapped = mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    page = mapped == MAP_FAILED ? NULL : mapped;
}

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("DAEMON_FAILS");
    if (file != NULL) failing_begin(file);
}

static int fails(int call, const char *path, long offset, long bytes) {
    if (page == NULL || path == NULL || strncmp(path, page->folder, strlen(page->folder)) != 0) return 0;
    int nth = __atomic_add_fetch(&page->counts[call], 1, __ATOMIC_SEQ_CST);
    if (call != page->call || nth != page->nth) return 0;
    strncpy(page->path, path, sizeof page->path - 1);
    page->offset = offset;
    page->bytes = bytes;
    page->hit = 1;
    errno = page->number;
    return 1;
}

static const char *path_of(int fd, char *path) {
    char link[64] = "/proc/self/fd/", digits[16];
    int before = errno, at = 14, count = 0;
    for (int rest = fd < 0 ? 0 : fd; rest || !count; rest /= 10) digits[count++] = '0' + rest % 10;
    while (count) link[at++] = digits[--count];
    link[at] = 0;
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, 255);
    errno = before;
    path[size < 0 ? 0 : size] = 0;
    return path;
}

static int fd_fails(int call, int fd, long offset, long bytes) {
    char path[256];
    return page != NULL && fails(call, path_of(fd, path), offset, bytes);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* -- what is not synced yet --------------------------------------------------------------------------------------- */

#define WRITES 4096
static struct { ino_t file; long offset, bytes; } writes[WRITES]; /* without bytes: unused */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static ino_t segment_of(int fd) {
    char path[256];
    struct stat found;
    const char *end = strrchr(path_of(fd, path), '.');
    if (page == NULL || end == NULL || strcmp(end, ".seg") != 0) return 0;
    return syscall(SYS_fstat, fd, &found) ? 0 : found.st_ino;
}

static void wrote(int fd, long offset, long bytes) {
    ino_t file = segment_of(fd);
    if (!file || bytes <= 0) return;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < WRITES; i++)
        if (!writes[i].bytes) {
            writes[i].file = file, writes[i].offset = offset, writes[i].bytes = bytes;
            break;
        }
    pthread_mutex_unlock(&lock);
}

static void wipe(int fd, ino_t file) {
    static const char zeros[4096];
    char path[256];
    int other = syscall(SYS_openat, AT_FDCWD, path_of(fd, path), O_WRONLY | O_CLOEXEC);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < WRITES; i++)
        if (writes[i].bytes && writes[i].file == file) {
            for (long at = 0; at < writes[i].bytes; at += 4096)
                syscall(SYS_pwrite64, other, zeros, 4096, writes[i].offset + at);
            writes[i].bytes = 0;
        }
    pthread_mutex_unlock(&lock);
    syscall(SYS_close, other);
}

static int sync_with(int (*real)(int), int fd) {
    static __thread char before[WRITES];
    ino_t file = segment_of(fd);
    if (fd_fails(SYNC, fd, 0, 0)) {
        if (file && page->wipe) wipe(fd, file);
        errno = page->number;
        return -1;
    }
    pthread_mutex_lock(&lock);
    for (int i = 0; i < WRITES; i++) before[i] = file && writes[i].bytes && writes[i].file == file;
    pthread_mutex_unlock(&lock);
    int answer = real(fd);
    if (answer == 0) {
        pthread_mutex_lock(&lock);
        for (int i = 0; i < WRITES; i++) if (before[i]) writes[i].bytes = 0;
        pthread_mutex_unlock(&lock);
    }
    return answer;
}

/* -- calls -------------------------------------------------------------------------------------------------------- */

#define OPENING(name) int name(const char *path, int flags, ...) { \
    REAL(name); va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    return fails(OPEN, path, 0, 0) ? -1 : real(path, flags, mode); }
OPENING(open)
OPENING(open64)

int close(int fd) { /* it is closed all the same */
    REAL(close);
    int failed = fd_fails(CLOSE, fd, 0, 0), answer = real(fd);
    if (failed) errno = page->number;
    return failed ? -1 : answer;
}

int fdatasync(int fd) { REAL(fdatasync); return sync_with(real, fd); }
int fsync(int fd) { REAL(fsync); return sync_with(real, fd); }

static long bytes_of(const struct iovec *parts, int count) {
    long bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    return bytes;
}

#define READING(name) ssize_t name(int fd, const struct iovec *parts, int count, off_t at) { \
    REAL(name); return fd_fails(PREAD, fd, at, bytes_of(parts, count)) ? -1 : real(fd, parts, count, at); }
READING(preadv)
READING(preadv64)

#define WRITING(name) ssize_t name(int fd, const struct iovec *parts, int count, off_t at) { \
    REAL(name); if (fd_fails(PWRITE, fd, at, bytes_of(parts, count))) return -1; \
    ssize_t went = real(fd, parts, count, at); wrote(fd, at, went); return went; }
WRITING(pwritev)
WRITING(pwritev64)

/* What Python calls. */
#define READING_WITH(name) ssize_t name(int fd, const struct iovec *parts, int count, off_t at, int flags) { \
    REAL(name); return fd_fails(PREAD, fd, at, bytes_of(parts, count)) ? -1 : real(fd, parts, count, at, flags); }
READING_WITH(preadv2)
READING_WITH(preadv64v2)

#define WRITING_WITH(name) ssize_t name(int fd, const struct iovec *parts, int count, off_t at, int flags) { \
    REAL(name); if (fd_fails(PWRITE, fd, at, bytes_of(parts, count))) return -1; \
    ssize_t went = real(fd, parts, count, at, flags); wrote(fd, at, went); return went; }
WRITING_WITH(pwritev2)
WRITING_WITH(pwritev64v2)

#define READING_ONE(name) ssize_t name(int fd, void *into, size_t bytes, off_t at) { \
    REAL(name); return fd_fails(PREAD, fd, at, bytes) ? -1 : real(fd, into, bytes, at); }
READING_ONE(pread)
READING_ONE(pread64)

#define WRITING_ONE(name) ssize_t name(int fd, const void *from, size_t bytes, off_t at) { \
    REAL(name); return fd_fails(PWRITE, fd, at, bytes) ? -1 : real(fd, from, bytes, at); }
WRITING_ONE(pwrite)
WRITING_ONE(pwrite64)

ssize_t read(int fd, void *into, size_t bytes) {
    REAL(read); return fd_fails(READ, fd, 0, bytes) ? -1 : real(fd, into, bytes); }
ssize_t write(int fd, const void *from, size_t bytes) {
    REAL(write); return fd_fails(WRITE, fd, 0, bytes) ? -1 : real(fd, from, bytes); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev); return fd_fails(WRITE, fd, 0, bytes_of(parts, count)) ? -1 : real(fd, parts, count); }

#define ALLOCATING(name) int name(int fd, off_t at, off_t bytes) { \
    REAL(name); return fd_fails(FALLOCATE, fd, at, bytes) ? page->number : real(fd, at, bytes); }
ALLOCATING(posix_fallocate)
ALLOCATING(posix_fallocate64)

#define TRUNCATING(name) int name(int fd, off_t bytes) { \
    REAL(name); return fd_fails(TRUNCATE, fd, 0, bytes) ? -1 : real(fd, bytes); }
TRUNCATING(ftruncate)
TRUNCATING(ftruncate64)

int rename(const char *from, const char *to) { REAL(rename); return fails(RENAME, from, 0, 0) ? -1 : real(from, to); }
int unlink(const char *path) { REAL(unlink); return fails(UNLINK, path, 0, 0) ? -1 : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(MKDIR, path, 0, 0) ? -1 : real(path, mode); }

#define LOOKING(name, call, kind) int name(const char *path, struct kind *found) { \
    REAL(name); return fails(call, path, 0, 0) ? -1 : real(path, found); }
LOOKING(stat, STAT, stat)
LOOKING(stat64, STAT, stat64)
LOOKING(lstat, STAT, stat)
LOOKING(lstat64, STAT, stat64)
LOOKING(statvfs, STATVFS, statvfs)
LOOKING(statvfs64, STATVFS, statvfs64)

#define LOOKING_AT(name, kind) int name(int fd, struct kind *found) { \
    REAL(name); return fd_fails(STAT, fd, 0, 0) ? -1 : real(fd, found); }
LOOKING_AT(fstat, stat)
LOOKING_AT(fstat64, stat64)

#define LOOKING_BELOW(name, kind) int name(int fd, const char *path, struct kind *found, int flags) { \
    REAL(name); return fails(STAT, path, 0, 0) ? -1 : real(fd, path, found, flags); }
LOOKING_BELOW(fstatat, stat)
LOOKING_BELOW(fstatat64, stat64)

DIR *opendir(const char *path) { REAL(opendir); return fails(LIST, path, 0, 0) ? NULL : real(path); }
