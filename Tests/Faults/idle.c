/* A guest without an operating system, for what QEMU does with its state: numbered, checksummed records to its IDE disk and
 * to the serial line, as deploy/guest/workload.c writes them. A multiboot kernel: 32 bits, no paging, one interrupt.
 */
#include <stdint.h>

enum { RECORD = 4096, SECTORS = RECORD / 512, TICKS = 1, HERTZ = 100 };
/* What the memory copy has to carry, so that there is a middle of it. */
enum { FILLED_FROM = 2 << 20, FILLED_TO = 14 << 20 };

__asm__(
    ".text\n"
    "header: .long 0x1badb002, 0, -0x1badb002\n"
    ".globl _start\n"
    "_start: mov $stack_end, %esp\n"
    "    call run\n"
    ".globl tick\n"
    "tick: push %eax\n"
    "    incl ticks\n"
    "    mov $0x20, %al\n"
    "    out %al, $0x20\n"
    "    pop %eax\n"
    "    iret\n");

__attribute__((used)) static char stack[16384];
__asm__(".globl stack_end\n.set stack_end, stack + 16384\n");
__attribute__((used)) volatile uint32_t ticks;
extern void tick(void);

static void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static uint8_t inb(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void print(const char *text) {
    for (; *text; text++) {
        while (!(inb(0x3fd) & 0x20)) {}
        outb(0x3f8, (uint8_t)*text);
    }
}

static void print_decimal(uint32_t value) {
    char text[12], *at = text + 11;
    *at = 0;
    do *--at = (char)('0' + value % 10);
    while (value /= 10);
    print(at);
}

static void print_hexadecimal(uint64_t value) {
    char text[17];
    for (int i = 15; i >= 0; i--, value >>= 4) text[i] = "0123456789abcdef"[value & 15];
    text[16] = 0;
    print(text);
}

/* Tables that the processor uses: flat segments, and one gate. */
static uint64_t segments[] __attribute__((aligned(8))) = {0, 0x00cf9a000000ffff, 0x00cf92000000ffff};
static uint64_t gates[0x21] __attribute__((aligned(8)));
struct pointer {
    uint16_t limit;
    uint32_t base;
} __attribute__((packed));

static void begin_ticks(void) {
    struct pointer gdt = {sizeof segments - 1, (uint32_t)segments}, idt = {sizeof gates - 1, (uint32_t)gates};
    uint32_t entry = (uint32_t)tick;
    __asm__ volatile(
        "lgdt %0\n ljmp $8, $1f\n 1: mov $16, %%ax\n mov %%ax, %%ds\n mov %%ax, %%es\n mov %%ax, %%ss\n" ::"m"(gdt)
        : "eax");
    gates[0x20] = (uint64_t)(entry & 0xffff) | 8u << 16 | (uint64_t)0x8e00 << 32 | (uint64_t)(entry >> 16) << 48;
    __asm__ volatile("lidt %0" ::"m"(idt));
    outb(0x20, 0x11), outb(0x21, 0x20), outb(0x21, 4), outb(0x21, 1), outb(0x21, 0xfe);
    outb(0xa0, 0x11), outb(0xa1, 0x28), outb(0xa1, 2), outb(0xa1, 1), outb(0xa1, 0xff);
    uint32_t divisor = 1193182 / HERTZ;
    outb(0x43, 0x34), outb(0x40, divisor & 255), outb(0x40, (uint8_t)(divisor >> 8));
}

static uint8_t record[RECORD] __attribute__((aligned(4)));

/* Waits until the drive is not busy; returns its status. */
static uint8_t disk_status(void) {
    uint8_t status;
    while ((status = inb(0x1f7)) & 0x80) {}
    return status;
}

/* Returns whether the drive reports an error. */
static int write_record(uint32_t slot) {
    uint32_t sector = slot * SECTORS;
    outb(0x1f6, (uint8_t)(0xe0 | (sector >> 24 & 15)));
    disk_status();
    outb(0x1f2, SECTORS), outb(0x1f3, (uint8_t)sector);
    outb(0x1f4, (uint8_t)(sector >> 8)), outb(0x1f5, (uint8_t)(sector >> 16));
    outb(0x1f7, 0x30);
    for (int i = 0; i < SECTORS; i++) {
        if (!(disk_status() & 8)) return 1;
        const void *from = record + 512 * i;
        uint32_t count = 128;
        __asm__ volatile("rep outsl" : "+S"(from), "+c"(count) : "d"((uint16_t)0x1f0));
    }
    if (disk_status() & 1) return 1;
    outb(0x1f7, 0xe7);
    return disk_status() & 1;
}

static uint64_t multiplied(uint64_t hash) { return (hash << 40) + hash * 0x1b3; }

static uint64_t make_record(uint32_t number) {
    uint32_t *words = (uint32_t *)record, state = number * 2654435761u + 1;
    for (int i = 0; i < RECORD / 4; i++) words[i] = state = state * 1664525u + 1013904223u;
    for (int i = 0; i < 8; i++) record[i] = (uint8_t)"XDRECORD"[i];
    words[2] = number, words[3] = 0, words[4] = 0;
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < RECORD - 8; i++) hash = multiplied(hash ^ record[i]);
    words[RECORD / 4 - 2] = (uint32_t)hash, words[RECORD / 4 - 1] = (uint32_t)(hash >> 32);
    return hash;
}

static void fill_memory(void) {
    uint32_t state = 1;
    for (volatile uint32_t *word = (uint32_t *)FILLED_FROM; word < (uint32_t *)FILLED_TO; word++)
        *word = state = state * 1664525u + 1013904223u;
}

__attribute__((used, noreturn)) void run(void) {
    print("\r\nBOOT\r\n");
    fill_memory();
    begin_ticks();
    __asm__ volatile("sti");
    for (uint32_t number = 0;; number++) {
        uint64_t hash = make_record(number);
        if (write_record(number % SLOTS)) print("FAIL 0 ");
        else print("REC 0 ");
        print_decimal(number), print(" "), print_hexadecimal(hash), print("\r\n");
        for (uint32_t until = ticks + TICKS; (int32_t)(ticks - until) < 0;) __asm__ volatile("hlt");
    }
}
