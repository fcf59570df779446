// init of the KVM guest: what the shell script ../linux/init does, in the same program as the guest's agent.
//
// Where the guest's kernel mode is emulated, a fork and exec of busybox takes 0.2 s and each page fault 0.8 ms, so two
// dozen commands of a script would cost more than the kernel's own boot. Options come as environment variables, since
// the kernel passes name=value words that it does not know to init; README.md of ../linux says what they mean.
//
// ../linux/guest-agent.c is linked in with its main() as agent_main(). Called by another name than init, the program is
// the agent.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

// What goes wrong is said, and init goes on: a guest with a console but without a network can still be looked at.
static void complain(const char* what) { fprintf(stderr, "init: %s: %s\n", what, strerror(errno)); }

static void check(int result, const char* what) {
    if (result < 0) {
        complain(what);
    }
}

static const char* option(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value != NULL ? value : otherwise;
}

// ---- programs ------------------------------------------------------------------------------------------------------

static pid_t start(const char* const* words) {
    const pid_t pid = fork();
    if (pid == 0) {
        execvp(words[0], (char* const*)words);
        complain(words[0]);
        _exit(127);
    }
    check(pid, "fork");
    return pid;
}

static void run(const char* const* words) { waitpid(start(words), NULL, 0); }

#define WORDS(...) ((const char* const[]){__VA_ARGS__, NULL})

// ---- network: QEMU's user networking always gives these addresses, and asking DHCP would only cost time ------------

static struct sockaddr_in address(const char* text) {
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(text)};
}

static void set_address(int fd, const char* interface, unsigned long request, const char* text) {
    struct ifreq change = {0};
    strncpy(change.ifr_name, interface, IFNAMSIZ - 1);
    const struct sockaddr_in value = address(text);
    memcpy(&change.ifr_addr, &value, sizeof value);
    check(ioctl(fd, request, &change), interface);
}

static bool bring_up(int fd, const char* interface) {
    struct ifreq change = {0};
    strncpy(change.ifr_name, interface, IFNAMSIZ - 1);
    change.ifr_flags = IFF_UP;
    return ioctl(fd, SIOCSIFFLAGS, &change) == 0;
}

static void set_up_network(void) {
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bring_up(fd, "lo");
    if (bring_up(fd, "eth0")) {
        set_address(fd, "eth0", SIOCSIFADDR, "10.0.2.15");
        set_address(fd, "eth0", SIOCSIFNETMASK, "255.255.255.0");
        struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
        const struct sockaddr_in any = address("0.0.0.0");
        const struct sockaddr_in gateway = address("10.0.2.2");
        memcpy(&route.rt_dst, &any, sizeof any);
        memcpy(&route.rt_genmask, &any, sizeof any);
        memcpy(&route.rt_gateway, &gateway, sizeof gateway);
        check(ioctl(fd, SIOCADDRT, &route), "default route");
    }
    close(fd);
}

// ---- the device for the TICK lines ---------------------------------------------------------------------------------

static bool read_word(const char* path, char* word, int word_bytes) {
    FILE* file = fopen(path, "re");
    const bool is_read = file != NULL && fgets(word, word_bytes, file) != NULL;
    if (file != NULL) {
        fclose(file);
    }
    word[is_read ? strcspn(word, "\n") : 0] = '\0';
    return is_read;
}

// The virtio console port with the name "tick", else the second serial port, if there is hardware behind it, else the
// console.
static const char* find_tick_device(void) {
    static char device[300];
    char word[64];
    if (getenv("tick_dev") != NULL) {
        snprintf(device, sizeof device, "/dev/%s", getenv("tick_dev"));
        return device;
    }
    DIR* ports = opendir("/sys/class/virtio-ports");
    for (struct dirent* port; ports != NULL && (port = readdir(ports)) != NULL;) {
        char path[300];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", port->d_name);
        if (port->d_name[0] != '.' && read_word(path, word, sizeof word) && strcmp(word, "tick") == 0) {
            snprintf(device, sizeof device, "/dev/%s", port->d_name);
            return device;
        }
    }
    if (read_word("/sys/class/tty/ttyS1/type", word, sizeof word) && strcmp(word, "0") != 0) {
        return "/dev/ttyS1";
    }
    return "/dev/ttyS0";
}

// ---- console -------------------------------------------------------------------------------------------------------

static pid_t start_shell(void) {
    const pid_t pid = fork();
    if (pid == 0) {
        setsid();
        const int console = open("/dev/ttyS0", O_RDWR);
        check(ioctl(console, TIOCSCTTY, 0), "controlling terminal");
        for (int fd = 0; fd <= 2; fd++) {
            dup2(console, fd);
        }
        execl("/bin/sh", "sh", NULL);
        complain("/bin/sh");
        _exit(127);
    }
    return pid;
}

int agent_main(int argc, char** argv);

int main(int argc, char** argv) {
    if (strcmp(argv[0], "/init") != 0) {
        return agent_main(argc, argv);
    }
    setenv("PATH", "/bin", 1);
    setenv("HOME", "/", 1);
    setenv("PS1", "guest# ", 1);
    check(mount("proc", "/proc", "proc", 0, NULL), "/proc");
    check(mount("sysfs", "/sys", "sysfs", 0, NULL), "/sys");
    check(mount("dev", "/dev", "devtmpfs", 0, NULL), "/dev");
    // Not the default half of RAM: the filled memory of a benchmark is most of the guest's. In huge pages, since an
    // emulated page fault takes a millisecond; but not for the small files.
    check(mount("run", "/run", "tmpfs", 0, "size=100%,huge=within_size"), "/run");
    check(mkdir("/run/vm", 0755), "/run/vm");
    check(sethostname("guest", 5), "host name");
    for (int fd = 0; fd <= 2; fd++) {
        dup2(open("/dev/console", O_RDWR | O_CLOEXEC), fd);
    }

    // glibc would choose AVX code, whose registers the kernel does not switch when it is booted with noxsave.
    if (getenv("GLIBC_TUNABLES") == NULL) {
        fprintf(stderr, "init: no GLIBC_TUNABLES on the command line; programs may use AVX and lose registers\n");
    }

    set_up_network();
    start(WORDS("httpd", "-f", "-p", "80", "-h", "/run/vm"));
    start(WORDS("guest-agent", "echo", "7"));
    if (access("/dev/vda", F_OK) == 0) {
        run(WORDS("open-disks"));
    }
    if (strcmp(option("fill_mib", "0"), "0") != 0) {
        run(WORDS("guest-agent", "fill", option("fill_mib", "0")));
        if (strcmp(option("rewrite_mib_per_s", "0"), "0") != 0) {
            start(WORDS("guest-agent", "rewrite", option("rewrite_mib_per_s", "0")));
        }
    }
    pid_t shell = start_shell();
    start(WORDS("guest-agent", "tick", find_tick_device(), option("tick_ms", "100")));

    // A shell that ends (Ctrl-D, exit) is started anew, since the guest must stay reachable.
    for (;;) {
        const pid_t ended = wait(NULL);
        if (ended == shell) {
            shell = start_shell();
        }
    }
}
