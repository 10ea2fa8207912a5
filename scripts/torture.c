// What scripts/torture.py loads into every process of a loop (LD_PRELOAD): it counts the calls that
// change files below a folder, and at one of them kills the process group, sends a signal, or lets
// the call fail. It also sets the clock back. Calls are logged with what was running.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, KILL, TERM, FULL, SHORT, FSYNC };

// Shared by all processes; scripts/torture.py writes it (STATE there has the same fields).
struct state {
  uint64_t at, count;  // act at the call with this number (SHORT: and its multiples); calls so far
  int32_t mode, when;  // when: 0 before the call, 1 in the middle of a write, 2 after the call
  int64_t shift;       // seconds added to the clock
  char root[256];      // calls below this folder count
  char read_only[256]; // nothing may be written below this one
  char stage[1024];    // where set, only calls of commands with this text in them count
  char op[16];         // where set, only calls of this name count
  char log[256];
};
static struct state *state;

__attribute__((constructor)) static void start(void) {
  const char *file = getenv("TORTURE_STATE");
  int fd = file ? syscall(SYS_openat, AT_FDCWD, file, O_RDWR, 0) : -1;
  if (fd < 0) return;
  void *map = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (map != MAP_FAILED) state = map;
}

static void path_of(int dir, const char *name, char *out, size_t size) {
  out[0] = 0;
  if (name && name[0] == '/') {
    snprintf(out, size, "%s", name);
    return;
  }
  char link[64], folder[512];
  if (dir == AT_FDCWD) strcpy(link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
  ssize_t n = syscall(SYS_readlink, link, folder, sizeof folder - 1);
  if (n < 0) return;
  folder[n] = 0;
  snprintf(out, size, name ? "%s/%s" : "%s", folder, name);
}

static int below(const char *path, const char *folder) {
  return folder[0] && !strncmp(path, folder, strlen(folder));
}

// 0: go on; 1: act in the middle of the call; 2: act after it; below 0: fail with this errno.
static int before(const char *op, int dir, const char *name) {
  if (!state) return 0;
  int kept = errno, is_fsync = !strcmp(op, "fsync");
  char path[1024];
  path_of(dir, name, path, sizeof path);
  errno = kept;
  if (below(path, state->read_only)) return -EROFS;
  if (!below(path, state->root)) return 0;
  const char *stage = getenv("TORTURE_STAGE");
  if (!stage) stage = "the shell";
  if (state->stage[0] && !strstr(stage, state->stage)) return 0;
  if (state->op[0] && strcmp(state->op, op)) return 0;
  uint64_t n = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
  int hit = state->mode == SHORT ? n % state->at == 0 : n == state->at;
  if (state->log[0] && (hit || state->mode == COUNT)) {
    char line[1600];
    int length = snprintf(line, sizeof line, "%s\t%s\t%.900s\n", stage, op, path);
    int fd = syscall(SYS_openat, AT_FDCWD, state->log, O_WRONLY | O_APPEND | O_CREAT, 0644);
    syscall(SYS_write, fd, line, length);
    syscall(SYS_close, fd);
  }
  errno = kept;
  if (state->mode == FULL && n >= state->at && strcmp(op, "unlink")) return -ENOSPC;
  if (!hit) return 0;
  switch (state->mode) {
    case KILL: case TERM:
      if (state->when) return state->when;
      kill(0, state->mode == KILL ? SIGKILL : SIGTERM);
      return 0;
    case SHORT: return !strcmp(op, "write");
    case FSYNC: return is_fsync ? -EIO : 0;
  }
  return 0;
}

static void after(int what) {
  if (what <= 0 || state->mode == SHORT) return;
  int kept = errno;
  kill(0, state->mode == KILL ? SIGKILL : SIGTERM);
  errno = kept;
}

static long fail(int what) {
  errno = -what;
  return -1;
}

#define CALL(op, dir, name, call)                \
  int what = before(op, dir, name);              \
  if (what < 0) return fail(what);               \
  long result = call;                            \
  after(what);                                   \
  return result;

#define CHANGES(flags) (((flags) & (O_CREAT | O_TRUNC)) || ((flags) & O_ACCMODE) != O_RDONLY)

static int opened(int dir, const char *path, int flags, mode_t mode) {
  if (!CHANGES(flags)) return syscall(SYS_openat, dir, path, flags, mode);
  CALL("open", dir, path, syscall(SYS_openat, dir, path, flags, mode))
}
#define MODE                 \
  va_list args;              \
  va_start(args, flags);     \
  mode_t mode = va_arg(args, mode_t); \
  va_end(args);
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE return opened(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE return opened(dir, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

// A write of n bytes; half of it where the write is to be short, or is cut off by a kill.
#define WRITE(n, call, half) CALL("write", fd, NULL, (what == 1 && (n) > 1 ? (half) : (call)))
ssize_t write(int fd, const void *data, size_t n) {
  WRITE(n, syscall(SYS_write, fd, data, n), syscall(SYS_write, fd, data, n / 2))
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
  WRITE(n, syscall(SYS_pwrite64, fd, data, n, at), syscall(SYS_pwrite64, fd, data, n / 2, at))
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) {
  WRITE(n, syscall(SYS_pwrite64, fd, data, n, at), syscall(SYS_pwrite64, fd, data, n / 2, at))
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  WRITE(n, syscall(SYS_writev, fd, parts, n), syscall(SYS_writev, fd, parts, n / 2))
}
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t at) {
  WRITE(n, syscall(SYS_pwritev, fd, parts, n, at, 0), syscall(SYS_pwritev, fd, parts, n / 2, at, 0))
}
ssize_t sendfile(int fd, int from, off_t *at, size_t n) {
  WRITE(n, syscall(SYS_sendfile, fd, from, at, n), syscall(SYS_sendfile, fd, from, at, n / 2))
}
ssize_t sendfile64(int fd, int from, off_t *at, size_t n) {
  WRITE(n, syscall(SYS_sendfile, fd, from, at, n), syscall(SYS_sendfile, fd, from, at, n / 2))
}
ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t n, unsigned flags) {
  WRITE(n, syscall(SYS_copy_file_range, from, a, fd, b, n, flags),
        syscall(SYS_copy_file_range, from, a, fd, b, n / 2, flags))
}
int ftruncate(int fd, off_t n) { CALL("truncate", fd, NULL, syscall(SYS_ftruncate, fd, n)) }
int ftruncate64(int fd, off_t n) { CALL("truncate", fd, NULL, syscall(SYS_ftruncate, fd, n)) }
int fsync(int fd) { CALL("fsync", fd, NULL, syscall(SYS_fsync, fd)) }
int fdatasync(int fd) { CALL("fsync", fd, NULL, syscall(SYS_fdatasync, fd)) }

// The new name is what is logged.
int rename(const char *a, const char *b) { CALL("rename", AT_FDCWD, b, syscall(SYS_rename, a, b)) }
int renameat(int x, const char *a, int y, const char *b) {
  CALL("rename", y, b, syscall(SYS_renameat2, x, a, y, b, 0))
}
int renameat2(int x, const char *a, int y, const char *b, unsigned flags) {
  CALL("rename", y, b, syscall(SYS_renameat2, x, a, y, b, flags))
}
int link(const char *a, const char *b) { CALL("rename", AT_FDCWD, b, syscall(SYS_link, a, b)) }
int mkdir(const char *path, mode_t mode) { CALL("mkdir", AT_FDCWD, path, syscall(SYS_mkdir, path, mode)) }
int mkdirat(int dir, const char *path, mode_t mode) {
  CALL("mkdir", dir, path, syscall(SYS_mkdirat, dir, path, mode))
}
int unlink(const char *path) { CALL("unlink", AT_FDCWD, path, syscall(SYS_unlink, path)) }
int rmdir(const char *path) { CALL("unlink", AT_FDCWD, path, syscall(SYS_rmdir, path)) }
int unlinkat(int dir, const char *path, int flags) {
  CALL("unlink", dir, path, syscall(SYS_unlinkat, dir, path, flags))
}

static time_t shift(void) { return state ? state->shift : 0; }
int clock_gettime(clockid_t clock, struct timespec *t) {
  int result = syscall(SYS_clock_gettime, clock, t);
  if (clock == CLOCK_REALTIME) t->tv_sec += shift();
  return result;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  int result = syscall(SYS_gettimeofday, t, zone);
  t->tv_sec += shift();
  return result;
}
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
