// The one program of ours in the Linux guest: ticks, fills and rewrites memory, writes to disks, echoes.
// What its output looks like, and what the memory check can tell, is in README.md beside this file.
//
//     guest-agent tick DEVICE PERIOD_MS        TICK lines for ever
//     guest-agent fill MIB                     makes the filled memory
//     guest-agent rewrite MIB_PER_S|max        rewrites it for ever
//     guest-agent check                        verifies it
//     guest-agent append FILE PERIOD_MS NAME   numbered records for ever, each one synced; pid in /run/writer-NAME
//     guest-agent echo PORT                    TCP echo service
//
// Linked statically, since the initramfs has no libc of its own.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static const int64_t kNsPerS = 1000000000;
static const int64_t kNsPerMs = 1000000;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char* format, ...) {
    const int error = errno;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "guest-agent: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (%s)\n", strerror(error));
    va_end(arguments);
    exit(1);
}

static int64_t now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * kNsPerS + now.tv_nsec;
}

// Sleeps until *due_ns and moves it on by one period. A moment that has passed already, because the VM stood still, is
// not caught up on: the next one is a whole period from now, so that a pause is one long step and no burst.
static void sleep_until_next(int64_t* due_ns, int64_t period_ns) {
    *due_ns += period_ns;
    const int64_t now = now_ns(CLOCK_MONOTONIC);
    if (*due_ns < now) {
        *due_ns = now + period_ns;
    }
    const struct timespec due = {*due_ns / kNsPerS, *due_ns % kNsPerS};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR) {
    }
}

static int64_t positive_number(const char* text) {
    char* end;
    const long long number = strtoll(text, &end, 10);
    if (*text == '\0' || *end != '\0' || number <= 0) {
        errno = EINVAL;
        die("not a positive number: \"%s\"", text);
    }
    return number;
}

// ---- tick ----------------------------------------------------------------------------------------------------------

// A line that the device took only in part is finished before the next one begins; a line for which there is no room
// at all is dropped. So the reader never sees a torn line, and the counter goes on without a reader.
struct LineWriter {
    int fd;
    char rest[256];
    size_t rest_bytes;
};

static void write_line(struct LineWriter* writer, const char* line, size_t line_bytes) {
    if (writer->rest_bytes > 0) {
        const ssize_t written = write(writer->fd, writer->rest, writer->rest_bytes);
        if (written > 0) {
            writer->rest_bytes -= (size_t)written;
            memmove(writer->rest, writer->rest + written, writer->rest_bytes);
        }
        if (writer->rest_bytes > 0) {
            return;
        }
    }
    const ssize_t written = write(writer->fd, line, line_bytes);
    if (written > 0 && (size_t)written < line_bytes) {
        writer->rest_bytes = line_bytes - (size_t)written;
        memcpy(writer->rest, line + written, writer->rest_bytes);
    }
}

enum { kLatestLineBytes = 160 };

static int open_tick_device(const char* path) {
    const int fd = open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) {
        die("%s", path);
    }
    // The console keeps its modes, since a shell runs on it; another serial line must not translate what it is given.
    struct termios modes;
    if (strcmp(path, "/dev/ttyS0") != 0 && tcgetattr(fd, &modes) == 0) {
        cfmakeraw(&modes);
        tcsetattr(fd, TCSANOW, &modes);
    }
    return fd;
}

