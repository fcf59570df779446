// SPDX-License-Identifier: Apache-2.0
// What a program does all day, each thing alone: computing, system calls that a recorder may see and ones that it does
// not, threads, children. Prints `NAME WALL_NS CPU_NS` per thing, in nanoseconds per operation. See overhead.py.
//
// usage: overhead-load MILLISECONDS_PER_THING

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static volatile uint64_t sink;
static int zero_fd, null_fd, event_fd, epoll_fd, pipe_fds[2];

static void check(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "overhead-load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void arithmetic(void) {
    uint64_t x = sink | 1;
    for (int i = 0; i < 1000; ++i) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
    }
    sink = x;
}

// One cache line of each page of 64 MiB: misses in cache and TLB, as guest memory does.
static void memory_walk(void) {
    enum { kBytes = 64 << 20, kStep = 4096 + 64 };
    static char *buffer;
    static size_t at;
    if (!buffer) {
        buffer = malloc(kBytes);
        check(buffer != NULL, "malloc");
        memset(buffer, 1, kBytes);
    }
    for (int i = 0; i < 100; ++i) {
        buffer[at] = (char)(buffer[at] + 1);
        at = (at + kStep) % kBytes;
    }
}

static void getppid_call(void) { sink += (uint64_t)syscall(SYS_getppid); }

static void clock_call(void) { sink += now_ns(CLOCK_MONOTONIC); }

static void read_write(void) {
    char block[4096];
    check(read(zero_fd, block, sizeof block) == sizeof block, "read");
    check(write(null_fd, block, sizeof block) == sizeof block, "write");
}

static void ioctl_call(void) {
    int available;
    check(ioctl(pipe_fds[0], FIONREAD, &available) == 0, "ioctl");
}

static void open_close(void) {
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    check(fd >= 0, "open");
    close(fd);
}

static void dup_close(void) {
    int fd = dup(null_fd);
    check(fd >= 0, "dup");
    close(fd);
}

static void pipe_close(void) {
    int ends[2];
    check(pipe(ends) == 0, "pipe");
    close(ends[0]);
    close(ends[1]);
}

static void socketpair_close(void) {
    int ends[2];
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
    close(ends[0]);
    close(ends[1]);
}

static void mmap_munmap(void) {
    char *area = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(area != MAP_FAILED, "mmap");
    area[0] = 1;
    madvise(area, 65536, MADV_DONTFORK);
    munmap(area, 65536);
}

// What an event loop does, and QEMU's main loop is one.
static void event_loop_turn(void) {
    uint64_t value = 1;
    struct epoll_event event;
    check(write(event_fd, &value, sizeof value) == sizeof value, "write eventfd");
    check(epoll_wait(epoll_fd, &event, 1, -1) == 1, "epoll_wait");
    check(read(event_fd, &value, sizeof value) == sizeof value, "read eventfd");
}

static void on_signal(int number) { sink += (uint64_t)number; }

static void signal_self(void) { raise(SIGUSR1); }

static void sigaction_call(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    check(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
}

static void *thread_body(void *argument) { return argument; }

static void thread_create_join(void) {
    pthread_t thread;
    check(pthread_create(&thread, NULL, thread_body, NULL) == 0, "pthread_create");
    pthread_join(thread, NULL);
}

static void fork_wait(void) {
    pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) _exit(0);
    waitpid(child, NULL, 0);
}

static void spawn_wait(void) {
    char *arguments[] = {"/bin/true", NULL};
    pid_t child;
    check(posix_spawn(&child, arguments[0], NULL, NULL, arguments, environ) == 0, "posix_spawn");
    waitpid(child, NULL, 0);
}

// A VMM's way into its guest and back without running it. The last thing of all, since a VM makes mmap and fork dearer.
static struct kvm_run *vcpu_run;
static int vcpu_fd = -1;

static int has_vcpu(void) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = kvm >= 0 ? ioctl(kvm, KVM_CREATE_VM, 0) : -1;
    vcpu_fd = vm >= 0 ? ioctl(vm, KVM_CREATE_VCPU, 0) : -1;
    if (vcpu_fd < 0) {
        fprintf(stderr, "overhead-load: KVM_RUN is not measured: %s\n", strerror(errno));
        return 0;
    }
    vcpu_run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
    check(vcpu_run != MAP_FAILED, "mmap of kvm_run");
    vcpu_run->immediate_exit = 1;
    return 1;
}

static void kvm_run(void) { check(ioctl(vcpu_fd, KVM_RUN, 0) == -1 && errno == EINTR, "KVM_RUN"); }

static const struct {
    const char *name;
    void (*operation)(void);
    unsigned batch;  // operations between two looks at the clock
} kThings[] = {
    {"1000_xorshifts", arithmetic, 100},
    {"100_cache_misses", memory_walk, 100},
    {"clock_gettime", clock_call, 1000},
    {"getppid", getppid_call, 1000},
    {"read+write_4KiB", read_write, 100},
    {"ioctl", ioctl_call, 1000},
    {"open+close", open_close, 100},
    {"dup+close", dup_close, 100},
    {"pipe+close", pipe_close, 100},
    {"socketpair+close", socketpair_close, 100},
    {"mmap+madvise+munmap", mmap_munmap, 100},
    {"event_loop_turn", event_loop_turn, 100},
    {"sigaction", sigaction_call, 1000},
    {"signal_to_self", signal_self, 100},
    {"thread_create+join", thread_create_join, 10},
    {"fork+wait", fork_wait, 1},
    {"spawn_true+wait", spawn_wait, 1},
    {"KVM_RUN", kvm_run, 1000},
};

int main(int count, char **arguments) {
    if (count != 2 || atoi(arguments[1]) <= 0) {
        fprintf(stderr, "usage: overhead-load MILLISECONDS_PER_THING\n");
        return 2;
    }
    uint64_t budget_ns = (uint64_t)atoi(arguments[1]) * 1000000u;
    zero_fd = open("/dev/zero", O_RDONLY);
    null_fd = open("/dev/null", O_WRONLY);
    event_fd = eventfd(0, 0);
    epoll_fd = epoll_create1(0);
    check(zero_fd >= 0 && null_fd >= 0 && event_fd >= 0 && epoll_fd >= 0 && pipe(pipe_fds) == 0, "setting up");
    struct epoll_event interest = {.events = EPOLLIN};
    check(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, event_fd, &interest) == 0, "epoll_ctl");
    sigaction_call();

    for (size_t i = 0; i < sizeof kThings / sizeof kThings[0]; ++i) {
        if (kThings[i].operation == kvm_run && !has_vcpu()) continue;
        for (unsigned n = 0; n < kThings[i].batch; ++n) kThings[i].operation();  // warms caches up
        uint64_t operations = 0, wall_from_ns = now_ns(CLOCK_MONOTONIC), wall_ns;
        uint64_t cpu_from_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID);
        do {
            for (unsigned n = 0; n < kThings[i].batch; ++n) kThings[i].operation();
            operations += kThings[i].batch;
            wall_ns = now_ns(CLOCK_MONOTONIC) - wall_from_ns;
        } while (wall_ns < budget_ns);
        uint64_t cpu_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu_from_ns;
        printf("%s %.3f %.3f\n", kThings[i].name, (double)wall_ns / (double)operations,
               (double)cpu_ns / (double)operations);
    }
    return 0;
}
