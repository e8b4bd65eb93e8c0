/* registry.c - the kernels of the program, found in its symbol tables.
 *
 * A kernel's mangled name has "B" and the length of "kernel_<threads>" before the tag (see
 * cuda/device_emulated.h); g++ leaves the tag out of template instances, which are found by their
 * address when they are launched. Kernels are static, so they stand in .symtab only: the files of
 * the program and its libraries are read. Names are demangled by the C++ runtime where the program
 * can load one. MOE_EMULATION_KERNELS=file appends the names of what was launched. */
#include "internal.h"

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Queued launches point into it, so it does not move. */
static struct emu_kernel kernels[4096];
static size_t count;
static bool loaded;

static char *demangled(const char *symbol)
{
    static char *(*demangle)(const char *, char *, size_t *, int *);
    static bool tried;
    if (!tried) {
        void *runtime = dlopen("libstdc++.so.6", RTLD_LAZY);
        tried = true;
        if (runtime != NULL) *(void **)&demangle = dlsym(runtime, "__cxa_demangle");
    }
    char *full = demangle != NULL ? demangle(symbol, NULL, NULL, NULL) : NULL;
    return full != NULL ? full : strdup(symbol);
}

/* "void k[abi:kernel_256]<float>(float*, long)" becomes "k<float>". */
static char *short_name(char *full)
{
    char *tag = strstr(full, "[abi:kernel_"), *end = tag != NULL ? strchr(tag, ']') : NULL;
    if (end == NULL) {
        tag = full + strcspn(full, "<(");
        end = tag - 1;
    }
    char *begin = strncmp(full, "void ", 5) == 0 ? full + 5 : full;
    int depth = 0;
    char *rest = end + 1;
    while (*rest != 0 && (depth > 0 || *rest != '(')) {
        depth += (*rest == '<') - (*rest == '>');
        rest++;
    }
    size_t head = (size_t)(tag - begin), tail = (size_t)(rest - end - 1);
    char *name = malloc(head + tail + 1);
    memcpy(name, begin, head);
    memcpy(name + head, end + 1, tail);
    name[head + tail] = 0;
    free(full);
    return name;
}

static struct emu_kernel *add(const void *address, char *name, int bound)
{
    if (count == sizeof kernels / sizeof kernels[0]) abort();
    struct emu_kernel k = {address, name, bound, EMU_SHARED_PLAIN, 0};
    kernels[count] = k;
    return &kernels[count++];
}

/* The one that is looked for, or NULL: all that have the tag. */
static const void *wanted;

static void add_symbol(const char *symbol, const void *address)
{
    const char *tag = strstr(symbol, "kernel_");
    if (strncmp(symbol, "_Z", 2) != 0 || (wanted != NULL && wanted != address)) return;
    if (tag != NULL && (tag < symbol + 3 || (tag[-2] != 'B' && tag[-3] != 'B'))) tag = NULL;
    if (tag == NULL && wanted == NULL) return;
    for (size_t i = 0; i < count; i++) {
        if (kernels[i].address == address) return;
    }
    add(address, short_name(demangled(symbol)), tag != NULL ? atoi(tag + 7) : 0);
}

static void read_symbols(const unsigned char *file, size_t bytes, uintptr_t base)
{
    const ElfW(Ehdr) *head = (const void *)file;
    if (bytes < sizeof *head || memcmp(head->e_ident, ELFMAG, SELFMAG) != 0) return;
    if (head->e_shoff + (size_t)head->e_shnum * sizeof(ElfW(Shdr)) > bytes) return;
    const ElfW(Shdr) *section = (const void *)(file + head->e_shoff);
    for (int i = 0; i < head->e_shnum; i++) {
        if (section[i].sh_type != SHT_SYMTAB) continue;
        const ElfW(Sym) *symbol = (const void *)(file + section[i].sh_offset);
        const char *names = (const char *)(file + section[section[i].sh_link].sh_offset);
        for (size_t s = 0; s < section[i].sh_size / sizeof *symbol; s++) {
            if ((symbol[s].st_info & 15) != STT_FUNC || symbol[s].st_shndx == SHN_UNDEF) continue;
            add_symbol(names + symbol[s].st_name, (const void *)(base + symbol[s].st_value));
        }
    }
}

static int read_object(struct dl_phdr_info *info, size_t size, void *unused)
{
    struct stat st;
    const char *path = info->dlpi_name[0] != 0 ? info->dlpi_name : "/proc/self/exe";
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    (void)size;
    (void)unused;
    if (fd < 0) return 0;
    if (fstat(fd, &st) == 0 && st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p != MAP_FAILED) {
            read_symbols(p, (size_t)st.st_size, info->dlpi_addr);
            munmap(p, (size_t)st.st_size);
        }
    }
    close(fd);
    return 0;
}

static void write_launched(void)
{
    const char *path = emu_option("MOE_EMULATION_KERNELS");
    FILE *f = path != NULL ? fopen(path, "a") : NULL;
    if (f == NULL) return;
    for (size_t i = 0; i < count; i++) {
        if (kernels[i].launched > 0) fprintf(f, "%s\n", kernels[i].name);
    }
    fclose(f);
}

static void load(void)
{
    if (loaded) return;
    loaded = true;
    dl_iterate_phdr(read_object, NULL);
    if (emu_option("MOE_EMULATION_KERNELS") != NULL) atexit(write_launched);
}

static struct emu_kernel *known(const void *address)
{
    static size_t recent;
    if (recent < count && kernels[recent].address == address) return &kernels[recent];
    for (recent = 0; recent < count; recent++) {
        if (kernels[recent].address == address) return &kernels[recent];
    }
    return NULL;
}

/* One without a tag is looked for by its address; one without a symbol keeps it as its name. */
struct emu_kernel *emu_kernel_of(const void *address)
{
    char text[32];
    load();
    struct emu_kernel *k = known(address);
    if (k != NULL) return k;
    wanted = address;
    dl_iterate_phdr(read_object, NULL);
    wanted = NULL;
    k = known(address);
    snprintf(text, sizeof text, "%p", address);
    return k != NULL ? k : add(address, strdup(text), 0);
}

struct emu_kernel *emu_kernel_at(size_t index)
{
    load();
    return index < count ? &kernels[index] : NULL;
}

int emu_kernel(size_t index, const char **name, uint64_t *launches)
{
    emu_lock();
    const struct emu_kernel *k = emu_kernel_at(index);
    if (k != NULL) {
        *name = k->name;
        *launches = k->launched;
    }
    emu_unlock();
    return k != NULL;
}