__attribute__((noreturn)) static void tick(const char* device, int64_t period_ms) {
    struct LineWriter writer = {.fd = open_tick_device(device)};
    const int latest = open("/run/vm/tick", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (latest < 0) {
        die("/run/vm/tick");
    }
    uint64_t nonce[2];
    if (getrandom(nonce, sizeof nonce, 0) != sizeof nonce) {
        die("getrandom");
    }
    int64_t due_ns = now_ns(CLOCK_MONOTONIC);
    for (uint64_t counter = 1;; counter++) {
        char line[kLatestLineBytes];
        const int line_bytes = snprintf(
            line, sizeof line, "TICK %" PRIu64 " %016" PRIx64 "%016" PRIx64 " %" PRId64 " %" PRId64 "\n", counter,
            nonce[0], nonce[1], now_ns(CLOCK_MONOTONIC) / 1000, now_ns(CLOCK_REALTIME) / 1000);
        write_line(&writer, line, (size_t)line_bytes);
        // Padded to one size for ever: a reader that asked for the size just before the counter got one more digit
        // would otherwise miss the end.
        char latest_line[kLatestLineBytes + 1];
        snprintf(latest_line, sizeof latest_line, "%-*.*s\n", kLatestLineBytes - 1, line_bytes - 1, line);
        pwrite(latest, latest_line, kLatestLineBytes, 0);
        sleep_until_next(&due_ns, period_ms * kNsPerMs);
    }
}

// ---- fill, rewrite, check ------------------------------------------------------------------------------------------

enum { kPageBytes = 4096, kPageWords = kPageBytes / sizeof(uint64_t), kPagesPerMib = 256 };

static const char* const kMemoryFile = "/run/filled-memory";

struct Page {
    uint64_t number;
    uint64_t generation;
    uint64_t words[kPageWords - 2];
};
_Static_assert(sizeof(struct Page) == kPageBytes, "a page of the guest");

// The filled memory: one header page, then the pages. Rewriter and checker are two processes that share it.
struct Header {
    uint64_t page_count;
    uint64_t seed;
    _Atomic bool rewriter_runs;
    _Atomic bool pause_wanted;
    _Atomic bool paused;
    _Atomic uint64_t pages_rewritten;
};

struct Memory {
    struct Header* header;
    struct Page* pages;
};

static struct Memory map_memory(int fd, uint64_t page_count) {
    const size_t bytes = (page_count + 1) * kPageBytes;
    char* start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (start == MAP_FAILED) {
        die("cannot map %s", kMemoryFile);
    }
    return (struct Memory){(struct Header*)start, (struct Page*)(start + kPageBytes)};
}

static struct Memory open_memory(void) {
    const int fd = open(kMemoryFile, O_RDWR | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) {
        die("no filled memory, boot with fill_mib=N: %s", kMemoryFile);
    }
    return map_memory(fd, (uint64_t)status.st_size / kPageBytes - 1);
}

// splitmix64: each word follows from its place alone, and the whole does not compress.
static uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static uint64_t first_word(uint64_t seed, uint64_t number, uint64_t generation) {
    return mixed(seed ^ mixed(number ^ mixed(generation)));
}

static void write_page(struct Page* page, uint64_t seed, uint64_t number, uint64_t generation) {
    const uint64_t base = first_word(seed, number, generation);
    page->number = number;
    page->generation = generation;
    for (uint64_t i = 0; i < kPageWords - 2; i++) {
        page->words[i] = mixed(base + i);
    }
}

static bool page_is_whole(const struct Page* page, uint64_t seed, uint64_t number) {
    if (page->number != number) {
        return false;
    }
    const uint64_t base = first_word(seed, number, page->generation);
    for (uint64_t i = 0; i < kPageWords - 2; i++) {
        if (page->words[i] != mixed(base + i)) {
            return false;
        }
    }
    return true;
}

static int fill(uint64_t mib) {
    const int fd = open(kMemoryFile, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    const uint64_t page_count = mib * kPagesPerMib;
    if (fd < 0 || ftruncate(fd, (off_t)(page_count + 1) * kPageBytes) != 0) {
        die("%s", kMemoryFile);
    }
    const struct Memory memory = map_memory(fd, page_count);
    memory.header->page_count = page_count;
    getrandom(&memory.header->seed, sizeof memory.header->seed, 0);
    for (uint64_t i = 0; i < page_count; i++) {
        write_page(&memory.pages[i], memory.header->seed, i, 0);
    }
    return 0;
}

__attribute__((noreturn)) static void rewrite(const char* rate) {
    const int64_t pages_per_s = strcmp(rate, "max") == 0 ? 0 : positive_number(rate) * kPagesPerMib;
    const struct Memory memory = open_memory();
    struct Header* header = memory.header;
    header->rewriter_runs = true;
    nice(10);  // The ticker comes first, so that its lines show pauses of the VM and not our load.

    const int64_t start_ns = now_ns(CLOCK_MONOTONIC);
    int64_t idle_ns = 0;  // Time spent paused, which is no reason to hurry afterwards.
    for (uint64_t generation = 1;; generation++) {
        for (uint64_t i = 0; i < header->page_count; i++) {
            if (header->pause_wanted) {
                const int64_t pause_start_ns = now_ns(CLOCK_MONOTONIC);
                header->paused = true;
                while (header->pause_wanted) {
                    usleep(1000);
                }
                header->paused = false;
                idle_ns += now_ns(CLOCK_MONOTONIC) - pause_start_ns;
            }
            write_page(&memory.pages[i], header->seed, i, generation);
            const int64_t done = (int64_t)++header->pages_rewritten;
            if (pages_per_s != 0 && done % 16 == 0) {
                const int64_t ahead_ns = start_ns + idle_ns + done * kNsPerS / pages_per_s - now_ns(CLOCK_MONOTONIC);
                if (ahead_ns > 0) {
                    usleep((useconds_t)(ahead_ns / 1000));
                }
            }
        }
    }
}

static int check(void) {
    const struct Memory memory = open_memory();
    struct Header* header = memory.header;
    header->pause_wanted = true;
    while (header->rewriter_runs && !header->paused) {
        usleep(1000);
    }

    uint64_t wrong_pages = 0;
    for (uint64_t i = 0; i < header->page_count; i++) {
        const struct Page* page = &memory.pages[i];
        const bool whole = page_is_whole(page, header->seed, i);
        // One sweep writes g+1 over g, in the order of the pages: a generation may fall by one, once, and never rise.
        const uint64_t first_generation = memory.pages[0].generation;
        const bool in_order = page->generation == first_generation ||
                              (page->generation + 1 == first_generation && i > 0);
        const bool never_rises = i == 0 || page->generation <= memory.pages[i - 1].generation;
        if ((!whole || !in_order || !never_rises) && ++wrong_pages <= 10) {
            printf("memory wrong: page %" PRIu64 " %s (number %" PRIu64 ", generation %" PRIu64 " of %" PRIu64 ")\n",
                   i, whole ? "is from another time" : "is torn or lost", page->number, page->generation,
                   first_generation);
        }
    }
    printf("memory %s: %" PRIu64 " MiB, %" PRIu64 " pages rewritten, %" PRIu64 " wrong\n",
           wrong_pages == 0 ? "ok" : "bad", header->page_count / kPagesPerMib, header->pages_rewritten, wrong_pages);
    header->pause_wanted = false;
    return wrong_pages == 0 ? 0 : 1;
}

// ---- append --------------------------------------------------------------------------------------------------------

enum { kRecordBytes = 64, kMostRecords = 256 * 1024 };

static volatile sig_atomic_t stop_wanted;

static void want_stop(int signal) {
    (void)signal;
    stop_wanted = 1;
}

static int append(const char* path, int64_t period_ms, const char* name) {
    // A record is written and synced as a whole before the writer ends, so SIGTERM only sets a flag.
    signal(SIGTERM, want_stop);
    const int fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) {
        die("%s", path);
    }
    // A record torn by a crash is cut off. Its number was never synced, so it may be given again.
    uint64_t number = (uint64_t)status.st_size / kRecordBytes;
    if (ftruncate(fd, (off_t)(number * kRecordBytes)) != 0) {
        die("%s", path);
    }
    char pid_path[64];
    snprintf(pid_path, sizeof pid_path, "/run/writer-%s", name);
    FILE* pid_file = fopen(pid_path, "we");
    if (pid_file == NULL || fprintf(pid_file, "%d\n", getpid()) < 0 || fclose(pid_file) != 0) {
        die("%s", pid_path);
    }

    int64_t due_ns = now_ns(CLOCK_MONOTONIC);
    while (!stop_wanted) {
        if (number < kMostRecords) {  // 16 MiB: a small disk must not fill up in a long test.
            char record[kRecordBytes + 1];
            snprintf(record, sizeof record, "RECORD %012" PRIu64 " %016" PRIx64 "%*s\n", number, mixed(number),
                     kRecordBytes - 7 - 12 - 1 - 16 - 1, "");
            if (write(fd, record, kRecordBytes) != kRecordBytes || fsync(fd) != 0) {
                die("%s", path);
            }
            number++;
        }
        sleep_until_next(&due_ns, period_ms * kNsPerMs);
    }
    return 0;
}

// ---- echo ----------------------------------------------------------------------------------------------------------

__attribute__((noreturn)) static void echo(uint16_t port) {
    signal(SIGCHLD, SIG_IGN);
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    const struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (bind(listener, (const struct sockaddr*)&address, sizeof address) != 0 || listen(listener, 8) != 0) {
        die("port %d", port);
    }
    while (true) {
        const int connection = accept(listener, NULL, NULL);
        if (connection < 0) {
            continue;
        }
        if (fork() == 0) {
            char data[4096];
            ssize_t bytes;
            while ((bytes = read(connection, data, sizeof data)) > 0 &&
                   write(connection, data, (size_t)bytes) == bytes) {
            }
            _exit(0);
        }
        close(connection);
    }
}

int main(int argc, char** argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char* verb = argc > 1 ? argv[1] : "";
    if (strcmp(verb, "tick") == 0 && argc == 4) {
        tick(argv[2], positive_number(argv[3]));
    }
    if (strcmp(verb, "fill") == 0 && argc == 3) {
        return fill((uint64_t)positive_number(argv[2]));
    }
    if (strcmp(verb, "rewrite") == 0 && argc == 3) {
        rewrite(argv[2]);
    }
    if (strcmp(verb, "check") == 0 && argc == 2) {
        return check();
    }
    if (strcmp(verb, "append") == 0 && argc == 5) {
        return append(argv[2], positive_number(argv[3]), argv[4]);
    }
    if (strcmp(verb, "echo") == 0 && argc == 3) {
        echo((uint16_t)positive_number(argv[2]));
    }
    fprintf(stderr, "guest-agent: see the head of guest-agent.c for its verbs\n");
    return 2;
}
