/* exec_emulated.c — preloaded into emulated programs so that they can start themselves again: an arm64 program that they
 * execute is given to the emulator named by ARM64_EMULATOR. (The kernel would do that if binfmt_misc were set up, which
 * takes privileges that a test should not need.) Only calls that are allowed between vfork and exec. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST_ARGUMENTS = 256, MACHINE_AARCH64 = 183 };

static int is_arm64(const char *path) {
    unsigned char head[20];
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    const ssize_t n = read(file, head, sizeof head);
    close(file);
    return n == (ssize_t)sizeof head && memcmp(head, "\177ELF", 4) == 0 && head[18] == MACHINE_AARCH64 && head[19] == 0;
}

static const char *emulator_of(char *const environment[]) {
    static const char name[] = "ARM64_EMULATOR=";
    for (; environment && *environment; environment++)
        if (strncmp(*environment, name, sizeof name - 1) == 0) return *environment + sizeof name - 1;
    return NULL;
}

__attribute__((visibility("default"))) int execve(const char *path, char *const arguments[], char *const environment[]) {
    const char *emulator = emulator_of(environment), *all[MOST_ARGUMENTS];
    if (!emulator || !is_arm64(path)) return (int)syscall(SYS_execve, path, arguments, environment);
    size_t n = 0;
    all[n++] = emulator;
    all[n++] = path;
    for (size_t i = 1; arguments[0] && arguments[i]; i++) {
        if (n + 1 >= MOST_ARGUMENTS) {
            errno = E2BIG;
            return -1;
        }
        all[n++] = arguments[i];
    }
    all[n] = NULL;
    return (int)syscall(SYS_execve, emulator, all, environment);
}
